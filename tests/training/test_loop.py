"""The supervised loop: which batches it asks for, when hooks run, and what they are told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmscale.batch import Batch
from llmscale.config import check
from llmscale.engine.config import SingleConfig
from llmscale.engine.single import SingleEngine
from llmscale.errors import ConfigError
from llmscale.objectives.causal_lm import CausalLM
from llmscale.objectives.config import CausalLMConfig
from llmscale.optim.config import OptimConfig
from llmscale.training import loop
from llmscale.training.config import TrainingConfig
from llmscale.training.guard import Guard
from llmscale.training.loop import Hook
from tests.tiny import language_model, token_examples

OBJECTIVE = CausalLM(CausalLMConfig())
NUM_STEPS = 7


def engine() -> SingleEngine:
    return SingleEngine(SingleConfig(), language_model(), OptimConfig(warmup_steps=2), NUM_STEPS)


def train(
    engine: SingleEngine, batches: Callable[[int], list[Batch]], num_steps: int, hooks: list[Hook], **parts
) -> None:
    loop.train(engine, OBJECTIVE, batches, num_steps, hooks, Guard(TrainingConfig()), **parts)


def recording(asked: list[int]) -> Callable[[int], list[Batch]]:
    """Batches of a step, and a note of each step that was asked for."""

    def batches(step: int) -> list[Batch]:
        asked.append(step)
        return [OBJECTIVE.prepare(token_examples([6, 9], seed=step))]

    return batches


def test_every_step_is_asked_for_once_in_order():
    asked: list[int] = []
    trained = engine()
    train(trained, recording(asked), NUM_STEPS, [])
    assert asked == list(range(NUM_STEPS)) and trained.num_steps == NUM_STEPS


@pytest.mark.parametrize(
    ("every", "steps"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6, 7]), (7, [7]), (100, [7]), (2, [2, 4, 6, 7])]
)
def test_hooks_run_when_due_and_at_the_end(every: int, steps: list[int]):
    seen: list[int] = []
    train(engine(), recording([]), NUM_STEPS, [Hook(every, lambda step, metrics: seen.append(step))])
    assert seen == steps


def test_hooks_run_in_order_after_their_step():
    seen: list[tuple[str, int, int]] = []
    trained = engine()
    hooks = [Hook(1, lambda step, m, name=name: seen.append((name, step, trained.num_steps))) for name in "ab"]
    train(trained, recording([]), 2, hooks)
    assert seen == [("a", 1, 1), ("b", 1, 1), ("a", 2, 2), ("b", 2, 2)]


def test_hooks_are_told_the_engines_numbers():
    seen: list[dict[str, float]] = []
    train(engine(), recording([]), 2, [Hook(1, lambda step, metrics: seen.append(dict(metrics)))])
    reference = engine()
    for step, metrics in enumerate(seen):
        expected = reference.step(recording([])(step), OBJECTIVE)
        assert expected.pop("num_tokens") == 15
        for name, value in expected.items():
            assert metrics.pop(f"train/{name}") == value
        assert metrics.pop("perf/tokens_per_s") > 0
        assert metrics.pop("perf/peak_memory_gb") > 0.01
        inside = [metrics.pop(f"timing_s/{name}") for name in ("forward", "backward", "optimizer")]
        assert all(seconds > 0 for seconds in inside) and sum(inside) <= metrics.pop("timing_s/step")
        assert metrics.pop("timing_s/data") >= 0
        assert not metrics


def test_a_resumed_loop_goes_on_where_the_other_stopped(tmp_path: Path):
    whole = engine()
    losses: dict[int, float] = {}
    train(whole, recording([]), NUM_STEPS, [Hook(1, lambda s, m: losses.update({s: m["train/loss"]}))])

    interrupted = engine()
    train(interrupted, recording([]), 3, [Hook(3, lambda s, m: interrupted.snapshot()(tmp_path))])
    asked: list[int] = []
    resumed, again = engine(), {}
    resumed.load(tmp_path)
    train(resumed, recording(asked), NUM_STEPS, [Hook(1, lambda s, m: again.update({s: m["train/loss"]}))])
    assert asked == [3, 4, 5, 6]
    assert again == {step: loss for step, loss in losses.items() if step > 3}
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_finished_run_does_nothing():
    trained = engine()
    trained.num_steps = NUM_STEPS
    asked: list[int] = []
    train(trained, recording(asked), NUM_STEPS, [Hook(1, lambda step, metrics: asked.append(step))])
    assert asked == []


@pytest.mark.parametrize(
    "field", ["num_steps", "global_batch_size", "num_epochs", "save_every_steps", "keep_checkpoints"]
)
def test_impossible_settings_are_refused(field: str):
    check(TrainingConfig())
    with pytest.raises(ConfigError) as caught:
        check(TrainingConfig(**{field: 0}))
    assert caught.value.where == field
