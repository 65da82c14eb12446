"""Those that `tests/bench/speed.py` compares, each in a process of its own that trains a few steps whenever it is told to.

    python -m tests.bench.contenders NAME FOLDER

NAME is a function of this module, FOLDER holds what `speed.prepared` made: the models and the samples of every step, in the
order in which each contender sees them. Standard input says how many steps are next, standard output answers with one
JSON object for them; what the contender itself prints goes to standard error. Those that are not ours import nothing of ours.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

LR, BETAS, WEIGHT_DECAY, GRAD_CLIP = 3e-4, (0.9, 0.95), 0.1, 1.0
IGNORED = -100  # a label that is no target
Sample = dict[str, torch.Tensor]  # input_ids, position_ids, labels, each [T]


class Gate:
    """Lets as many steps pass as the harness asks for, and tells it what they took."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._left, self._tokens, self._losses, self._parts = 0, 0, list[float](), dict[str, float]()

    def open(self) -> None:
        """Everything is loaded; the first step is next."""
        _reset_peak_memory()
        self._start_bytes = _memory("VmRSS")
        self._answer({})
        self._wait()

    def took(self, tokens: int) -> None:
        """Tokens that are not padding, of a batch of this step."""
        self._tokens += tokens

    def spent(self, parts: dict[str, float]) -> None:
        """What part of this step took how many seconds."""
        for name, seconds in parts.items():
            self._parts[name] = self._parts.get(name, 0.0) + seconds

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        since = time.perf_counter()
        yield
        self.spent({name: time.perf_counter() - since})

    def step(self, loss: float) -> None:
        """A step is done. Returns when the next one may begin."""
        self._losses.append(loss)
        self._left -= 1
        if self._left == 0:
            seconds, cpu_seconds = time.perf_counter() - self._since, time.process_time() - self._cpu_since
            answer = {"seconds": seconds, "cpu_seconds": cpu_seconds, "tokens": self._tokens, "losses": self._losses}
            answer["parts"] = self._parts
            self._answer(answer | {"peak_bytes": _memory("VmHWM"), "start_bytes": self._start_bytes})
            self._wait()

    def _answer(self, what: dict[str, Any]) -> None:
        print(json.dumps(what), file=self._answers, flush=True)

    def _wait(self) -> None:
        line = sys.stdin.readline()
        if not line:  # nothing is left to clean up: every contender works in a temporary folder
            os._exit(0)
        self._left, self._tokens, self._losses, self._parts = int(line), 0, [], {}
        self._since, self._cpu_since = time.perf_counter(), time.process_time()


def _memory(field: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _reset_peak_memory() -> None:
    Path("/proc/self/clear_refs").write_text("5")


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
    _gated(SFTTrainer, gate)(model, arguments, train_dataset=_dataset(samples), processing_class=tokenizer).train()


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
    _gated(RewardTrainer, gate)(model, arguments, train_dataset=_dataset(pairs), processing_class=tokenizer).train()


def _dataset(rows: list[dict[str, Any]]) -> Any:
    import datasets

    return datasets.Dataset.from_list(rows)


def _gated(trainer: type, gate: Gate) -> type:
    """The trainer, waiting at the gate after every step."""

    class Gated(_waiting(trainer, gate)):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            mask = inputs.get("attention_mask")
            gate.took(inputs["input_ids"].numel() if mask is None else int(mask.sum()))
            loss = super().training_step(model, inputs, *args, **kwargs)
            self.losses.append(loss.item())
            return loss

    return Gated


def _waiting(trainer: type, gate: Gate) -> type:
    """The trainer at the gate; it has to note its `losses`."""
    from transformers import TrainerCallback

    class AtGate(TrainerCallback):
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
            super().__init__(*args, callbacks=[AtGate(self.losses)], **kwargs)

    return Waiting


# RLHF: 8 prompts, 8 completions of each, 64 tokens at most, a KL to the reference.


def trl_grpo_defaults(gate: Gate, folder: Path, model: str = "lm") -> None:
    """But for what is compared: the number of sequences, their length and the KL, which its defaults leave out."""
    _trl_grpo(gate, folder, model)


def trl_grpo(gate: Gate, folder: Path, model: str = "lm") -> None:
    _trl_grpo(gate, folder, model, gradient_checkpointing=False)


def trl_grpo_at_once(gate: Gate, folder: Path, model: str = "lm") -> None:
    """All sequences in one forward and backward."""
    whole = {"per_device_train_batch_size": 64, "gradient_accumulation_steps": 1}
    _trl_grpo(gate, folder, model, gradient_checkpointing=False, **whole)


def _trl_grpo(gate: Gate, folder: Path, model: str, **settings: Any) -> None:
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    class Timed(_waiting(GRPOTrainer, gate)):  # type: ignore[misc]
        def _generate(self, *args: Any) -> Any:
            with gate.part("generate"):
                made = super()._generate(*args)
            gate.took(sum(len(ids) for ids in made[1]))
            return made

        def _generate_and_score_completions(self, *args: Any) -> Any:
            with gate.part("generate and score"):
                return super()._generate_and_score_completions(*args)

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            self.losses.append(loss.item())
            return loss

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [vowels("", completion[0]["content"], {}) for completion in completions]

    same = {
        "gradient_accumulation_steps": 8,  # of its default 8 sequences
        "num_generations": 8,
        "max_completion_length": 64,
        "beta": 0.04,
        "loss_type": "grpo",
        "shuffle_dataset": False,
        "train_sampling_strategy": "random",  # its own sampler takes the prompts in order
    }
    arguments = GRPOConfig(**(SETTINGS | same | settings))
    prompts = _dataset([{"prompt": messages} for messages in json.loads((folder / "prompts.json").read_text())])
    tokenizer = AutoTokenizer.from_pretrained(folder / model)
    Timed(str(folder / model), reward, arguments, train_dataset=prompts, processing_class=tokenizer).train()


def trl_ppo_defaults(gate: Gate, folder: Path) -> None:
    _trl_ppo(gate, folder)


def trl_ppo(gate: Gate, folder: Path) -> None:
    _trl_ppo(gate, folder, gradient_checkpointing=False)


def _trl_ppo(gate: Gate, folder: Path, **settings: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    class Counting(_waiting(PPOTrainer, gate)):  # type: ignore[misc]
        def log(self, metrics: dict[str, float], *args: Any) -> None:
            gate.took(64 * 64)  # it goes on after the end of a completion
            self.losses.append(metrics["loss/policy_avg"])

    same = {
        "bf16": False,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 8,
        "num_mini_batches": 1,
        "num_ppo_epochs": 1,
        "response_length": 64,
        "temperature": 1.0,
        "total_episodes": 1_000_000,
        "num_sample_generations": 0,
    }
    arguments = PPOConfig(**(SETTINGS | same | settings))
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "lm", dtype=torch.float32) for _ in "12")
    kind = AutoModelForSequenceClassification
    reward, value = (kind.from_pretrained(folder / "rm", dtype=torch.float32) for _ in "12")
    tokenizer = AutoTokenizer.from_pretrained(folder / "lm", padding_side="left")
    messages = json.loads((folder / "prompts.json").read_text())
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    prompts = _dataset([{"input_ids": ids} for ids in rendered for _ in range(8)])  # it draws one sample of each
    given = {"model": policy, "ref_model": reference, "reward_model": reward, "value_model": value}
    Counting(arguments, tokenizer, **given, train_dataset=prompts, eval_dataset=prompts.select(range(8))).train()


def vowels(prompt: str, completion: str, fields: dict[str, Any]) -> float:
    """The reward of GRPO's contenders: any rule that costs nothing."""
    return sum(letter in "aeiou" for letter in completion) / (len(completion) + 1)


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


def ours_rlhf(gate: Gate, folder: Path, stage: str, *overrides: str) -> None:
    from llmscale.checkpoint.run_directory import open_run
    from llmscale.compose import compose
    from llmscale.stages.rlhf_run import RlhfRun

    class Gated(RlhfRun):
        def open_tracker(self, *args: Any) -> Any:
            return AtGate(super().open_tracker(*args), gate, "policy/loss")

        def train_on(self, *args: Any) -> None:
            gate.open()
            super().train_on(*args)

    config = compose(stage, list(overrides))
    with closing(open_run(config.run_dir, config)) as directory:
        Gated(config, directory).train()


class AtGate:
    """The run's own trackers, and then the gate."""

    def __init__(self, inner: Any, gate: Gate, loss: str):
        self.inner, self.gate, self.loss = inner, gate, loss

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def samples(self, step: int, records: list[dict[str, Any]]) -> None:
        self.inner.samples(step, records)
        self.gate.took(sum(sum(record["loss_mask"]) for record in records))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.inner.log(step, metrics)
        timings = {name: seconds for name, seconds in metrics.items() if name.startswith("timing_s/")}
        self.gate.spent({name.removeprefix("timing_s/"): seconds for name, seconds in timings.items()})
        self.gate.step(metrics[self.loss])


def main() -> None:
    torch.set_num_threads(1)
    name, folder, *arguments = sys.argv[1:]
    globals()[name](Gate(), Path(folder), *arguments)


if __name__ == "__main__":
    main()
