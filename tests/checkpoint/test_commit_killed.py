"""A committer that is killed: whatever the moment, the last checkpoint or the one before loads afterwards."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llmscale.checkpoint.commit import CheckpointStore, verify

ROOT = Path(__file__).parents[2]
NUM_KILLS = int(os.environ.get("LLMSCALE_TEST_KILLS", "20"))  # at random moments, over all ways

# Saves step after step for ever; says when it begins one, and when that one is done or, in the background, will be.
COMMITTER = """
import sys
from pathlib import Path
from llmscale.checkpoint.background import AsyncSaver
from llmscale.checkpoint.commit import CheckpointStore

def write(directory):
    for name in "abc":
        (directory / name).write_bytes(bytes(300_000))

store, step, way = CheckpointStore(Path(sys.argv[1]), keep=int(sys.argv[2])), int(sys.argv[3]), sys.argv[4]
saver = AsyncSaver(store)
while True:
    step += 1
    print("begin", step, flush=True)
    if way == "background":
        before = saver.save(step, lambda: write)
        if before:
            print("done", before.step, flush=True)
    else:
        store.save(step, write)
        print("done", step, flush=True)
"""


def _die_at_event(number: int) -> None:
    """SIGKILL this process at its `number`-th operation on a file name: open, mkdir, rename, symlink, remove."""
    left = number

    def count(event: str, _: object) -> None:
        nonlocal left
        if event in ("open", "os.mkdir", "os.rename", "os.symlink", "os.remove", "os.rmdir", "os.listdir"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def writer(step: int) -> Callable[[Path], None]:
    def write(partial: Path) -> None:
        (partial / "a").write_text(str(step))

    return write


def _in_child_dying_at(number: int, directory: Path, step: int) -> bool:
    """Save `step` in a forked process that dies at an operation; False when it came to its end before that."""
    child = os.fork()
    if child == 0:
        try:
            _die_at_event(number)
            CheckpointStore(directory).save(step, writer(step))
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # 3.12 warns of a fork beside threads; the child runs none
@pytest.mark.parametrize("again", [False, True], ids=["new-step", "same-step"])
def test_killed_at_every_operation(tmp_path: Path, again: bool):
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        store.save(step, writer(step))
    point, last, killed = 0, 2, True
    while killed:
        point += 1
        step = last if again else last + 1
        killed = _in_child_dying_at(point, tmp_path, step)
        found = CheckpointStore(tmp_path).newest_valid()
        assert found is not None and found.step in (last, step), f"killed at operation {point}"
        assert (found.path / "a").read_text() == str(found.step)
        for checkpoint in CheckpointStore(tmp_path).checkpoints():
            verify(checkpoint)  # no half of one, be it half written or half removed, has the name of a checkpoint
        last = found.step + 1
        store.save(last, writer(last))
        left = {path.name.removeprefix(".replaced-") for path in tmp_path.iterdir()}
        assert left == {f"step-{last:06d}", f"step-{last - 1:06d}", "latest"}
    assert point > 40


@pytest.mark.parametrize("way", ["at once", "background"])
@pytest.mark.parametrize("keep", [1, 2])
def test_killed_at_random_moments(tmp_path: Path, keep: int, way: str):
    moments = random.Random(f"{keep} {way}")
    last = 0
    for trial in range(NUM_KILLS // 4):
        command = [sys.executable, "-c", COMMITTER, str(tmp_path), str(keep), str(last), way]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert child.stdout is not None
        said = [child.stdout.readline()]
        while not said[-1].startswith("done"):
            said.append(child.stdout.readline())
            assert said[-1], "it ended by itself"
        time.sleep(moments.uniform(0, 0.05))
        child.kill()
        said += [line for line in child.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
        child.wait()
        child.stdout.close()
        begun = [int(line.split()[1]) for line in said if line.startswith("begin")]
        done = [int(line.split()[1]) for line in said if line.startswith("done")]
        store = CheckpointStore(tmp_path)
        found = store.newest_valid()
        assert found is not None and done[-1] <= found.step <= begun[-1], f"trial {trial}"
        for checkpoint in store.checkpoints():
            verify(checkpoint)
        last = found.step
