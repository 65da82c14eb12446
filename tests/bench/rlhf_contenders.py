"""The contenders of `tests/bench/speed.py` that sample: 8 prompts, 8 completions of each, 64 tokens at most, a KL to the
reference. `contenders.py` starts them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from tests.bench.contenders import SETTINGS, dataset, waiting
from tests.bench.gate import AtGate, Gate

MAX_RAGGED, STOPS = 128, (1000, 1064)  # one token of 64 ends a row


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

    class Timed(waiting(GRPOTrainer, gate)):  # type: ignore[misc]
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
    prompts = dataset([{"prompt": messages} for messages in json.loads((folder / "prompts.json").read_text())])
    tokenizer = AutoTokenizer.from_pretrained(folder / model)
    Timed(str(folder / model), reward, arguments, train_dataset=prompts, processing_class=tokenizer).train()


def trl_ppo_defaults(gate: Gate, folder: Path) -> None:
    _trl_ppo(gate, folder)


def trl_ppo(gate: Gate, folder: Path) -> None:
    _trl_ppo(gate, folder, gradient_checkpointing=False)


def _trl_ppo(gate: Gate, folder: Path, **settings: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    class Counting(waiting(PPOTrainer, gate)):  # type: ignore[misc]
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
    prompts = dataset([{"input_ids": ids} for ids in rendered for _ in range(8)])  # it draws one sample of each
    given = {"model": policy, "ref_model": reference, "reward_model": reward, "value_model": value}
    Counting(arguments, tokenizer, **given, train_dataset=prompts, eval_dataset=prompts.select(range(8))).train()


def generate(gate: Gate, folder: Path, name: str = "lm") -> None:
    """transformers' own, in one batch that is padded on the left, ragged by tokens that end a row."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / name, padding_side="left")
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": MAX_RAGGED, "eos_token_id": list(range(*STOPS))}
    gate.open()
    for rows in prompts_of(folder, tokenizer):
        inputs = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        made = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
        going = ((made >= STOPS[0]) & (made < STOPS[1])).cumsum(1) == 0
        gate.took(int(torch.nn.functional.pad(going[:, :-1], (1, 0), value=True).sum()))
        gate.step(0.0)


def ours_generate(gate: Gate, folder: Path, rollout: str, name: str = "lm") -> None:
    """A rollout engine by itself."""
    import numpy as np

    from llmscale.batch import Prompt
    from llmscale.config import build
    from llmscale.models.loading import cast_parameters, load_language_model, load_tokenizer
    from llmscale.protocols import SamplingRequest
    from llmscale.rollout.config import HFRolloutConfig, VLLMRolloutConfig

    config, more = HFRolloutConfig(max_new_tokens=MAX_RAGGED), {}
    if rollout == "vllm":
        config = VLLMRolloutConfig(max_new_tokens=MAX_RAGGED, unit_size=64)
        more["max_seq_len"] = 192 + MAX_RAGGED  # `samples.settings` leaves 64 of 256 to a completion
    path = str(folder / name)
    model, tokenizer = load_language_model(path, empty=rollout == "vllm"), load_tokenizer(path)
    cast_parameters(model, torch.bfloat16)
    engine = build(config, model, tokenizer, 0, range(*STOPS), **more)
    gate.open()
    for step, rows in enumerate(prompts_of(folder, tokenizer)):
        prompts = [Prompt(np.array(ids), "") for ids in rows]
        made = engine.generate([SamplingRequest(p, step, number) for number, p in enumerate(prompts)])
        gate.took(sum(t.completion_len for t in made))
        gate.step(0.0)


def prompts_of(folder: Path, tokenizer: Any) -> Iterator[list[list[int]]]:
    """Token ids of the rows of each step: 8 prompts, each 8 times."""
    messages = json.loads((folder / "prompts.json").read_text())
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    for start in range(0, len(rendered), 8):
        yield [ids for ids in rendered[start : start + 8] for _ in range(8)]


def vowels(prompt: str, completion: str, fields: dict[str, Any]) -> float:
    """The reward of GRPO's contenders: any rule that costs nothing."""
    return sum(letter in "aeiou" for letter in completion) / (len(completion) + 1)


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
