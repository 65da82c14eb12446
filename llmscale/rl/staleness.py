"""How old a sample may be when it is trained on, in updates of the policy: one rule for synchronous and asynchronous training.

With bound k, at most (k + 1) x `per_step` draws are begun and not yet trained or dropped, and every step takes the oldest ones.
A draw that is begun after u updates has fewer than (k + 1) x `per_step` older ones before it, and each step takes at least
`per_step`, so it is trained by step u + k: k updates at most lie between its oldest token and its use. k = 0 is synchronous
training: everything is sampled with the weights that are trained. With k = 1 a whole step of samples is under way while the
policy is updated, so that neither waits for the other where both take equally long; a larger k evens out what differs
from step to step. Compare AReaL (Fu et al. 2025, arXiv:2505.24298, section 5.1), which bounds what is begun by the same number,
but takes what is ready.

Taking the oldest is no loss: with as many draws under way as the bound allows, exactly `per_step` of them have to be trained
now. And which draws a step trains depends on nothing but counts, however fast any worker is: short samples are not preferred.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from llmscale.batch import Trajectory
from llmscale.errors import WeightMismatchError


def room(bound: int, per_step: int, steps_left: int, under_way: int) -> int:
    """How many draws to begin; `under_way`: those that are begun, with those taken that this step is going to train.
    `steps_left` counts this one: nothing is sampled that no step would take."""
    return max(0, min(bound + 1, steps_left) * per_step - under_way)


def staleness(trajectories: Sequence[Trajectory], updates: Mapping[int, int], now: int) -> np.ndarray:
    """int64 [N]: of each sample's oldest token, how many updates were done since. `updates`: how many were done when a version
    of the weights was published; `now`: how many are done. A sample without a token of the policy's has none: 0."""
    own = [t.weight_versions[t.loss_mask] for t in trajectories]
    before = min(updates.values(), default=now) - 1  # of versions that are forgotten, for they are too old
    oldest = [min((updates.get(v, before) for v in set(o.tolist())), default=now) for o in own]
    return now - np.array(oldest, dtype=np.int64)


def age_metrics(ages: Mapping[int, int]) -> dict[str, float]:
    """`ages`: the staleness of each draw."""
    found = list(ages.values())
    return {"rollout/staleness": float(np.mean(found)), "rollout/staleness_max": float(np.max(found))}


def continued_share(trajectories: Sequence[Trajectory]) -> float:
    """Of the samples, how many were broken off for new weights and went on with these."""
    return float(np.mean([len(np.unique(t.weight_versions[t.loss_mask])) > 1 for t in trajectories]))


def check_staleness(trajectories: Sequence[Trajectory], ages: np.ndarray, bound: int) -> None:
    """Raises: WeightMismatchError for a sample that is older than the bound; by the rule above there is none."""
    if len(ages) and ages.max() > bound:
        oldest = trajectories[int(ages.argmax())]
        raise WeightMismatchError(
            f"a sample was made {ages.max()} updates ago, the bound is {bound}",
            where=f"draw {oldest.draw_id}, sample {oldest.sample_index}",
            fix="Report this with the run's events.jsonl. Nothing was trained on it; the same command resumes.",
        )
