"""What older samples do to learning: GRPO on the demo's SFT model with bounds 0, 1 and 4, over seeds; writes
docs/staleness_effect.md.

    python -m tests.bench.staleness_effect --seeds 0 1 2 3 4 --folder FOLDER

FOLDER/runs/demo/sft is the SFT model, as `make demo` leaves it. In one process samples are exactly as old as the bound allows.
Finished runs are not run again.
"""

from __future__ import annotations

import argparse
import datetime
import os
from pathlib import Path
from statistics import mean, stdev

from tests.bench.grpo_effect import COMMAND, ROOT, run

SETTINGS = {  # what is compared, and with what
    "bound 0": "",
    "bound 1, no correction": "training.max_staleness=1 algorithm.correction=none",
    "bound 1": "training.max_staleness=1",
    "bound 4, no correction": "training.max_staleness=4 algorithm.correction=none",
    "bound 4": "training.max_staleness=4",
}
T_975 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
)  # quantiles of Student's t, by degrees of freedom
COMPARED = [("bound 1", "bound 0"), ("bound 4", "bound 0"), ("bound 4", "bound 1, no correction")]


def interval(values: list[float]) -> str:
    """Mean and half of the 95% interval by Student's t, ddof 1: seeds are few."""
    half = T_975[len(values) - 2] * stdev(values) / len(values) ** 0.5
    return f"{mean(values):+.1f} ± {half:.1f}"


def report(scores: dict[str, dict[int, float]], before: float, steps: int) -> str:
    seeds = list(scores["bound 0"])
    lines = [
        "# What older samples do to learning on the demo",
        "",
        f"`python -m tests.bench.staleness_effect` on {datetime.date.today()}; {os.cpu_count()} cores, no GPU. Each run was",
        "",
        f"    llmscale {COMMAND} \\",
        f"        training.num_steps={steps} run.seed=SEED training.max_staleness=BOUND",
        "",
        "from the same SFT model (seed 0), in one process, where samples are exactly as old as the bound allows. Percent of",
        "256 held-out words that are sorted without a mistake after the last step, sampled at temperature 1. The SFT",
        f"model, the control: {before:.1f}. The correction is the default, truncated importance weights, unless it says none.",
        "",
        "| | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean |",
        "|---|" + "---|" * (len(seeds) + 1),
    ]
    for name, row in scores.items():
        lines.append(f"| {name} | " + " | ".join(f"{v:.1f}" for v in row.values()) + f" | {mean(row.values()):.1f} |")
    lines += ["", "Differences paired by seed, in points, with the 95% interval over seeds (Student's t, ddof 1):", ""]
    for one, other in COMPARED:
        differences = [scores[one][seed] - scores[other][seed] for seed in seeds]
        lines.append(f"- {one} against {other}: {interval(differences)}")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--folder", type=Path, default=ROOT)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    command = f"{COMMAND} training.num_steps={arguments.steps}"
    curves = {
        name: {s: run(f"{command} {more}", f"stale-{i}-", s, arguments.folder)[0] for s in arguments.seeds}
        for i, (name, more) in enumerate(SETTINGS.items())
    }
    scores = {name: {s: curve[max(curve)] for s, curve in found.items()} for name, found in curves.items()}
    before = mean(curve[0] for curve in curves["bound 0"].values())
    (ROOT / "docs" / "staleness_effect.md").write_text(report(scores, before, arguments.steps))


if __name__ == "__main__":
    main()
