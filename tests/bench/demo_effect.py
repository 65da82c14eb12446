"""What RLHF is worth on the demo, over several seeds, and the table in docs/demo_effect.md.

    python tests/bench/demo_effect.py --seeds 0 1 2 3 4 --out docs/demo_effect.md

For each seed it runs the four stages by the command line, and a control: SFT goes on from the SFT model, on the same
demonstrations, for as many optimizer steps of the same size and learning rate as RLHF gave its policy. Then SFT,
control and RLHF each answer the same held-out prompts once with the same random numbers, and once greedily; the task's
rule scores them. Finished stages are not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmscale.compose import compose
from llmscale.config import build
from llmscale.data.chat import ChatRenderer
from llmscale.data.loader import micro_batches
from llmscale.data.splits import load_prompts
from llmscale.models.loading import load_language_model, load_tokenizer
from llmscale.protocols import SamplingRequest
from llmscale.stages.rlhf_config import RlhfConfig

MODELS = {"SFT": "sft", "SFT continued": "continued/sft", "RLHF": "rlhf"}  # name -> run directory within a seed's
PLACE = ["cluster=local", "engine=single", "tracking.wandb=disabled"]
UNIT_SIZE = 64  # prompts of one batch


class Seed:
    """The runs of one seed and what was found in them."""

    def __init__(self, folder: Path, seed: int, overrides: Sequence[str]):
        self.folder, self.seed = folder / f"seed-{seed}", seed
        self.common = ["experiment=demo", f"run.dir={folder}", f"run.seed={seed}", *overrides]
        self.common += PLACE
        self.config: RlhfConfig = compose("rlhf", [*self.common, f"run.name={self.folder.name}"])

    def train(self) -> None:
        for stage in ("pretrain", "sft", "reward", "rlhf"):
            run_stage(stage, *self.common, f"run.name={self.folder.name}")
        control = [
            f"run.name={self.folder.name}/continued",
            f"model.path={self.folder}/sft",
            f"training.num_steps={policy_steps(self.config)}",
            f"training.global_batch_size={self.config.algorithm.global_batch_size}",
            f"optim.lr={self.config.optim.lr}",
        ]
        run_stage("sft", *self.common, *control)

    def scores(self, model: str, num_prompts: int, temperature: float) -> np.ndarray:
        """What the rule gives each held-out prompt's completion, 0 or 1. The randomness of a completion is a function
        of the seed and its prompt's number, so the models share it."""
        path = str(self.folder / MODELS[model])
        tokenizer = load_tokenizer(path)
        data = dataclasses.replace(self.config.data, validation=f"task:sorting/test?seed=2000&size={num_prompts}")
        rollout = dataclasses.replace(self.config.rollout, temperature=temperature)
        prompts = load_prompts(data, tokenizer, rollout.max_new_tokens).validation
        engine = build(rollout, load_language_model(path), tokenizer, self.seed, ChatRenderer(tokenizer).stop_ids)
        rule = build(self.config.true_reward, tokenizer)
        requests = [SamplingRequest(prompt, draw_id, 0) for draw_id, prompt in enumerate(prompts)]
        return np.array([score for unit in micro_batches(requests, UNIT_SIZE) for score in rule(engine.generate(unit))])

    def result(self, stage: str) -> dict[str, Any]:
        return json.loads((self.folder / stage / "result.json").read_text(encoding="utf-8"))


def run_stage(*arguments: str) -> None:
    print("llmscale", *arguments, file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "llmscale.cli", *arguments], check=True, stdout=subprocess.DEVNULL)


def policy_steps(config: RlhfConfig) -> int:
    """Optimizer steps that RLHF gives its policy: iterations x epochs x minibatches."""
    sequences = config.training.prompts_per_step * config.rollout.group_size
    minibatches = -(-sequences // config.algorithm.global_batch_size)
    return config.training.num_steps * config.algorithm.num_epochs * minibatches


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """Mean, and 1.96 standard errors of it (ddof 1)."""
    return float(values.mean()), float(1.96 * values.std(ddof=1) / len(values) ** 0.5)


def compare(seed: Seed, num_prompts: int, temperature: float) -> dict[str, Any]:
    scores = {model: seed.scores(model, num_prompts, temperature) for model in MODELS}
    row: dict[str, Any] = {model: float(values.mean()) for model, values in scores.items()}
    row["gain"] = mean_interval(scores["RLHF"] - scores["SFT"])
    row["gain over control"] = mean_interval(scores["RLHF"] - scores["SFT continued"])
    return row


def comparison_table(rows: dict[int, dict[str, Any]]) -> list[str]:
    lines = ["| seed | SFT | SFT continued | RLHF | RLHF - SFT | RLHF - SFT continued |", "|---|---|---|---|---|---|"]
    for seed, row in rows.items():
        gains = [f"{100 * m:+.1f} ± {100 * e:.1f}" for m, e in (row["gain"], row["gain over control"])]
        lines.append(f"| {seed} | " + " | ".join([*(f"{100 * row[model]:.1f}" for model in MODELS), *gains]) + " |")
    means = [f"{100 * np.mean([row[model] for row in rows.values()]):.1f}" for model in MODELS]
    means += [f"{100 * np.mean([row[g][0] for row in rows.values()]):+.1f}" for g in ("gain", "gain over control")]
    return [*lines, "| mean | " + " | ".join(means) + " |", ""]


def training_table(seeds: Sequence[Seed]) -> list[str]:
    lines = [
        "| seed | reward model's accuracy | learned reward before | after | KL to SFT, nats |",
        "|---|---|---|---|---|",
    ]
    for seed in seeds:
        accuracy, rlhf = seed.result("reward")["metrics"]["eval/accuracy"], seed.result("rlhf")
        before, after = rlhf["before"]["eval/reward/mean"], rlhf["metrics"]["eval/reward/mean"]
        kl = rlhf["metrics"]["kl/ref"]
        lines.append(f"| {seed.seed} | {100 * accuracy:.1f} | {before:+.2f} | {after:+.2f} | {kl:.2f} |")
    return [*lines, ""]


def report(seeds: Sequence[Seed], num_prompts: int) -> str:
    config = seeds[0].config
    sampled = {s.seed: compare(s, num_prompts, 1.0) for s in seeds}
    greedy = {s.seed: compare(s, num_prompts, 0.0) for s in seeds}
    lines = [
        "# What RLHF is worth on the demo",
        "",
        f"`python tests/bench/demo_effect.py --seeds {' '.join(str(s.seed) for s in seeds)} --prompts {num_prompts}` "
        f"on {datetime.date.today()}; {os.cpu_count()} CPU cores, no GPU. Each stage ran as",
        "",
        f"    llmscale STAGE {shlex.join(PLACE)} experiment=demo run.seed=SEED",
        "",
        "which is what the demo's Ray pools compute, in one process.",
        "",
        f"Each model answers the same {num_prompts} held-out prompts of `task:sorting/test` once; no training split "
        "has their words. True score: percent of answers that are exactly right by the rule, which no training saw. "
        "*SFT continued* is the control: SFT going on from the SFT model, on the same demonstrations, for the "
        f"{policy_steps(config)} optimizer steps that RLHF gave its policy (batches of "
        f"{config.algorithm.global_batch_size}, peak learning rate {config.optim.lr:g}, as there). Differences are "
        "paired by prompt, in points: mean ± 1.96 standard errors of the paired differences (ddof 1), the normal "
        "approximation of a 95% interval. It covers the choice of prompts and their sampling within a seed; how much "
        "training differs from seed to seed shows between the rows.",
        "",
        "## Sampled at temperature 1, with common random numbers",
        "",
        *comparison_table(sampled),
        "## Greedy (temperature 0)",
        "",
        *comparison_table(greedy),
        "## Training",
        "",
        "The reward model's accuracy is over pairs of held-out rankings. The learned reward is standardised and is the "
        "mean over the run's own held-out prompts; KL is per completion, at the last step.",
        "",
        *training_table(seeds),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the demo over several seeds and write the table of its effect.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, required=True, help="the Markdown file to write")
    parser.add_argument("--dir", type=Path, help="where the runs go or are resumed; default: a temporary folder")
    parser.add_argument("--prompts", type=int, default=1024, help="held-out prompts")
    parser.add_argument("overrides", nargs="*", default=[], metavar="path=value", help="for every stage")
    arguments = parser.parse_intermixed_args()
    folder = arguments.dir or Path(tempfile.mkdtemp(prefix="demo-effect-"))
    seeds = [Seed(folder, seed, arguments.overrides) for seed in arguments.seeds]
    for seed in seeds:
        seed.train()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(report(seeds, arguments.prompts), encoding="utf-8")


if __name__ == "__main__":
    main()
