"""Those that `tests/bench/speed.py` compares, each in a process of its own that trains a few steps whenever it is told to.

    python -m tests.bench.contenders NAME FOLDER

NAME is a function of this module or of `rlhf_contenders.py`. FOLDER holds what `samples.prepare` made: the models and the
samples of every step, in the order in which each contender sees them. Standard input says how many steps are next, standard
output answers with one JSON object for them; what the contender itself prints goes to standard error. Those that are not ours
import nothing of ours.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from tests.bench.gate import AtGate, Gate

LR, BETAS, WEIGHT_DECAY, GRAD_CLIP = 3e-4, (0.9, 0.95), 0.1, 1.0
IGNORED = -100  # a label that is no target
Sample = dict[str, torch.Tensor]  # input_ids, position_ids, labels, each [T]

# A loop of bare PyTorch, as one writes it by hand.


def bare_pretrain(gate: Gate, folder: Path) -> None:
    _bare(gate, folder / "lm", _batches(folder / "pretrain.pt", 4), bf16=False)


def bare_pretrain_ddp(gate: Gate, folder: Path) -> None:
    """On two ranks: DDP over gloo."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    own = (samples for turn, samples in enumerate(_batches(folder / "pretrain.pt", 4)) if turn % 2 == rank)
    _bare(gate, folder / "lm", own, bf16=False, wrap=torch.nn.parallel.DistributedDataParallel)


def bare_sft_rows(gate: Gate, folder: Path) -> None:
    _bare(gate, folder / "lm", _batches(folder / "sft_rows.pt", 1), bf16=True)


def _batches(file: Path, size: int) -> Iterator[list[Sample]]:
    samples = torch.load(file)
    yield from (samples[start : start + size] for start in range(0, len(samples), size))


def _bare(
    gate: Gate,
    path: Path,
    batches: Iterator[list[Sample]],
    bf16: bool,
    wrap: Callable[[Any], Any] = lambda model: model,
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    module = wrap(model)
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)
    model.train()
    gate.open()
    for samples in batches:
        batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
        gate.took(batch["input_ids"].numel())
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
            logits = module(**inputs, use_cache=False).logits  # without a cache it tells packed documents apart
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        gate.step(loss.item())


# The trainers of transformers and TRL. `SETTINGS` are what is not about speed.

SETTINGS = {
    "output_dir": "/nonexistent",
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "learning_rate": LR,
    "lr_scheduler_type": "constant",
    "adam_beta1": BETAS[0],
    "adam_beta2": BETAS[1],
    "weight_decay": WEIGHT_DECAY,
    "max_grad_norm": GRAD_CLIP,
    "train_sampling_strategy": "sequential",  # the samples are in the order of all the others'
}


def transformers_pretrain(gate: Gate, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(folder / "lm", dtype=torch.float32)
    model.config.use_cache = False  # with a cache packed documents would see one another
    arguments = TrainingArguments(**SETTINGS, per_device_train_batch_size=4)
    _gated(Trainer, gate)(model, arguments, train_dataset=torch.load(folder / "pretrain.pt")).train()


def trl_sft_defaults(gate: Gate, folder: Path) -> None:
    _trl_sft(gate, folder)


def trl_sft(gate: Gate, folder: Path) -> None:
    _trl_sft(gate, folder, gradient_checkpointing=False)


def trl_sft_by_length(gate: Gate, folder: Path) -> None:
    _trl_sft(gate, folder, gradient_checkpointing=False, train_sampling_strategy="group_by_length")


def trl_sft_padding_free(gate: Gate, folder: Path) -> None:
    _trl_sft(gate, folder, gradient_checkpointing=False, padding_free=True, max_length=None)


def trl_sft_packing(gate: Gate, folder: Path) -> None:
    _trl_sft(gate, folder, gradient_checkpointing=False, packing=True, per_device_train_batch_size=1)


def _trl_sft(gate: Gate, folder: Path, **settings: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(folder / "lm", dtype=torch.float32)
    samples = [{name: s[name].tolist() for name in ("input_ids", "labels")} for s in torch.load(folder / "sft.pt")]
    arguments = SFTConfig(**(SETTINGS | settings))
    tokenizer = AutoTokenizer.from_pretrained(folder / "lm")
    _gated(SFTTrainer, gate)(model, arguments, train_dataset=dataset(samples), processing_class=tokenizer).train()


def trl_reward_defaults(gate: Gate, folder: Path) -> None:
    _trl_reward(gate, folder)


def trl_reward(gate: Gate, folder: Path) -> None:
    _trl_reward(gate, folder, gradient_checkpointing=False)


def _trl_reward(gate: Gate, folder: Path, **settings: Any) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    model = AutoModelForSequenceClassification.from_pretrained(folder / "rm", dtype=torch.float32)
    pairs = [{name: ids.tolist() for name, ids in pair.items()} for pair in torch.load(folder / "reward.pt")]
    arguments = RewardConfig(**(SETTINGS | settings))
    tokenizer = AutoTokenizer.from_pretrained(folder / "lm")
    _gated(RewardTrainer, gate)(model, arguments, train_dataset=dataset(pairs), processing_class=tokenizer).train()


def dataset(rows: list[dict[str, Any]]) -> Any:
    import datasets

    return datasets.Dataset.from_list(rows)


def _gated(trainer: type, gate: Gate) -> type:
    """The trainer, waiting at the gate after every step."""

    class Gated(waiting(trainer, gate)):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            mask = inputs.get("attention_mask")
            gate.took(inputs["input_ids"].numel() if mask is None else int(mask.sum()))
            loss = super().training_step(model, inputs, *args, **kwargs)
            self.losses.append(loss.item())
            return loss

    return Gated


def waiting(trainer: type, gate: Gate) -> type:
    """The trainer at the gate; it has to note its `losses`."""
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def __init__(self, losses: list[float]):
            self.losses = losses

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            gate.open()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            gate.step(sum(self.losses))
            self.losses.clear()

    class Waiting(trainer):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any):
            self.losses = list[float]()
            super().__init__(*args, callbacks=[Callback(self.losses)], **kwargs)

    return Waiting


# Ours, whole: the run that the command line starts.


def ours_supervised(gate: Gate, folder: Path, stage: str, *overrides: str) -> None:
    from llmscale.batch import Batch
    from llmscale.checkpoint.run_directory import open_run
    from llmscale.compose import compose
    from llmscale.stages.supervised import SupervisedRun

    class Gated(SupervisedRun):
        def open_tracker(self) -> Any:
            tracker = AtGate(super().open_tracker(), gate, "train/loss")
            gate.open()
            return tracker

        def batches(self, step: int) -> list[Batch]:
            batches = super().batches(step)
            gate.took(sum(batch.num_tokens for batch in batches))
            return batches

    config = compose(stage, list(overrides))
    with closing(open_run(config.run_dir, config)) if os.environ.get("RANK", "0") == "0" else nullcontext():
        Gated(config, config.run_dir).train()


def main() -> None:
    torch.set_num_threads(1)
    name, folder, *arguments = sys.argv[1:]
    rlhf = import_module("tests.bench.rlhf_contenders")
    (globals() | vars(rlhf))[name](Gate(), Path(folder), *arguments)


if __name__ == "__main__":
    main()
