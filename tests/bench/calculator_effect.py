"""What GRPO with a calculator makes of the SFT model of experiment=calculator, over seeds: writes docs/calculator_effect.md.

    python -m tests.bench.calculator_effect --seeds 0 1 2 --folder FOLDER

Two controls: the SFT model before its first step, on the same held-out products with the same random numbers; and the same
training from the same SFT model with the tool switched off, so that the first thing said is the answer.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from llmscale.tracking.jsonl import METRICS, read_jsonl

ROOT = Path(__file__).parents[2]
SCORE, TURNS = "eval/reward/mean", "eval/rollout/turns"
COMMON = "experiment=calculator cluster=local engine=single tracking.wandb=disabled"
WITH = f"pipeline {COMMON} stages=[pretrain,sft,rlhf] rlhf.training.eval_every_steps=10"
WITHOUT = f"rlhf {COMMON} training.eval_every_steps=10 environment.max_turns=1"


class Curve(NamedTuple):
    score: dict[int, float]  # percent of the held-out products that are right, by step
    asks: dict[int, float]  # questions to the calculator for each of them
    seconds: float  # of the command


def run(command: str, folder: Path, name: str, *more: str) -> Curve:
    argv = [sys.executable, "-m", "llmscale.cli", *command.split(), f"run.name={name}", *more]
    started = time.perf_counter()
    subprocess.run(argv, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    seconds = time.perf_counter() - started
    records = [r for r in read_jsonl(folder / "runs" / name / "rlhf" / METRICS) if SCORE in r]
    return Curve({r["step"]: 100 * r[SCORE] for r in records}, {r["step"]: r[TURNS] - 1 for r in records}, seconds)


def report(tool: dict[int, Curve], control: dict[int, Curve], processors: int) -> str:
    gains = [list(c.score.values())[-1] - c.score[0] for c in tool.values()]
    without = [list(c.score.values())[-1] for c in control.values()]
    columns = [f"seed {seed}, {what}" for seed in tool for what in ("right", "asks", "right without")]
    lines = [
        "# What a calculator is worth to a policy that learns when to ask it",
        "",
        f"`python -m tests.bench.calculator_effect` on {datetime.date.today()}; {processors} CPU cores, no GPU. Each seed was",
        "",
        f"    llmscale {WITH} run.seed=SEED",
        "",
        "and, as the control, GRPO from the same SFT model with the tool switched off:",
        "",
        f"    llmscale {WITHOUT} run.seed=SEED model.path=...",
        "",
        "The SFT model has seen that the calculator is asked in half of the demonstrations and that the others guess.",
        "`right`: percent of 256 held-out products whose answer is right, sampled at temperature 1, by step; step 0 is the SFT",
        "model, on the same products with the same random numbers. `asks`: questions to the calculator for each product.",
        "Without the tool a question is the answer, and wrong; so are guesses, which the demonstrations have always wrong.",
        "",
        f"Gain at the end: {', '.join(f'{g:+.1f}' for g in gains)} points, {mean(gains):+.1f} on average. Without the tool the "
        f"end is {mean(without):.1f} percent.",
        "",
        "| step | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for step in next(iter(tool.values())).score:
        cells = [
            f"{tool[seed].score[step]:.1f} | {tool[seed].asks[step]:.2f} | {control[seed].score[step]:.1f}"
            for seed in tool
        ]
        lines.append(f"| {step} | " + " | ".join(cells) + " |")
    took = ", ".join(f"{c.seconds:.0f}" for c in tool.values())
    return "\n".join([*lines, "", f"Seconds of each pipeline, from its start to its end: {took}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=ROOT)
    arguments = parser.parse_args()
    tool, control = {}, {}
    for seed in arguments.seeds:
        tool[seed] = run(WITH, arguments.folder, f"calculator{seed}", f"run.seed={seed}")
        start = f"model.path=runs/calculator{seed}/sft"
        control[seed] = run(WITHOUT, arguments.folder, f"untooled{seed}", f"run.seed={seed}", start)
        (ROOT / "docs" / "calculator_effect.md").write_text(report(tool, control, os.cpu_count() or 1))


if __name__ == "__main__":
    main()
