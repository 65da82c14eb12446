"""Tensor functions that several rooms share. Legend: B rows, T tokens, V vocabulary.

Masks select with `where`: what stands in a masked slot, NaN included, changes nothing (0 x NaN would be NaN).
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, input_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(x_t | x_<t) of each token of the row itself, [B, T] in fp32; 0 at t = 0, which nothing predicts.

    logits: [B, T, V]; input_ids: [B, T]. `temperature` divides the logits, as it did where the token was sampled.
    """
    shifted = logits[:, :-1].float() / temperature
    targets = input_ids[:, 1:].unsqueeze(-1)
    predicted = shifted.gather(-1, targets).squeeze(-1) - shifted.logsumexp(-1)
    return torch.nn.functional.pad(predicted, (1, 0))


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of the distribution that predicts each token, [B, T]; 0 at t = 0. logits: [B, T, V]."""
    logprobs = torch.log_softmax(logits[:, :-1].float() / temperature, dim=-1)
    return torch.nn.functional.pad(-(logprobs.exp() * logprobs).sum(-1), (1, 0))


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of `values` where `mask` is set."""
    return torch.where(mask.bool(), values, values.new_zeros(())).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` is set; 0 where it is set nowhere."""
    return masked_sum(values, mask) / mask.bool().sum().clamp(min=1)


def masked_var(values: Tensor, mask: Tensor) -> Tensor:
    """Population variance (ddof 0) of `values` where `mask` is set."""
    # Selected before the square, whose derivative would carry a masked NaN into the gradient.
    deviations = torch.where(mask.bool(), values - masked_mean(values, mask), values.new_zeros(()))
    return masked_mean(deviations.square(), mask)
