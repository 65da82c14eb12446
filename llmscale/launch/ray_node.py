"""One node's Ray in a job: the head on node 0, a worker elsewhere, each with the roles that may be placed there. `python -m
llmscale.launch.ray_node ATTEMPT HEAD:PORT CPUS RESOURCES ...`, once on each node; it stays until it is told to end, and leaves
ATTEMPT/ray-up/NODE when Ray is up here.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

IS_UP = "will now block"  # what `ray start --block` says when this node is part of the cluster
STOP_S = 10.0


def main(arguments: Sequence[str]) -> int:
    attempt, head, cpus, *resources = arguments
    number = int(os.environ["SLURM_NODEID"])
    port = head.rpartition(":")[2]
    # Of this job alone: two jobs may share a node, and another user's /tmp/ray may not be ours to write to.
    for_all = Path("/tmp/ray")
    for_all.mkdir(exist_ok=True)
    with suppress(PermissionError):  # somebody else's
        for_all.chmod(0o1777)
    folder = for_all / f"{os.getuid()}-{os.environ['SLURM_JOB_ID']}"
    place = ["--head", f"--port={port}", f"--temp-dir={folder}", "--include-dashboard=false"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *(place if number == 0 else [f"--address={head}"])]
    command += [f"--num-cpus={cpus}", f"--resources={resources[number]}", "--disable-usage-stats", "--block"]
    ray = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True
        ray.terminate()

    for asked in (
        signal.SIGUSR1,
        signal.SIGTERM,
        signal.SIGINT,
    ):  # srun passes the first one on and kills at the others
        signal.signal(asked, stop)
    assert ray.stdout is not None
    for line in ray.stdout:
        print(line, end="", flush=True)
        if IS_UP in line:
            (attempt_up := Path(attempt) / "ray-up").mkdir(exist_ok=True)
            (attempt_up / os.environ.get("SLURMD_NODENAME", socket.gethostname())).touch()
    try:
        code = ray.wait(STOP_S)
    except subprocess.TimeoutExpired:
        ray.kill()
        code = ray.wait()
    shutil.rmtree(folder, ignore_errors=True)
    return 0 if stopping else code or 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
