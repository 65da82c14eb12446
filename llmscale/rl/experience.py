"""From scored trajectories to what an update needs: rewards per token, KL to the reference, advantages, returns.

Legend: B trajectories, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from llmscale.batch import Batch, Trajectory, pad_rows
from llmscale.errors import NumericsError
from llmscale.functional import masked_mean, masked_var
from llmscale.randomness import permutation
from llmscale.rl.kl import estimate


class Algorithm(Protocol):
    """What tells one method from another; pure functions of tensors. See `llmscale.rl.policy_gradient`, the one that there
    is, for shapes."""

    def advantages(
        self, rewards: Tensor, early: Tensor, kl: Tensor, values: Tensor, mask: Tensor, group_sizes: Sequence[int]
    ) -> tuple[Tensor, Tensor]: ...

    def importance(self, old_logprobs: Tensor, rollout_logprobs: Tensor) -> Tensor: ...

    def learned_from(self, mask: Tensor, finished: Tensor) -> Tensor: ...

    def weight(self, num_tokens: int) -> float: ...

    def count(self, num_tokens: int) -> float: ...

    def loss(self, policy_logprobs: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]: ...

    def value_loss(self, values: Tensor, batch: Batch) -> Tensor: ...


@dataclass(frozen=True)
class Scored:
    """A trajectory with its reward, and what each model says of its tokens: float32 [T]; None where there is no such model."""

    trajectory: Trajectory
    reward: float  # of the reward function
    true_reward: float | None  # only watched; None where there is none
    old_logprobs: np.ndarray | None  # the trainer's, before the update; None: the update itself will say
    ref_logprobs: np.ndarray | None
    values: np.ndarray | None  # the critic's, of the state before each token
    parts: Mapping[str, float] = field(default_factory=dict)  # of the reward, before their weights
    why: str = ""  # the reward's own reason
    penalty: float = 0.0  # for its length, 0 or less; added to the reward that is learned from
    # float32 [T]: the part of the reward that is due to a token before the last; None: none
    early: np.ndarray | None = None


@dataclass(frozen=True)
class Experience:
    """One trajectory ready for updates. Arrays are float32 [T] and 0 where the policy did not produce the token."""

    token_ids: np.ndarray  # int64 [T]
    loss_mask: np.ndarray  # bool [T]: what is learned from
    old_logprobs: np.ndarray  # the trainer's, before the update; those of the rollout where the update itself will say
    ref_logprobs: np.ndarray
    old_values: np.ndarray  # the critic's, of the state before each token
    advantages: np.ndarray
    returns: np.ndarray
    importance: np.ndarray  # weight of each token's policy loss, 1 where it was sampled from the trainer's policy
    kl_coef: float = 0.0  # at this step, of a KL in the loss


def build_experience(
    algorithm: Algorithm, scored: Sequence[Scored], kl_coef: float, weights: int | None = None
) -> tuple[list[Experience], dict[str, float]]:
    """Advantages and returns of one step's trajectories, those of one draw in a row, and the step's metrics. `weights`: the
    version that is trained, which rollout and trainer are compared on; None: all samples are of it."""
    trajectories = [s.trajectory for s in scored]
    mask = pad_rows([t.loss_mask for t in trajectories], value=False).bool()
    rollout = _padded([t.rollout_logprobs for t in trajectories], mask)
    old = rollout if scored[0].old_logprobs is None else _padded([s.old_logprobs for s in scored], mask)
    ref = old if scored[0].ref_logprobs is None else _padded([s.ref_logprobs for s in scored], mask)
    zeros = [np.zeros(len(t.token_ids)) for t in trajectories]
    value = _padded([z if s.values is None else s.values for s, z in zip(scored, zeros, strict=True)], mask)
    kl = torch.where(mask, estimate(old, ref, "k1"), torch.zeros_like(old))
    rewards = torch.tensor([s.reward + s.penalty for s in scored], dtype=torch.float32)
    early = _padded([z if s.early is None else s.early for s, z in zip(scored, zeros, strict=True)], mask)
    sizes = [len(group) for group in groups_of(scored)]
    advantages, returns = algorithm.advantages(rewards, early, kl_coef * kl, value, mask, sizes)
    importance = algorithm.importance(old, rollout)
    learned = algorithm.learned_from(mask, torch.tensor([t.finished for t in trajectories]))
    metrics = {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std(correction=0)),
        "reward/equal_groups": sum(not is_informative(g) for g in groups_of(scored)) / len(sizes),
        "rollout/completion_len": float(mask.sum(1).float().mean()),
        "rollout/cut_off": sum(not t.finished for t in trajectories) / len(trajectories),
        "policy/importance": float(masked_mean(importance, mask)),
    }
    if scored[0].old_logprobs is not None:
        difference = logprob_difference(trajectories, [s.old_logprobs for s in scored], weights)
        metrics |= {} if difference is None else {"rollout/logprob_diff": difference}
    if scored[0].ref_logprobs is not None:
        metrics["kl/ref"] = float(kl.sum(1).mean())  # nats per trajectory
    if scored[0].values is not None:
        metrics["value/explained_var"] = explained_variance(value, returns, mask)
    rows = {"old_logprobs": old, "ref_logprobs": ref, "old_values": value}
    rows |= {"advantages": advantages, "returns": returns, "importance": importance}
    experience = []
    for i, trajectory in enumerate(trajectories):
        own = slice(len(trajectory.token_ids))
        arrays = {name: row[i, own].numpy() for name, row in rows.items()}
        experience.append(Experience(trajectory.token_ids, learned[i, own].numpy(), kl_coef=kl_coef, **arrays))
    return experience, metrics


def groups_of(scored: Sequence[Scored]) -> list[list[Scored]]:
    """The samples of each draw, which stand in a row."""
    return [list(group) for _, group in groupby(scored, key=lambda s: s.trajectory.draw_id)]


def is_informative(group: Sequence[Scored]) -> bool:
    """Whether comparing the samples of a draw says anything about its prompt: their rewards are not all equal. Unequal
    lengths alone do not count, as in Yu et al. 2025, eq. 11."""
    return len({s.reward for s in group}) > 1


def overlong_penalty(num_tokens: int, limit: int, share: float, penalty: float) -> float:
    """What is added to the reward of a completion: 0 up to (1 - share) * limit tokens, from there in a straight line to
    -penalty at the limit (Yu et al. 2025, eq. 13)."""
    beyond = num_tokens - (1 - share) * limit
    return -penalty * beyond / (share * limit) if beyond > 0 else 0.0


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 is a perfect critic, 0 no better than a constant."""
    return float(1 - masked_var(returns - values, mask) / masked_var(returns, mask).clamp(min=1e-12))


def logprob_difference(
    trajectories: Sequence[Trajectory], logprobs: Sequence[Any], weights: int | None = None
) -> float | None:
    """Largest |rollout - trainer log-probability| of the policy's own tokens; of those of a version of the weights, where one
    is given. `logprobs`: float32 [T] a trajectory. None: there is no such token."""
    largest = []
    for trajectory, own in zip(trajectories, logprobs, strict=True):
        compared = trajectory.loss_mask
        if weights is not None:
            compared = compared & (trajectory.weight_versions == weights)
        differences = np.abs(trajectory.rollout_logprobs - own)[compared]
        largest += [float(differences.max())] if len(differences) else []
    # Not Python's own, for which a NaN that is not the first is smaller than anything.
    return float(np.max(largest)) if largest else None


def check_on_policy(metrics: dict[str, float], max_logprob_diff: float) -> None:
    """What was sampled must have the probability that the trainer gives it; otherwise the ratio of PPO means nothing.

    Raises: NumericsError when rollout and trainer log-probabilities differ by more than `max_logprob_diff`. Where no token is
    of the weights that are trained, there is nothing to compare.
    """
    difference = metrics.get("rollout/logprob_diff", 0.0)
    if not difference <= max_logprob_diff:
        raise NumericsError(
            f"rollout and trainer log-probabilities differ by {difference:.2e}, more than {max_logprob_diff:.0e}",
            where="rollout.max_logprob_diff",
            fix="Rollout weights or precision differ from the trainer's.",
        )


def check_first_update(approx_kl: float, max_logprob_diff: float) -> None:
    """Before its first update the policy is the one that sampled: its ratio is 1 and its KL (k3, about d^2 / 2) is 0, up
    to fp32's rounding of exp(d) - 1 - d."""
    if not abs(approx_kl) <= max(max_logprob_diff**2, 1e-6):
        raise NumericsError(
            f"the first update starts with KL {approx_kl:.2e} from the policy that sampled",
            where="rollout.max_logprob_diff",
            fix="The trainer's forward and its update disagree on the same weights.",
        )


def minibatches(num: int, size: int, seed: int, step: int, epoch: int) -> list[list[int]]:
    """A permutation of 0..num-1 in parts of `size` (the last may be smaller), keyed by seed, step and epoch alone."""
    order = permutation(seed, "minibatches", epoch, step, size=num).tolist()
    return [order[i : i + size] for i in range(0, num, size)]


def _padded(arrays: Sequence[Any], mask: Tensor) -> Tensor:
    rows = pad_rows([np.asarray(a, dtype=np.float32) for a in arrays], value=0.0)
    return torch.where(mask, rows, torch.zeros_like(rows))
