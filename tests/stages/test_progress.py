"""Where nothing moves in the driver. With workers it is in test_lost_roles.py."""

from __future__ import annotations

import subprocess
import sys
import time

from tests.conftest import ROOT

DRIVER = """
import time
from llmscale.phases import phase
from llmscale.stages.progress import ProgressWatch

with ProgressWatch({}, 1.0, lambda text: print(text, flush=True)):
    for _ in range(4):
        with phase("generate"):
            time.sleep(0.6)
    with phase("update"):
        time.sleep(600)
"""


def test_a_driver_that_does_not_move_is_warned_of_and_ended() -> None:
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", DRIVER], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and time.monotonic() - started < 300
    warned, ended = done.stdout.splitlines()
    assert warned.startswith("nothing has moved for 1 s") and "the driver is in update, for 1 s" in warned
    assert ended.startswith("nothing has moved for 2 s (cluster.progress_timeout_s); this run ends;")
