"""What faults cost: GRPO on the demo's SFT model over pools in Ray, quiet and with a fault a minute.

    python -m tests.bench.fault_time --folder FOLDER [--steps 200] [--every 60] [--seeds 0 1]

FOLDER/runs/demo/sft is the SFT model, as `make demo` leaves it. Effective training time: what the quiet run took from its pools
being up to its last step / what the disturbed one took; both give the same metrics and weights. For each seed of the faults
the two run one after the other.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from llmscale.tracking.jsonl import METRICS, read_jsonl
from tests.conftest import ROOT

COMMAND = "rlhf experiment=grpo cluster=laptop tracking.wandb=disabled training.save_every_steps=10"
COLUMNS = ["seed", "quiet, s", "disturbed, s", "effective", "faults", "replaced after, s", "run taken back"]


def run(folder: Path, name: str, *overrides: str) -> tuple[float, list[dict[str, Any]]]:
    """Seconds from the first pools being up to the last step, and the events."""
    argv = [sys.executable, "-m", "llmscale.cli", *COMMAND.split(), f"run.name={name}", *overrides]
    subprocess.run(argv, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, stdout=subprocess.DEVNULL)
    run_dir = folder / "runs" / name / "rlhf"
    events = read_jsonl(run_dir / "events.jsonl")
    up = next(event["time_s"] for event in events if event["kind"] == "pools_up")
    return read_jsonl(run_dir / METRICS)[-1]["time_s"] - up, events


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=float, default=60.0, help="seconds between faults, on average")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the faults")
    arguments = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for seed in arguments.seeds:
        steps = f"training.num_steps={arguments.steps}"
        quiet, _ = run(arguments.folder, f"quiet-{seed}", steps)
        chaos = ["chaos=all", f"chaos.seed={seed}", f"chaos.every_s={arguments.every}", "cluster.max_restarts=50"]
        disturbed, events = run(arguments.folder, f"disturbed-{seed}", steps, *chaos)
        faults = [f"{e['action']} {e['where']}" for e in events if e["kind"] == "chaos"]
        replaced = [f"{e['seconds']:.0f}" for e in events if e["kind"] == "worker_replaced"]
        back = sum(e["kind"] == "resumed" for e in events)
        cells = [
            f"{quiet:.0f}",
            f"{disturbed:.0f}",
            f"{quiet / disturbed:.0%}",
            ", ".join(faults),
            ", ".join(replaced),
            str(back),
        ]
        print(f"| {seed} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
