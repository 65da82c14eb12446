"""What GRPO with a rule as its reward makes of the demo's SFT model, over seeds: writes docs/grpo_effect.md.

    python -m tests.bench.grpo_effect --seeds 0 1 2 3 4 --folder FOLDER

FOLDER/runs/demo/sft is the SFT model, as `make demo` leaves it. The control is the model before its first step, on the same
held-out words with the same random numbers.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

from llmscale.tracking.jsonl import METRICS, read_jsonl

ROOT = Path(__file__).parents[2]
SCORE = "eval/reward/mean"
COMMAND = "rlhf experiment=grpo cluster=local engine=single tracking.wandb=disabled training.eval_every_steps=10"


def run(command: str, name: str, seed: int, folder: Path) -> tuple[dict[int, float], float]:
    """Held-out score in percent by step, and the seconds that the command took."""
    argv = [sys.executable, "-m", "llmscale.cli", *command.split(), f"run.seed={seed}", f"run.name={name}{seed}"]
    started = time.perf_counter()
    subprocess.run(argv, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    records = read_jsonl(folder / "runs" / f"{name}{seed}" / "rlhf" / METRICS)
    return {r["step"]: 100 * r[SCORE] for r in records if SCORE in r}, time.perf_counter() - started


def report(curves: dict[int, dict[int, float]], seconds: dict[int, float], processors: int) -> str:
    gains = [curve[max(curve)] - curve[0] for curve in curves.values()]
    spread = f" ± {stdev(gains):.1f} (standard deviation over seeds, ddof 1)" if len(gains) > 1 else ""
    lines = [
        "# What GRPO with a rule as its reward is worth on the demo",
        "",
        f"`python -m tests.bench.grpo_effect` on {datetime.date.today()}; {processors} CPU cores, no GPU. Each run was",
        "",
        f"    llmscale {COMMAND} run.seed=SEED",
        "",
        "from the same SFT model (seed 0). Percent of 256 held-out words that are sorted without a mistake, sampled at",
        "temperature 1, by step; step 0 is the SFT model, the control, on the same words with the same random numbers. The",
        "seed changes the prompts, their order and the sampling.",
        "",
        f"Gain at the end: {mean(gains):+.1f} points{spread}; the least is {min(gains):+.1f}.",
        "",
        "| step | " + " | ".join(f"seed {seed}" for seed in curves) + " |",
        "|---|" + "---|" * len(curves),
    ]
    for step in next(iter(curves.values())):
        lines.append(f"| {step} | " + " | ".join(f"{curve[step]:.1f}" for curve in curves.values()) + " |")
    took = ", ".join(f"{s:.0f}" for s in seconds.values())
    return "\n".join([*lines, "", f"Seconds of each command, from its start to its end: {took}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--folder", type=Path, default=ROOT)
    arguments = parser.parse_args()
    found = {seed: run(COMMAND, "grpo", seed, arguments.folder) for seed in arguments.seeds}
    curves, seconds = ({seed: pair[i] for seed, pair in found.items()} for i in (0, 1))
    (ROOT / "docs" / "grpo_effect.md").write_text(report(curves, seconds, os.cpu_count() or 1))


if __name__ == "__main__":
    main()
