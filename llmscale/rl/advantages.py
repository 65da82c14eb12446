"""From rewards to advantages, as pure functions. Legend: B rows, T tokens.

Only tokens that the policy produced (mask 1) exist for these recursions: prompt, tool and user tokens between its turns
are stepped over, so their values and rewards change nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmscale.functional import masked_mean, masked_var


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) -> (advantages, returns), all [B, T].

    rewards: for producing each token. values: of the state *before* each token. mask: 1 on the policy's own tokens;
    what follows the last of them is terminal (value 0). Where mask is 0 both results are 0.
    """
    mask = mask.bool()
    advantages = torch.zeros_like(rewards)
    next_value = rewards.new_zeros(len(rewards))
    next_advantage = rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        own = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(own, delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(own, values[:, t], next_value)
        advantages[:, t] = torch.where(own, next_advantage, advantages[:, t])
    returns = torch.where(mask, advantages + values, torch.zeros_like(values))
    return advantages, returns


def whiten(values: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """Mean 0 and deviation 1 (ddof 0) over the masked tokens of the whole step; 0 elsewhere."""
    scaled = (values - masked_mean(values, mask)) * (masked_var(values, mask) + eps).rsqrt()
    return torch.where(mask.bool(), scaled, torch.zeros_like(scaled))
