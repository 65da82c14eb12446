"""Saving in the background: training goes on, nothing is lost, and the end of the program waits."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmscale.checkpoint.background import AsyncSaver
from llmscale.checkpoint.commit import CheckpointStore
from llmscale.checkpoint.manifest import Checkpoint
from llmscale.errors import CheckpointError

ROOT = Path(__file__).parents[2]
DEADLINE_S = 60


class Engine:
    """Its state is a number. Writing a copy of it takes until it is let go."""

    def __init__(self) -> None:
        self.value, self.let_go, self.writing = 0, threading.Event(), threading.Event()
        self.on_snapshot: Callable[[], None] = lambda: None

    def snapshot(self) -> Callable[[Path], None]:
        self.on_snapshot()
        copy = self.value

        def write(directory: Path) -> None:
            self.writing.set()
            assert self.let_go.wait(DEADLINE_S)
            (directory / "value").write_text(str(copy))

        return write


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.let_go.set()


def newest(directory: Path) -> tuple[int, str] | None:
    found = CheckpointStore(directory).newest_valid()
    return (found.step, (found.path / "value").read_text()) if found else None


def test_training_goes_on_and_the_copy_is_of_its_moment(tmp_path: Path, engine: Engine):
    saver = AsyncSaver(CheckpointStore(tmp_path))
    engine.value = 1
    assert saver.save(10, engine.snapshot) is None
    assert engine.writing.wait(DEADLINE_S)
    engine.value = 2  # the next step changes the state while the copy is written
    assert newest(tmp_path) is None
    engine.let_go.set()
    saved = saver.wait()
    assert saved is not None and (saved.step, saved.path) == (10, tmp_path / "step-000010") and saved.seconds > 0
    assert newest(tmp_path) == (10, "1")
    assert saver.wait() is None


def test_the_next_copy_is_made_when_the_save_before_has_ended(tmp_path: Path, engine: Engine):
    saver = AsyncSaver(CheckpointStore(tmp_path))
    engine.let_go.set()
    saver.save(10, engine.snapshot, score=0.5)
    engine.on_snapshot = lambda: ended.append(newest(tmp_path))
    ended: list[tuple[int, str] | None] = []
    before = saver.save(20, engine.snapshot)
    assert before is not None and before.step == 10
    assert ended == [(10, "0")]
    saver.wait()
    assert newest(tmp_path) == (20, "0")


@pytest.mark.parametrize("next_call", ["save", "wait", "leave"])
def test_an_error_is_raised_once_at_the_next_call(tmp_path: Path, engine: Engine, next_call: str):
    def fail() -> Callable[[Path], None]:
        def write(directory: Path) -> None:
            raise OSError(28, "No space left on device")

        return write

    store = CheckpointStore(tmp_path)
    saver = AsyncSaver(store)
    engine.let_go.set()
    saver.save(10, engine.snapshot)
    saver.save(20, fail)
    copies: list[int] = []
    engine.on_snapshot = lambda: copies.append(1)
    with pytest.raises(CheckpointError, match=r"checkpoint of step 20: .*No space left on device"):
        if next_call == "save":
            saver.save(30, engine.snapshot)
        elif next_call == "wait":
            saver.wait()
        else:
            with saver:
                pass
    assert copies == []
    assert saver.wait() is None
    assert newest(tmp_path) == (10, "0")
    saver.save(40, engine.snapshot)
    saver.wait()
    assert newest(tmp_path) == (40, "0")


def test_an_error_beside_another_one_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("x")
    with pytest.raises(KeyboardInterrupt), AsyncSaver(CheckpointStore(tmp_path / "file" / "checkpoints")) as saver:
        saver.save(10, lambda: lambda directory: None)
        raise KeyboardInterrupt
    assert "error: " in (told := capsys.readouterr().err) and "step 10" in told


def test_an_interrupt_while_it_waits_loses_nothing(tmp_path: Path, engine: Engine):
    saver = AsyncSaver(CheckpointStore(tmp_path))
    saver.save(10, engine.snapshot)
    main = threading.main_thread().ident
    assert main is not None
    interrupting = threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT))
    interrupting.start()
    with pytest.raises(KeyboardInterrupt):
        saver.wait()
    engine.let_go.set()
    saved = saver.wait()
    assert saved is not None and saved.path.exists()


# ---------------------------------------------------------------- the end of the program

PROGRAM = """
import os, sys, threading
from pathlib import Path
from llmscale.checkpoint.background import AsyncSaver
from llmscale.checkpoint.commit import CheckpointStore

directory, how = Path(sys.argv[1]), sys.argv[2]
writing = threading.Event()

def write(partial):
    writing.set()
    threading.main_thread().join(5 if how == "_exit" else None)  # the program ends first
    if how == "failing":
        raise OSError(28, "No space left on device")
    for i in range(20):
        (partial / f"part{i}").write_bytes(bytes(100_000))

saver = AsyncSaver(CheckpointStore(directory))
saver.save(10, lambda: write)
writing.wait()
if how == "_exit":
    os._exit(3)
sys.exit(3)
"""


def ended(directory: Path, how: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, str(directory), how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 3
    return done


def test_a_program_that_ends_waits_for_its_save(tmp_path: Path):
    assert ended(tmp_path, "exit").stderr == ""
    assert CheckpointStore(tmp_path).newest_valid() == Checkpoint(10, tmp_path / "step-000010")
    assert len(list((tmp_path / "step-000010").glob("part*"))) == 20


def test_a_program_that_ends_tells_that_its_save_failed(tmp_path: Path):
    assert "No space left on device" in ended(tmp_path, "failing").stderr
    assert CheckpointStore(tmp_path).newest_valid() is None


def test_a_program_that_is_gone_leaves_nothing_that_looks_complete(tmp_path: Path):
    ended(tmp_path, "_exit")
    assert CheckpointStore(tmp_path).newest_valid() is None
    assert [path.name for path in tmp_path.iterdir()] == [".tmp-step-000010"]
