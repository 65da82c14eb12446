"""What an adapter reaches against training every weight, over seeds: writes docs/lora_effect.md.

    python -m tests.bench.lora_effect --seeds 0 1 2 --folder FOLDER

FOLDER/runs/demo/sft is the SFT model, as `make demo` leaves it. All three runs of a seed have the same prompts in the same
order, and the same random numbers for sampling; what is finished already is not run again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
from pathlib import Path
from statistics import mean, stdev

from tests.bench.grpo_effect import COMMAND, ROOT, run

ADAPTER = "model.adapter=lora"
RUNS = {  # name of the run -> column, command
    "full": ("every weight", COMMAND),
    "same": (f"`{ADAPTER}`", f"{COMMAND} {ADAPTER}"),
    "lora": ("`experiment=lora`", COMMAND.replace("experiment=grpo", "experiment=lora")),
}
Curves = dict[str, list[dict[int, float]]]  # name of the run -> of each seed, score by step


def checkpoint_bytes(folder: Path, name: str, seed: int) -> int:
    newest = folder / "runs" / f"{name}{seed}" / "rlhf" / "checkpoints" / "latest" / "policy"
    return sum(file.stat().st_size for file in newest.iterdir())


def plan(folder: Path, name: str, seed: int) -> dict[str, int]:
    lines = (folder / "runs" / f"{name}{seed}" / "rlhf" / "events.jsonl").read_text().splitlines()
    return next(event for event in map(json.loads, lines) if event["kind"] == "plan")


def report(curves: Curves, sizes: dict[str, str]) -> str:
    lines = [
        "# What an adapter reaches against training every weight",
        "",
        f"`python -m tests.bench.lora_effect` on {datetime.date.today()}; {os.cpu_count()} CPU cores, no GPU. GRPO on the",
        "demo's task with its rule as the reward, all from the same SFT model:",
        "",
        f"    llmscale {COMMAND} run.seed=SEED",
        "",
        f"as it is, with `{ADAPTER}` and nothing else changed, and with `experiment=lora` in place of",
        "`experiment=grpo`, which is an adapter with the higher learning rate that it takes. Percent of 256 held-out words",
        "that are sorted without a mistake, sampled at temperature 1: mean and standard deviation (ddof 1) over",
        f"{len(curves['full'])} seeds. Step 0 is the SFT model, the control. A seed is the same prompts and random numbers in",
        "every column.",
        "",
        "| step | " + " | ".join(column for column, _ in RUNS.values()) + " |",
        "|---|" + "---|" * len(RUNS),
    ]
    for step in curves["full"][0]:
        cells = [[curve[step] for curve in curves[name]] for name in RUNS]
        lines.append(f"| {step} | " + " | ".join(f"{mean(c):.1f} ± {stdev(c):.1f}" for c in cells) + " |")
    lines += ["| trained weights; policy in a checkpoint | " + " | ".join(sizes[name] for name in RUNS) + " |", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="two or more")
    parser.add_argument("--folder", type=Path, default=ROOT)
    arguments = parser.parse_args()
    curves: Curves = {name: [] for name in RUNS}
    for seed in arguments.seeds:
        for name, (_, command) in RUNS.items():
            curves[name].append(run(command, name, seed, arguments.folder)[0])
    sizes = {}
    for name in RUNS:
        trained = plan(arguments.folder, name, arguments.seeds[0])["trained_parameters"]
        size = checkpoint_bytes(arguments.folder, name, arguments.seeds[0])
        sizes[name] = f"{trained:,}; {size / 1e6:.1f} MB"
    (ROOT / "docs" / "lora_effect.md").write_text(report(curves, sizes))


if __name__ == "__main__":
    main()
