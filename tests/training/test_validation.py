"""What evaluations say one after the other."""

from __future__ import annotations

import pytest

from llmscale.config import check
from llmscale.errors import ConfigError
from llmscale.training.config import TrainingConfig
from llmscale.training.guard import Guard
from llmscale.training.loop import Hook, Metrics, train
from llmscale.training.validation import Validation
from tests.training.faulty import OBJECTIVE, batches, engine


def reason_after(losses: list[float], patience: int | None) -> str | None:
    validation = Validation(patience)
    for loss in losses:
        validation.evaluated(loss)
    return validation.ended()


@pytest.mark.parametrize(
    ("losses", "patience", "ends"),
    [
        ([], 1, False),
        ([3.0], 1, False),
        ([3.0, 2.0, 1.0], 1, False),
        ([3.0, 3.0], 1, True),  # as good as the best is not better
        ([3.0, 2.0, 2.5, 1.9], 2, False),
        ([3.0, 2.0, 2.5, 2.1], 2, True),
        ([3.0, 4.0, 5.0, 6.0], None, False),
    ],
)
def test_a_run_ends_after_so_many_evaluations_without_a_new_best(losses: list[float], patience: int | None, ends: bool):
    why = reason_after(losses, patience)
    assert (why is not None) == ends
    if why:
        assert f"{patience} evaluations" in why and str(min(losses)).rstrip("0").rstrip(".") in why


def test_the_gap_is_to_the_mean_training_loss_since_the_last_evaluation():
    validation = Validation(None)
    assert validation.evaluated(3.0) == {}
    for loss in (1.0, 2.0, 6.0):
        validation.trained(loss)
    assert validation.evaluated(3.5) == {"eval/gap": 0.5}
    validation.trained(2.0)
    assert validation.evaluated(3.0) == {"eval/gap": 1.0}


@pytest.mark.parametrize("cut", range(6))
def test_a_restart_forgets_nothing(cut: int):
    def go_on(validation: Validation, losses: list[float]) -> list[dict[str, float]]:
        said = []
        for loss in losses:
            validation.trained(loss + 0.25)
            validation.trained(loss)
            said.append(validation.evaluated(loss))
            validation.trained(loss - 0.5)
        return said

    losses = [3.0, 2.0, 2.5, 2.25, 2.125, 2.5]
    whole, first, second = Validation(3), Validation(3), Validation(3)
    said = go_on(whole, losses)
    before = go_on(first, losses[:cut])
    second.load_state_dict(first.state_dict())
    assert before + go_on(second, losses[cut:]) == said
    assert second.ended() == whole.ended() is not None


def test_the_loop_ends_there_and_the_last_hooks_run():
    """Evaluations at 2, 4, 6 and 8 of 20 steps; the best is that of 4."""
    trained, validation = engine(20), Validation(2)
    saved: list[int] = []
    losses = {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.25}

    def evaluate(step: int, metrics: Metrics) -> None:
        metrics |= validation.evaluated(losses[step])

    hooks = [Hook(2, evaluate), Hook(100, lambda step, metrics: saved.append(step))]
    train(trained, OBJECTIVE, batches({}), 20, hooks, Guard(TrainingConfig()), ended=validation.ended)
    assert trained.num_steps == 8 and saved == [8]
    # Started again, it has nothing to do.
    train(trained, OBJECTIVE, batches({}), 20, hooks, Guard(TrainingConfig()), ended=validation.ended)
    assert trained.num_steps == 8 and saved == [8]


@pytest.mark.parametrize(
    ("field", "value"),
    [("early_stopping_evals", 0), ("max_skipped_steps", -1), ("max_rollbacks", -1), ("spike_threshold", 0.0)],
)
def test_impossible_settings_are_refused(field: str, value: float):
    with pytest.raises(ConfigError) as caught:
        check(TrainingConfig(**{field: value}))
    assert caught.value.where == field
