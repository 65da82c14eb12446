"""Whether a node can run its part of a job: it is asked before the start, for an hour in the queue is dear and a stack trace
from the midst of a collective names no node. `python -m llmscale.launch.health ATTEMPT GPUS`, once on each node; it exits
with 64 and says what is wrong.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from llmscale.launch.attempts import ATTEMPT

UNHEALTHY = 64
NEEDS = ("torch", "ray", "deepspeed", "transformers")
MIN_FREE_BYTES = 1 << 30  # of the run directory's file system


def problems(attempt: Path, num_gpus: int) -> list[str]:
    found = []
    if not (attempt / ATTEMPT).exists():
        found.append(f"does not see {attempt}: the run directory must be on a file system that all nodes share")
    elif (free := shutil.disk_usage(attempt).free) < MIN_FREE_BYTES:
        found.append(f"only {free} bytes are free at {attempt}")
    if missing := [name for name in NEEDS if find_spec(name) is None]:
        found.append(f"{sys.executable} lacks {', '.join(missing)}: this node has another environment")
    if num_gpus and (seen := _num_gpus()) < num_gpus:
        found.append(f"has {seen} GPUs that answer, {num_gpus} are needed")
    return found


def _num_gpus() -> int:
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return listed.stdout.count("GPU ") if listed.returncode == 0 else 0


def main(arguments: Sequence[str]) -> int:
    attempt, node = Path(arguments[0]), os.environ.get("SLURMD_NODENAME", socket.gethostname())
    found = problems(attempt, int(arguments[1]))
    for what in found:
        print(f"{node}: {what}")
    if not found:
        healthy = attempt / "healthy"
        healthy.mkdir(exist_ok=True)
        (healthy / node).touch()
    return UNHEALTHY if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
