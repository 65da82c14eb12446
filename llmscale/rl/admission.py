"""Which samples of a step are learned from.

A sample without a score teaches nothing and must not pass for one of reward 0. It is left out. Where the algorithm compares the
completions of a prompt (group size above 1), a draw that has lost a sample goes as a whole, so that every group keeps its
size. What a prompt then teaches is along the gradient of its mean reward over the completions that can be scored, neither
towards those that cannot nor away from them (G p^G times it for a leave-one-out baseline, p the probability of one that can).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from llmscale.batch import Trajectory
from llmscale.errors import NumericsError
from llmscale.protocols import Score


@dataclass(frozen=True)
class Excluded:
    """A sample that is not learned from."""

    draw_id: int
    sample_index: int
    why: str


def check_finite(trajectories: Sequence[Trajectory], scores: Sequence[Score]) -> None:
    """Raises: NumericsError naming the first sample whose reward is not a finite number."""
    for trajectory, score in zip(trajectories, scores, strict=True):
        if score.value is not None and not math.isfinite(score.value):
            raise NumericsError(
                f"the reward of {trajectory.completion!r} is {score.value}",
                where=f"draw {trajectory.draw_id}, sample {trajectory.sample_index}",
                fix="A reward must be a finite number for every completion; on_nonfinite=drop leaves such samples out.",
            )


def without_nonfinite(scores: Sequence[Score]) -> list[Score]:
    """The scores, with none in place of one that is not finite."""
    finite = [s.value is None or math.isfinite(s.value) for s in scores]
    return [
        s if ok else replace(s, value=None, why=f"its reward is {s.value}")
        for s, ok in zip(scores, finite, strict=True)
    ]


def unscored(trajectories: Sequence[Trajectory], scores: Sequence[Score]) -> list[Excluded]:
    """The samples without a score."""
    pairs = zip(trajectories, scores, strict=True)
    return [Excluded(t.draw_id, t.sample_index, s.why) for t, s in pairs if s.value is None]


def admitted(trajectories: Sequence[Trajectory], scores: Sequence[Score], *, whole_draws: bool) -> list[int]:
    """Indexes of the samples to learn from, in order. `whole_draws`: a draw that lacks a score goes altogether."""
    excluded = unscored(trajectories, scores)
    ids = {(e.draw_id, e.sample_index) for e in excluded}
    draws = {e.draw_id for e in excluded} if whole_draws else set()
    return [i for i, t in enumerate(trajectories) if (t.draw_id, t.sample_index) not in ids and t.draw_id not in draws]


def check_some_left(num_kept: int, trajectories: Sequence[Trajectory], scores: Sequence[Score]) -> None:
    """Raises: NumericsError when nothing was admitted."""
    if num_kept:
        return
    excluded = unscored(trajectories, scores)
    reasons = list(dict.fromkeys(e.why for e in excluded))
    raise NumericsError(
        f"{len(excluded)} of {len(trajectories)} samples could not be scored, which leaves none to learn from: "
        + "; ".join(reasons[:3]),
        where="reward",
        fix="events.jsonl names each of them with its reason.",
    )


def reward_metrics(scores: Sequence[Score], num_kept: int) -> dict[str, float]:
    """How many samples had no score, how many more went with their draw, and the mean of each part over those scored."""
    without = sum(s.value is None for s in scores)
    counts = {"reward/excluded": without, "reward/excluded_with_group": len(scores) - without - num_kept}
    return {name: float(count) for name, count in counts.items()} | means_of_parts(
        [s for s in scores if s.value is not None]
    )


def means_of_parts(scores: Sequence[Score]) -> dict[str, float]:
    """Mean of each part over the samples that have it."""
    columns: dict[str, list[float]] = {}  # of finite values: a part of weight 0 may be anything
    for score in scores:
        for name, value in score.parts.items():
            if math.isfinite(value):
                columns.setdefault(f"reward/{name}", []).append(value)
    return {name: float(np.mean(values)) for name, values in columns.items()}


def true_metrics(scores: Sequence[Score | None]) -> dict[str, float]:
    """Mean of the true rewards, and how many samples have none; nothing where no true reward is configured."""
    asked = [s.value for s in scores if s is not None]
    values = [v for v in asked if v is not None and math.isfinite(v)]
    mean = {"reward/true": float(np.mean(values))} if values else {}
    return mean | ({"reward/true_excluded": float(len(asked) - len(values))} if asked else {})
