"""The general form of which PPO, GRPO, RLOO, REINFORCE++, Dr.GRPO, DAPO, GSPO and CISPO are settings (conf/algorithm/).

An algorithm is pure functions of tensors: advantages of the sampled tokens, and the loss of a token. It knows nothing of
engines, ranks or Ray. Legend: N samples of the step = B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from llmscale.batch import Batch
from llmscale.rl.advantages import by_group, gae, group_relative, leave_one_out, whiten
from llmscale.rl.config import Advantage, Average, KLPlace, PolicyGradientConfig, Surrogate
from llmscale.rl.kl import estimate
from llmscale.rl.losses import (
    clipped_surrogate,
    clipped_value_loss,
    importance_weights,
    is_clipped,
    sequence_log_ratio,
    weighted_policy_loss,
)


class PolicyGradient:
    """`max_new_tokens`, of a sample in all its turns, is the constant of loss_average=budget."""

    def __init__(self, config: PolicyGradientConfig, max_new_tokens: int):
        self.config, self.max_new_tokens = config, max_new_tokens

    # ------------------------------------------------ of a whole step

    def advantages(
        self, rewards: Tensor, early: Tensor, kl: Tensor, values: Tensor, mask: Tensor, group_sizes: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Advantages for the policy and returns for a critic, [N, T]; 0 where `mask` is.

        rewards: [N], a group in a row; they come at the last token, but for the part of them that `early` [N, T] has at others,
        which matters where credit is given by token. kl: [N, T], the KL's k1 times its coefficient, which is
        taken off the reward of each token where that is its place (Ouyang et al. 2022, eq. 2). values: [N, T], of the state
        before each token; zeros where there is no critic.
        """
        config = self.config
        if config.kl_place is not KLPlace.reward:
            kl = torch.zeros_like(kl)
        if config.advantage in (Advantage.group_relative, Advantage.leave_one_out):
            compare = leave_one_out
            if config.advantage is Advantage.group_relative:
                compare = partial(group_relative, normalize_std=config.normalize_std)
            relative = by_group(rewards - kl.sum(1), group_sizes, compare)
            advantages = torch.where(mask, relative.unsqueeze(1), torch.zeros_like(kl))
            returns = torch.zeros_like(kl)
        else:
            if config.advantage is Advantage.group_returns:
                rewards = by_group(rewards, group_sizes, partial(group_relative, normalize_std=False))
            lam = config.lam if config.advantage is Advantage.gae else 1.0
            at_last = torch.arange(mask.shape[1]) == last_own(mask).unsqueeze(1)
            late = (rewards - early.sum(1)).unsqueeze(1)
            per_token = torch.where(at_last, late, early) - kl
            advantages, returns = gae(per_token, values, mask, config.gamma, lam)
        return (whiten(advantages, mask) if config.whiten_advantages else advantages), returns

    def importance(self, old_logprobs: Tensor, rollout_logprobs: Tensor) -> Tensor:
        """[N, T]: what each token's policy loss is multiplied by."""
        config = self.config
        if not config.corrects:
            return torch.ones_like(old_logprobs)
        low, high = config.correction_low, config.correction_high
        return importance_weights(old_logprobs, rollout_logprobs, config.correction.name, low, high)

    def learned_from(self, mask: Tensor, finished: Tensor) -> Tensor:
        """[N, T]: the tokens whose loss counts, of the policy's own."""
        return mask & finished.unsqueeze(1) if self.config.mask_unfinished else mask

    # ------------------------------------------------ of a token

    def weight(self, num_tokens: int) -> float:
        """Of each token of a sequence of so many; the sum over an update is divided by `count` of it."""
        average = self.config.loss_average
        by = {Average.sequences: max(num_tokens, 1), Average.budget: self.max_new_tokens}
        return 1.0 / by.get(average, 1)

    def count(self, num_tokens: int) -> float:
        """What one sequence adds to the divisor."""
        return float(num_tokens if self.config.loss_average is Average.tokens else num_tokens > 0)

    def loss(self, policy_logprobs: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each token [B, T], without weight and entropy, and metrics of each token."""
        config, old, advantages = self.config, batch["old_logprobs"], batch["advantages"]
        clip = (config.clip_low, config.clip_high)
        log_ratio = policy_logprobs - old
        if config.surrogate is Surrogate.sequence_clip:
            log_ratio = sequence_log_ratio(log_ratio, batch["loss_mask"], batch["sequence"])
        ratio = log_ratio.exp()
        if config.surrogate is Surrogate.clipped_weight:
            loss = weighted_policy_loss(policy_logprobs, old, advantages, *clip)
        else:
            loss = clipped_surrogate(ratio, advantages, *clip, config.dual_clip)
        loss = loss * batch["importance"]
        if config.kl_place is KLPlace.loss and config.needs_reference:
            kl = estimate(policy_logprobs, batch["ref_logprobs"], config.kl_estimator.name)
            loss = loss + batch["kl_coef"] * kl
        return loss, {"clipfrac": is_clipped(ratio.detach(), advantages, *clip).float()}

    def value_loss(self, values: Tensor, batch: Batch) -> Tensor:
        """Loss of each token's value [B, T]."""
        return clipped_value_loss(values, batch["old_values"], batch["returns"], self.config.value_clip)


def last_own(mask: Tensor) -> Tensor:
    """[N, T] -> [N]: where the last of the policy's own tokens stands."""
    return mask.shape[1] - 1 - mask.int().flip(1).argmax(1)
