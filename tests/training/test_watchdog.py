"""A rank where nothing moves ends itself and says why: real ranks, of which one goes to sleep or is stopped."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmscale.phases import describe, phase, take_spent_s
from llmscale.training.watchdog import EXIT_CODE, forget, last_words
from tests.training.ranks import STALL_TIMEOUT_S

ROOT = Path(__file__).parents[2]
DEADLINE_S = 120


@pytest.fixture
def ended(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path, list[subprocess.Popen]]]:
    """How rank 1 came to a halt, the folder, and the ranks, of which rank 0 has ended."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.ranks", str(tmp_path), request.param],
            cwd=ROOT,
            env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=(tmp_path / f"log-{rank}").open("w"),
        )
        for rank in range(2)
    ]
    try:
        ranks[0].wait(DEADLINE_S)
        yield request.param, tmp_path, ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.mark.parametrize("ended", ["asleep", "stopped"], indirect=True)
def test_a_rank_that_waits_for_ever_says_for_whom_and_ends(ended: tuple[str, Path, list[subprocess.Popen]]):
    how, folder, ranks = ended
    assert ranks[0].returncode == EXIT_CODE
    log = (folder / "log-0").read_text()
    first = next(line for line in log.splitlines() if "nothing has moved" in line)
    seconds = re.search(r"trainer 0: nothing has moved for (\d+) s \(cluster.stall_timeout_s\)", first)
    assert seconds and float(seconds[1]) >= STALL_TIMEOUT_S
    assert "step 3: step > backward > all_reduce (count/tokens, num_tokens), for" in first
    assert re.search(rf"; trainer 1 \(pid {ranks[1].pid} on \S+\) .*was in .*step 3: data, for", first), first
    assert how == "asleep" or "has been silent for" in first
    assert "ranks.py" in log and "all_reduce" in log.partition("Where each thread stands")[2]  # the stacks
    assert (folder / "report-0").read_text() == first
    assert "trainer 0: nothing has moved" in last_words(folder, 2)
    if how == "asleep":
        assert ranks[1].wait(DEADLINE_S) == EXIT_CODE  # it gives up as well
        assert "trainer 1: nothing has moved" in (folder / "log-1").read_text()
        assert "step 3: data, for" in last_words(folder, 2)
    forget(folder)
    assert last_words(folder, 2) == ""


@pytest.mark.parametrize("ended", ["killed"], indirect=True)
def test_a_dead_rank_ends_its_peer_at_once(ended: tuple[str, Path, list[subprocess.Popen]]):
    _, folder, ranks = ended
    assert ranks[0].returncode == 1 and ranks[1].wait(DEADLINE_S) == -signal.SIGKILL
    last = "llmscale.errors.WorkerLostError: trainer 0: lost contact with the other ranks: "
    assert last in (folder / "log-0").read_text() and not (folder / "report-0").exists()


def test_a_rank_that_was_stopped_for_a_while_goes_on(tmp_path: Path):
    """SIGSTOP of everything and SIGCONT, as a debugger or a laptop's lid does: the time in between is not its own."""
    code = f"""
import time
from pathlib import Path
from llmscale.distributed import World
from llmscale.phases import phase
from llmscale.training.watchdog import Watchdog

with Watchdog("trainer", World(0, 1, 0), Path({str(tmp_path)!r}), 2.0, step=lambda: 0, report=print):
    with phase("data"):
        print("up", flush=True)
        input()
print("done")
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **pipes)
    try:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(3)  # the thing itself: longer than the limit
        process.send_signal(signal.SIGCONT)
        out, err = process.communicate("\n", timeout=DEADLINE_S)
        assert (process.returncode, out) == (0, "done\n"), err
    finally:
        process.kill()
        process.wait()


def test_phases_nest_by_thread_and_are_timed():
    take_spent_s()
    inside, leave = threading.Event(), threading.Event()

    def elsewhere() -> None:
        with phase("save"):
            inside.set()
            leave.wait(DEADLINE_S)

    thread = threading.Thread(target=elsewhere)
    with phase("step"):
        thread.start()
        inside.wait(DEADLINE_S)
        with phase("all_reduce", ["a", "b"]):
            assert re.fullmatch(r"step > all_reduce \(a, b\), for 0 s; save, for \d+ s", describe())
    leave.set()
    thread.join()
    with phase("step"):
        pass
    assert describe() == ""
    spent = take_spent_s()
    assert spent.keys() == {"step", "step/all_reduce", "save"} and spent["step"] >= spent["step/all_reduce"] > 0
    assert take_spent_s() == {}


def test_a_phase_that_raises_is_left():
    with pytest.raises(ValueError), phase("step"), phase("forward"):
        raise ValueError
    assert describe() == ""
