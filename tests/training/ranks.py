"""One of two ranks under a watchdog, as torchrun would start it: `python -m tests.training.ranks FOLDER HOW`. At step 3
rank 1 goes to sleep, is stopped or is killed."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from llmscale import distributed
from llmscale.phases import phase
from llmscale.training.watchdog import FOLDER, Watchdog

STALL_TIMEOUT_S = 3.0


def main(folder: Path, how: str) -> None:
    world = distributed.join(timeout_s=300)
    at = 0

    def report(text: str) -> None:
        (folder / f"report-{world.rank}").write_text(text)

    watchdog = Watchdog("trainer", world, folder, STALL_TIMEOUT_S, step=lambda: at, report=report)
    with distributed.explaining_losses("trainer"), watchdog:
        while True:
            at += 1
            with phase("data"):
                if at == 3 and world.rank == 1:
                    if how == "stopped":
                        while "step 3: data" not in (folder / FOLDER / "rank-00001.json").read_text():
                            time.sleep(0.05)
                        os.kill(os.getpid(), signal.SIGSTOP)
                    if how == "killed":
                        os.kill(os.getpid(), signal.SIGKILL)
                    time.sleep(600)
            with phase("step"), phase("backward"):
                distributed.all_reduce({"num_tokens": 1.0, "count/tokens": 1.0})


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
