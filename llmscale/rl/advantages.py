"""From rewards to advantages, as pure functions. Legend: B rows, T tokens, N samples.

Only tokens that the policy produced (mask 1) exist for recursions over tokens: prompt, tool and user tokens between its
turns are stepped over, so their values and rewards change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def group_relative(rewards: Tensor, group_size: int, normalize_std: bool) -> Tensor:
    """[N] -> [N]: each reward minus the mean of its group, `group_size` samples of one prompt in a row (GRPO: Shao et al.
    2024, section 4.1.2), and divided by their deviation when `normalize_std` (Dr.GRPO leaves it out: Liu et al. 2025).

    The deviation has ddof 1, as in the systems that GRPO's results come from: the group is a sample of what the policy
    could say. Where all rewards of a group are equal the result is exactly 0, whatever rounding does to their mean.
    """
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    equal = groups.amin(1, keepdim=True) == groups.amax(1, keepdim=True)
    if normalize_std and group_size > 1:
        centred = centred / torch.where(equal, torch.ones_like(centred[:, :1]), groups.std(1, keepdim=True))
    return torch.where(equal, torch.zeros_like(centred), centred).flatten()


def leave_one_out(rewards: Tensor, group_size: int) -> Tensor:
    """[N] -> [N]: each reward minus the mean of the *others* of its group (RLOO: Kool et al. 2019; Ahmadian et al. 2024,
    eq. 8), a baseline that leaves the policy gradient unbiased. A sample alone in its group has none to compare with: 0."""
    if group_size == 1:
        return torch.zeros_like(rewards)
    return group_relative(rewards, group_size, normalize_std=False) * (group_size / (group_size - 1))


def by_group(rewards: Tensor, group_sizes: Sequence[int], advantage: Callable[[Tensor, int], Tensor]) -> Tensor:
    """`advantage(rewards, group_size)` of each group by itself: groups differ in size where samples were excluded."""
    return torch.cat([advantage(part, len(part)) for part in rewards.split(list(group_sizes))])


def whiten(values: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """Mean 0 and deviation 1 (ddof 0) over the masked tokens of the whole step; 0 elsewhere."""
    scaled = (values - masked_mean(values, mask)) * (masked_var(values, mask) + eps).rsqrt()
    return torch.where(mask.bool(), scaled, torch.zeros_like(scaled))
