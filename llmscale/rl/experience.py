"""From scored trajectories to what an update needs: rewards per token, KL to the reference, advantages, returns.

Legend: B trajectories, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from llmscale.batch import Batch, Trajectory, pad_rows
from llmscale.errors import NumericsError
from llmscale.functional import masked_var
from llmscale.randomness import permutation
from llmscale.rl.kl import estimate


class Algorithm(Protocol):
    """What tells one policy-gradient method from another; pure functions of tensors [B, T]."""

    def advantages(self, rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]: ...

    def loss(self, policy_logprobs: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]: ...

    def value_loss(self, values: Tensor, batch: Batch) -> Tensor: ...


@dataclass(frozen=True)
class Scored:
    """A trajectory with its reward, and what each model says of its tokens: float32 [T]."""

    trajectory: Trajectory
    reward: float
    true_reward: float | None  # only watched; None where there is none
    old_logprobs: np.ndarray  # the trainer's, before the update
    ref_logprobs: np.ndarray
    values: np.ndarray  # the critic's, of the state before each token
    parts: Mapping[str, float] = field(default_factory=dict)  # of the reward, before their weights
    why: str = ""  # the reward's own reason


@dataclass(frozen=True)
class Experience:
    """One trajectory ready for updates. Arrays are float32 [T] and 0 where the policy did not produce the token."""

    token_ids: np.ndarray  # int64 [T]
    loss_mask: np.ndarray  # bool [T]
    old_logprobs: np.ndarray  # the trainer's, before the update
    old_values: np.ndarray  # the critic's, of the state before each token
    advantages: np.ndarray
    returns: np.ndarray


def build_experience(
    algorithm: Algorithm, scored: Sequence[Scored], kl_coef: float
) -> tuple[list[Experience], dict[str, float]]:
    """Advantages and returns of one step's trajectories, whitened over all of them, and the step's metrics.

    The reward of a token is -kl_coef * (log policy - log ref) (k1, in the reward: Ouyang et al. 2022, eq. 2); a
    trajectory's own reward is added at its last token.
    """
    trajectories = [s.trajectory for s in scored]
    mask = pad_rows([t.loss_mask for t in trajectories], value=False).bool()
    old = _padded([s.old_logprobs for s in scored], mask)
    ref = _padded([s.ref_logprobs for s in scored], mask)
    value = _padded([s.values for s in scored], mask)
    rollout = _padded([t.rollout_logprobs for t in trajectories], mask)
    kl = torch.where(mask, estimate(old, ref, "k1"), torch.zeros_like(old))
    scores = torch.tensor([s.reward for s in scored], dtype=torch.float32)
    token_rewards = -kl_coef * kl
    last = mask.shape[1] - 1 - mask.int().flip(1).argmax(1)
    token_rewards[torch.arange(len(last)), last] += scores
    advantages, returns = algorithm.advantages(token_rewards, value, mask)
    lengths = mask.sum(1)
    metrics = {
        "reward/mean": float(scores.mean()),
        "reward/std": float(scores.std(correction=0)),
        "kl/ref": float(kl.sum(1).mean()),  # nats per trajectory
        "value/explained_var": explained_variance(value, returns, mask),
        "rollout/completion_len": float(lengths.float().mean()),
        "rollout/cut_off": sum(not t.finished for t in trajectories) / len(trajectories),
        "rollout/logprob_diff": float(torch.where(mask, (rollout - old).abs(), torch.zeros_like(old)).max()),
    }
    experience = [
        Experience(
            t.token_ids,
            t.loss_mask,
            *(rows[i, : len(t.token_ids)].numpy() for rows in (old, value, advantages, returns)),
        )
        for i, t in enumerate(trajectories)
    ]
    return experience, metrics


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 is a perfect critic, 0 no better than a constant."""
    return float(1 - masked_var(returns - values, mask) / masked_var(returns, mask).clamp(min=1e-12))


def check_on_policy(metrics: dict[str, float], max_logprob_diff: float) -> None:
    """What was sampled must have the probability that the trainer gives it; otherwise the ratio of PPO means nothing.

    Raises: NumericsError when rollout and trainer log-probabilities differ by more than `max_logprob_diff`.
    """
    difference = metrics["rollout/logprob_diff"]
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


def _padded(arrays: Sequence[np.ndarray], mask: Tensor) -> Tensor:
    rows = pad_rows([np.asarray(a, dtype=np.float32) for a in arrays], value=0.0)
    return torch.where(mask, rows, torch.zeros_like(rows))
