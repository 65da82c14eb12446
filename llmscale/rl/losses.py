"""Policy and value losses per token, unreduced and unmasked: whoever sums them chooses tokens and normaliser."""

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

    All tensors have one shape. `dual_clip` > 1 bounds the loss of negative advantages at -dual_clip * A (Ye et al.
    2020, eq. 5), where a large ratio would otherwise make it unbounded.
    """
    ratio = (policy_logprobs - old_logprobs).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high))
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    return loss


def is_clipped(
    policy_logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """Where clipping removes the gradient: the ratio has left the interval in the advantage's direction."""
    ratio = (policy_logprobs - old_logprobs).exp()
    return ((advantages > 0) & (ratio > 1 + clip_high)) | ((advantages < 0) & (ratio < 1 - clip_low))


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """Squared error, halved: the larger of plain and clipped to within `clip` of the old value (OpenAI's PPO2)."""
    if clip is None:
        return 0.5 * (values - returns).square()
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())
