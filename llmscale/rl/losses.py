"""Policy and value losses per token, unreduced and unmasked: whoever sums them chooses tokens and normaliser.

Legend: B rows, T tokens, S sequences (which may share rows).
"""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_policy_loss(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Tensor:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7) with its sign turned, so that it is minimised.

    All tensors have one shape. The ratio is clipped to [1 - clip_low, 1 + clip_high]; DAPO raises the upper end alone (Yu et
    al. 2025, eq. 10). `dual_clip` > 1 bounds the loss of negative advantages at -dual_clip * A (Ye et al. 2020, eq. 5), where
    a large ratio would otherwise make it unbounded.
    """
    return clipped_surrogate((policy_logprobs - old_logprobs).exp(), advantages, clip_low, clip_high, dual_clip)


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> Tensor:
    """The same from the ratio itself, which need not be a token's own."""
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high))
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    return loss


def is_clipped(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """Where clipping removes the gradient: the ratio has left the interval in the advantage's direction."""
    return ((advantages > 0) & (ratio > 1 + clip_high)) | ((advantages < 0) & (ratio < 1 - clip_low))


def sequence_log_ratio(log_ratio: Tensor, mask: Tensor, sequence: Tensor) -> Tensor:
    """[B, T] -> [B, T]: on every token the mean of its sequence's log ratios over the tokens that `mask` selects, so that its
    exponential is (p(y) / p_old(y))^(1/|y|) (GSPO: Zheng et al. 2025, eq. 7).

    sequence: int64 [B, T], which of the S sequences a token belongs to.
    """
    mask, index = mask.bool().flatten(), sequence.flatten()
    num = int(index.max()) + 1 if index.numel() else 1
    own = torch.where(mask, log_ratio.flatten(), log_ratio.new_zeros(()))
    sums = log_ratio.new_zeros(num).index_add(0, index, own)
    counts = log_ratio.new_zeros(num).index_add(0, index, mask.to(log_ratio.dtype))
    return (sums / counts.clamp(min=1))[index].view_as(log_ratio)


def weighted_policy_loss(
    policy_logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """CISPO (MiniMax 2025, eq. 4-5): REINFORCE weighted by the clipped ratio, which is held constant, so that no token loses
    its gradient by clipping."""
    ratio = (policy_logprobs.detach() - old_logprobs).exp()
    return -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages * policy_logprobs


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """Squared error, halved: the larger of plain and clipped to within `clip` of the old value (OpenAI's PPO2)."""
    if clip is None:
        return 0.5 * (values - returns).square()
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def importance_weights(
    policy_logprobs: Tensor, rollout_logprobs: Tensor, kind: str, low: float = 0.0, high: float = float("inf")
) -> Tensor:
    """Weights that correct for samples drawn from another distribution than the trainer's policy: an engine with its own
    arithmetic, or older weights. [B, T], a sequence a row; a token that is not the policy's own has equal log-probabilities
    (both 0) and so the weight 1. They are constants: no gradient passes.

    kind "truncated": the ratio of each token, clamped to [low, high] (TIS: Ionides 2008). "masked": the ratio where it lies
    within [low, high], else 0. "sequence": the ratio of the whole sequence on each of its tokens, clamped; "sequence_masked":
    the same, and 0 outside. Per token the weights are biased with low variance, per sequence the other way round.
    """
    log_ratio = (policy_logprobs - rollout_logprobs).detach()
    if kind.startswith("sequence"):
        log_ratio = log_ratio.sum(-1, keepdim=True).expand_as(log_ratio)
    ratio = log_ratio.exp()
    if kind in ("truncated", "sequence"):
        return ratio.clamp(low, high)
    if kind in ("masked", "sequence_masked"):
        return torch.where((ratio >= low) & (ratio <= high), ratio, torch.zeros_like(ratio))
    raise ValueError(f"unknown importance weights {kind!r}: truncated, masked, sequence or sequence_masked")
