"""Being asked to stop: what a signal does when, and what the loop does then."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llmscale.errors import Requeue
from llmscale.training import stop
from llmscale.training.config import TrainingConfig
from llmscale.training.guard import Guard
from llmscale.training.loop import Hook, train
from llmscale.training.stop import SAME_S, StopRequest, StopSignals
from tests.training.faulty import OBJECTIVE, batches, engine


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stop, "time", clock)
    return clock


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[StopSignals]:
    """Fresh signals of this process, with the handlers installed."""
    before = {number: signal.getsignal(number) for number in stop.SIGNALS}
    fresh = StopSignals()
    monkeypatch.setattr(stop, "signals", fresh)
    fresh.install()
    yield fresh
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", stop.SIGNALS)
def test_a_signal_before_training_ends_at_once(own: StopSignals, number: signal.Signals):
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)
    assert own.received == number.name
    with pytest.raises(KeyboardInterrupt), own.deferred():
        pytest.fail("training began")


@pytest.mark.parametrize("number", stop.SIGNALS)
def test_a_signal_while_training_is_noted(own: StopSignals, number: signal.Signals, tmp_path: Path, capfd):
    with own.deferred(tmp_path / "stop"):
        os.kill(os.getpid(), number)
        assert own.received == number.name
        assert (tmp_path / "stop").exists()
    assert f"{number.name}: saving after this step" in capfd.readouterr().err


def test_a_second_signal_ends_at_once_unless_it_is_the_same_request(own: StopSignals, clock: Clock):
    with own.deferred():
        os.kill(os.getpid(), signal.SIGUSR1)
        clock.now += SAME_S - 0.1
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun passes on what Slurm has sent to every process
        assert own.received == "SIGUSR1"
        clock.now += 0.2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_ctrl_c_is_left_as_it_is(own: StopSignals):
    with pytest.raises(KeyboardInterrupt), own.deferred():
        os.kill(os.getpid(), signal.SIGINT)
    assert own.received is None


def test_a_file_asks_too_but_only_rank_0_looks_for_it(own: StopSignals, clock: Clock, tmp_path: Path):
    main, other = StopRequest(tmp_path, is_main=True), StopRequest(tmp_path, is_main=False)
    assert not main() and not other()
    (tmp_path / stop.FILE).touch()
    assert not main()  # it has just looked
    clock.now += 1
    assert main() and not other()
    own.received = "SIGTERM"
    assert other()


@pytest.mark.parametrize(("at", "saves"), [(3, [2, 3]), (4, [2, 4]), (7, [2, 4, 6, 7])])
def test_the_loop_saves_at_the_boundary_once_and_leaves(at: int, saves: list[int], tmp_path: Path):
    saved: list[int] = []
    evaluated: list[int] = []
    trained = engine(7)

    def save(step: int, _: object) -> None:
        saved.append(step)
        trained.snapshot()(tmp_path)

    hooks = [Hook(5, lambda step, metrics: evaluated.append(step)), Hook(2, save, before_stop=True)]

    def go(until: int) -> None:
        asked = lambda: trained.num_steps == until  # noqa: E731
        train(trained, OBJECTIVE, batches({}), 7, hooks, Guard(TrainingConfig()), stop_asked=asked)

    with pytest.raises(Requeue, match=f"saved at step {at}; the same command resumes") as caught:
        go(at)
    assert caught.value.exit_code == 75
    assert saved == saves and trained.num_steps == at
    assert evaluated == [s for s in (5, 7) if s <= at]  # to be asked to stop is not the end: no evaluation for it

    whole = engine(7)
    train(whole, OBJECTIVE, batches({}), 7, [], Guard(TrainingConfig()))
    trained = engine(7)
    trained.load(tmp_path)
    go(until=100)
    for a, b in zip(whole.model.parameters(), trained.model.parameters(), strict=True):
        assert torch.equal(a, b)
