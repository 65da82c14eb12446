"""PPO with a critic, as InstructGPT used it (Schulman et al. 2017; Ouyang et al. 2022, section 3.5).

An algorithm is two pure functions of tensors: advantages of the sampled tokens, and the loss of a token. It knows
nothing of engines, ranks or Ray. Legend: B rows, T tokens.
"""

from __future__ import annotations

from torch import Tensor

from llmscale.batch import Batch
from llmscale.rl.advantages import gae, whiten
from llmscale.rl.config import PPOConfig
from llmscale.rl.losses import clipped_policy_loss, clipped_value_loss, is_clipped


class PPO:
    def __init__(self, config: PPOConfig):
        self.config = config

    def advantages(self, rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Advantages for the policy and returns for the critic, [B, T], from rewards per token."""
        advantages, returns = gae(rewards, values, mask, self.config.gamma, self.config.lam)
        return (whiten(advantages, mask) if self.config.whiten_advantages else advantages), returns

    def loss(self, policy_logprobs: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each token [B, T], and metrics of each token."""
        old, advantages = batch["old_logprobs"], batch["advantages"]
        clip = (self.config.clip_low, self.config.clip_high)
        clipped = is_clipped(policy_logprobs.detach(), old, advantages, *clip)
        return clipped_policy_loss(policy_logprobs, old, advantages, *clip), {"clipfrac": clipped.float()}

    def value_loss(self, values: Tensor, batch: Batch) -> Tensor:
        """Loss of each token's value [B, T]."""
        return clipped_value_loss(values, batch["old_values"], batch["returns"], self.config.value_clip)
