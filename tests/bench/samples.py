"""What every contender of `tests/bench/speed.py` trains on: the models, and the samples in the order in which our own runs
draw them, in files that are read without a line of ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from llmscale.batch import Batch, Prompt
from llmscale.compose import compose
from llmscale.data.splits import load_prompts
from llmscale.models.loading import load_tokenizer
from llmscale.packing import best_fit
from llmscale.stages.supervised import SupervisedRun

DATA = {
    "pretrain": "pretrain/c4_demo.jsonl",
    "sft": "instruct/alpaca_en_demo.json",
    "reward": "preference/dpo_en_demo.json",
    "rlhf": "instruct/alpaca_en_demo.json",
}
PER_STEP = {"pretrain": 4, "sft": 8, "reward": 8}  # samples of a rank; 8, and at most 1024 tokens, are TRL's defaults
MAX_TOKENS = {"pretrain": 256, "sft": 1024, "reward": 1024, "rlhf": 256}
NEW_MODEL = [  # 6.4M parameters and a tied embedding of 1M
    "model.vocab_size=4096",
    "model.hidden_size=256",
    "model.intermediate_size=704",
    "model.num_layers=8",
    "model.num_heads=4",
    "model.max_position=1024",
]
BIGGER_MODEL = [  # 31M
    *NEW_MODEL,
    "model.hidden_size=512",
    "model.intermediate_size=1408",
    "model.num_layers=9",
    "model.num_heads=8",
]
BIGGEST_MODEL = [  # 102M
    *NEW_MODEL,
    "model.hidden_size=768",
    "model.intermediate_size=2048",
    "model.num_layers=14",
    "model.num_heads=12",
]
SAMPLED = [  # what an RLHF step samples, of prompts that leave room for it
    "training.prompts_per_step=8",
    "rollout.group_size=8",
    "rollout.max_new_tokens=64",
    "rollout.unit_size=64",  # one batch, as TRL has it
    "algorithm.global_batch_size=64",
    "data.too_long=drop",
]
IGNORED = -100  # a label that is no target
Sample = dict[str, torch.Tensor]


def settings(stage: str, folder: Path, data: Path, ranks: int = 1) -> list[str]:
    """Overrides for our run of a stage, all but the name of the run, the model and the engine."""
    per_step = [f"training.global_batch_size={ranks * PER_STEP[stage]}"] if stage in PER_STEP else SAMPLED
    return [
        *per_step,
        f"data.train={data / DATA[stage]}",
        f"data.max_seq_len={MAX_TOKENS[stage]}",
        "training.num_steps=1000000",
        "training.eval_every_steps=1000000",
        "training.save_every_steps=1000000",
        "optim.lr=3e-4",
        "optim.schedule=constant",
        "optim.warmup_steps=0",
        "tracking.wandb=disabled",
        "cluster.stall_timeout_s=1000000",  # a contender stands still while the others take their turns
        f"run.dir={folder}/runs",
    ]


def prepare(folder: Path, data: Path, num_steps: int) -> None:
    """Writes `lm`, `lm30` and `lm100`, language models, and `rm`, a reward model; `pretrain.pt`, `sft.pt` and `reward.pt`, the
    samples of `num_steps` steps; `sft_rows.pt`, those of sft in rows of 1024 tokens; and `prompts.json`, conversations."""
    for stage, model in (
        ("pretrain", NEW_MODEL),
        ("sft", [f"model.path={folder}/lm"]),
        ("reward", [f"model.path={folder}/lm"]),
    ):
        config = compose(stage, [*settings(stage, folder, data), *model, "engine.rows=padded", "run.name=samples"])
        run = SupervisedRun(config, config.run_dir)
        if stage != "sft":
            run.engine.export(folder / ("lm" if stage == "pretrain" else "rm"), run.tokenizer)
        read = pairs if stage == "reward" else sequences
        samples = [sample for step in range(num_steps) for batch in run.batches(step) for sample in read(batch)]
        torch.save(samples, folder / f"{stage}.pt")
        if stage == "sft":
            rows = best_fit([len(sample["input_ids"]) for sample in samples], MAX_TOKENS["sft"])
            packed = [[samples[i] for i in row] for row in rows]
            torch.save([{k: torch.cat([s[k] for s in row]) for k in row[0]} for row in packed], folder / "sft_rows.pt")
    for name, model in (("lm30", BIGGER_MODEL), ("lm100", BIGGEST_MODEL)):
        config = compose("pretrain", [*settings("pretrain", folder, data), *model, f"run.name={name}"])
        run = SupervisedRun(config, config.run_dir)
        run.engine.export(folder / name, run.tokenizer)
    prompts = drawn_prompts(folder, data, num_steps)
    (folder / "prompts.json").write_text(json.dumps([prompt.messages for prompt in prompts]))


def drawn_prompts(folder: Path, data: Path, num_steps: int) -> list[Prompt]:
    """Those that our RLHF run draws."""
    path = f"{folder}/lm"
    given = [f"model.path={path}", "reward=function", f"reward.path={__file__}:none", "algorithm=grpo"]
    config = compose("rlhf", [*settings("rlhf", folder, data), *given])
    prompts = load_prompts(config.data, load_tokenizer(path), config.rollout.max_new_tokens)
    draws = range(num_steps * config.training.prompts_per_step)
    return [prompts.train[i] for i in prompts.order(config.run.seed).at(np.array(draws)).tolist()]


def sequences(batch: Batch) -> Iterator[Sample]:
    """Its rows without the padding: `input_ids`, `position_ids` and `labels`, [T] each."""
    labels = torch.where(batch["loss_mask"], batch["input_ids"], IGNORED)
    for row, length in enumerate(batch["lengths"].tolist()):
        own = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "labels": labels}
        yield {name: tensor[row, :length].clone() for name, tensor in own.items()}


def pairs(batch: Batch) -> Iterator[Sample]:
    """`chosen_ids` and `rejected_ids`, [T] each; a row is a completion."""
    rows = [ids[:length].clone() for ids, length in zip(batch["input_ids"], batch["lengths"].tolist(), strict=True)]
    for winner, loser in zip(batch["winners"].tolist(), batch["losers"].tolist(), strict=True):
        yield {"chosen_ids": rows[winner], "rejected_ids": rows[loser]}
