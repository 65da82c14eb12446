"""Steps that are skipped, rollbacks, and what a restart remembers of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmscale.checkpoint.run_state import RunState
from llmscale.engine.single import SingleEngine
from llmscale.errors import NumericsError
from llmscale.training.config import TrainingConfig
from llmscale.training.guard import MIN_STEPS, WINDOW_STEPS, Guard
from llmscale.training.loop import Hook, Metrics, train
from tests.training.faulty import OBJECTIVE, batches, engine

NUM_STEPS = 12
NAN = math.nan


@dataclass
class Run:
    """A loop with checkpoints; `factors` are the steps at which the loss is multiplied by something."""

    folder: Path
    factors: dict[int, float]
    config: TrainingConfig
    save_every: int = 3
    num_steps: int = NUM_STEPS
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    metrics: dict[int, Metrics] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)

    def train(self, until: int | None = None) -> SingleEngine:
        """From the last checkpoint to the end; `until` ends it there, as a kill would."""
        self.engine = engine(self.num_steps)
        self.guard = Guard(self.config, lambda kind, **details: self.events.append((kind, details)))
        self.state = RunState()
        self.state.register("guard", self.guard)
        self.restore()
        hooks = [
            Hook(1, lambda step, metrics: self.metrics.update({step: metrics})),
            Hook(self.save_every, lambda step, metrics: self.save(step)),
            Hook(1, lambda step, metrics: self.killed(step, until)),
        ]
        of_step = batches(self.factors, self.asked)
        train(self.engine, OBJECTIVE, of_step, self.num_steps, hooks, self.guard, restore=self.restore)
        return self.engine

    def killed(self, step: int, until: int | None) -> None:
        if step == until:
            raise KeyboardInterrupt

    def save(self, step: int) -> None:
        target = self.folder / f"{step:03d}"
        target.mkdir(parents=True, exist_ok=True)
        self.engine.snapshot()(target)
        self.state.snapshot()(target)

    def restore(self) -> int | None:
        saved = sorted(self.folder.glob("*"))
        if not saved:
            return None
        self.engine.load(saved[-1])
        self.state.load(saved[-1])
        return self.engine.num_steps


def assert_same_weights(one: SingleEngine, other: SingleEngine) -> None:
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def straight(steps: list[int], start: SingleEngine | None = None) -> SingleEngine:
    """An engine that takes these steps, and only these."""
    trained = start or engine(NUM_STEPS)
    for step in steps:
        trained.num_steps = step - 1
        trained.step(batches({})(step - 1), OBJECTIVE)
    return trained


def test_a_step_that_is_not_finite_is_skipped_and_its_data_are_used_up(tmp_path: Path):
    run = Run(tmp_path, {4: NAN, 7: math.inf}, TrainingConfig())
    trained = run.train()
    assert_same_weights(trained, straight([s for s in range(1, NUM_STEPS + 1) if s not in (4, 7)]))
    assert run.asked == list(range(NUM_STEPS))  # each step's data once, in order
    assert [(kind, d["step"]) for kind, d in run.events] == [("step_skipped", 4), ("step_skipped", 7)]
    assert "the loss is nan" in run.events[0][1]["why"] and "the loss is inf" in run.events[1][1]["why"]
    assert [s for s, m in run.metrics.items() if m.get("train/skipped")] == [4, 7]
    lr = [m["train/lr"] for m in run.metrics.values()]
    assert lr == [m["train/lr"] for m in _undisturbed(tmp_path / "other").metrics.values()]


def _undisturbed(folder: Path) -> Run:
    run = Run(folder, {}, TrainingConfig())
    run.train()
    return run


def test_more_than_the_budget_goes_back_to_the_last_checkpoint_and_on_past_the_data(tmp_path: Path):
    """Skipped 5, 7 and 8, with two allowed: back to the weights after step 6, on with step 9."""
    run = Run(tmp_path, {5: NAN, 7: NAN, 8: NAN}, TrainingConfig(max_skipped_steps=2))
    trained = run.train()
    # The checkpoint of step 6 has the weights of steps 1-4 and 6 in it. One of step 3 would give others.
    assert_same_weights(trained, straight([1, 2, 3, 4, 6, 9, 10, 11, 12]))
    kind, details = run.events[-1]
    assert kind == "rolled_back" and (details["step"], details["to"]) == (8, 6) and "nan" in details["why"]
    assert run.asked == list(range(NUM_STEPS))


def test_what_was_trained_after_the_checkpoint_is_forgotten(tmp_path: Path):
    run = Run(tmp_path, {9: NAN}, TrainingConfig(max_skipped_steps=0), save_every=5)
    assert_same_weights(run.train(), straight([1, 2, 3, 4, 5, 10, 11, 12]))


def test_after_the_last_rollback_the_run_stops_and_says_what_happened(tmp_path: Path):
    faults = {4: NAN, 8: NAN, 11: NAN}
    run = Run(tmp_path, faults, TrainingConfig(max_skipped_steps=0, max_rollbacks=2))
    with pytest.raises(NumericsError) as caught:
        run.train()
    for part in (
        "step 4: the loss is nan",
        "step 4: rolled back to step 3",
        "step 8: rolled back to step 6",
        "step 11: ",
    ):
        assert part in caught.value.what
    assert caught.value.where == "optim.lr"


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(tmp_path: Path):
    run = Run(tmp_path, {2: NAN, 3: NAN}, TrainingConfig(max_skipped_steps=1), save_every=50)
    with pytest.raises(NumericsError, match=r"step 2: .*step 3: .*no checkpoint"):
        run.train()


def test_a_run_that_starts_with_nan_stops_at_once(tmp_path: Path):
    with pytest.raises(NumericsError, match=r"^optim.lr: step 1: the loss is nan\n"):
        Run(tmp_path, {1: NAN}, TrainingConfig(max_skipped_steps=10)).train()


def test_a_spike_is_skipped(tmp_path: Path):
    """The first one comes too early to be judged, and widens the window for the second."""
    at = MIN_STEPS + 3
    long = {"num_steps": MIN_STEPS + 5, "save_every": 100}
    run = Run(tmp_path / "a", {at: 20.0, 5: 2.0}, TrainingConfig(spike_threshold=8.0), **long)
    run.train()
    assert [(kind, d["step"]) for kind, d in run.events] == [("step_skipped", at)]
    assert "training.spike_threshold" in run.events[0][1]["why"]
    untroubled = Run(tmp_path / "b", {at: 20.0}, TrainingConfig(), **long)
    untroubled.train()
    assert not untroubled.events


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_the_limit_is_mean_plus_k_standard_deviations_of_the_steps_taken(name: str):
    guard = Guard(TrainingConfig(spike_threshold=2.5))
    rng = np.random.default_rng(0)
    series = rng.normal(3.0, 0.5, 300).clip(2.5, 3.5)  # within the limit
    other = {"loss": 1.0, "grad_norm": 1.0}
    for step, value in enumerate(series):
        assert guard.accept(other | {name: value})
        guard.settle(step, other | {name: value})
    last = series[-WINDOW_STEPS:]
    limit = last.mean() + 2.5 * last.std(ddof=1)
    assert guard.accept(other | {name: limit * (1 - 1e-9)})
    assert not guard.accept(other | {name: limit * (1 + 1e-9)})
    assert name.partition("_")[0].replace("grad", "gradient norm") in str(guard.refusal)


def test_skips_of_long_ago_no_longer_count():
    guard = Guard(TrainingConfig(max_skipped_steps=1))
    good, bad = {"loss": 1.0, "grad_norm": 1.0}, {"loss": NAN, "grad_norm": 1.0}

    def settle(step: int, metrics: Metrics) -> bool:
        guard.accept(metrics)
        return guard.settle(step, metrics)

    settle(1, good)
    assert not settle(10, bad)
    assert not settle(10 + WINDOW_STEPS, bad)
    assert settle(10 + 2 * WINDOW_STEPS - 1, bad)


@pytest.mark.parametrize("until", range(1, NUM_STEPS))
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path, until: int):
    """Whenever it is killed: the skips before the checkpoint still count, and so do the rollbacks."""
    faults = {4: NAN, 5: NAN, 9: NAN, 11: NAN}
    config = TrainingConfig(max_skipped_steps=1, max_rollbacks=2)
    whole = Run(tmp_path / "whole", faults, config)
    whole.train()
    assert [d["step"] for kind, d in whole.events if kind == "rolled_back"] == [5, 11]
    killed = Run(tmp_path / "killed", faults, config)
    with pytest.raises(KeyboardInterrupt):
        killed.train(until)
    assert_same_weights(killed.train(), whole.engine)
    assert killed.guard.state_dict() == whole.guard.state_dict()
