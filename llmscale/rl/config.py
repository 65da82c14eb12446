"""Reinforcement learning: what turns rewards into an update."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum

from omegaconf import MISSING

from llmscale.config import Problem, at_least, option


class KLPlace(Enum):
    reward = "reward"  # subtracted from the reward of each token
    loss = "loss"  # added to the policy's loss


class KLEstimator(Enum):
    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


@dataclass
class AlgorithmConfig:
    """What the loop round every algorithm knows."""

    name: str = MISSING
    kl_coef: float = 0.05  # weight of the KL to the reference, per nat; 0: no reference model is needed
    kl_target: float | None = None  # nats per sample towards which kl_coef adapts; None: it stays
    kl_horizon: int = 10000  # samples over which kl_coef can change by 20%
    num_epochs: int = 1  # passes over each step's experience
    global_batch_size: int = 64  # sequences of one optimizer step
    entropy_coef: float = 0.0  # weight of an entropy bonus in the policy's loss
    filter_groups: bool = False  # prompts whose samples all get the same reward are replaced by others (DAPO)
    max_draws: int = 4  # with filter_groups: how often a step draws before it goes on with fewer prompts
    overlong_share: float = 0.0  # last share of max_new_tokens (of all turns), 0..1, over which the reward falls (DAPO)
    overlong_penalty: float = 1.0  # by how much, at the limit

    @property
    def needs_critic(self) -> bool:
        return False

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether the trainer's log-probabilities have to be known before the update."""
        return True

    @property
    def corrects(self) -> bool:
        """Whether samples that another distribution than the trainer's drew are weighed."""
        return False

    def chosen_for(self, stale: bool) -> AlgorithmConfig:
        """What is left to be chosen automatically, chosen. `stale`: samples may be of older weights than those trained."""
        return self

    @property
    def needs_groups(self) -> bool:
        """Whether a sample is compared with others of its prompt."""
        return self.filter_groups

    @property
    def needs_advantages(self) -> bool:
        """Whether a sample whose advantages are all 0 has no gradient: an update then leaves it out."""
        return False

    def problems(self) -> Iterator[Problem]:
        yield from at_least(self, kl_coef=0, kl_horizon=1, num_epochs=1, global_batch_size=1, max_draws=1)
        yield from at_least(self, entropy_coef=0, overlong_share=0, overlong_penalty=0)
        if self.overlong_share > 1:
            yield "overlong_share", f"must be at most 1, is {self.overlong_share}", "0.2 is DAPO's."
        if self.kl_target is not None and (self.kl_target <= 0 or self.kl_coef == 0):
            yield "kl_target", "needs a coefficient to adapt and a KL above 0", "Set kl_coef and kl_target above 0."


class Advantage(Enum):
    gae = "gae"  # a critic's (PPO)
    group_relative = "group_relative"  # reward minus the group's mean (GRPO)
    leave_one_out = "leave_one_out"  # reward minus the mean of the group's others (RLOO)
    returns = "returns"  # reward to come, without a critic (REINFORCE++)
    group_returns = "group_returns"  # reward minus the group's mean, then as returns (REINFORCE++ with a baseline)


class Surrogate(Enum):
    clip = "clip"  # PPO's, with the ratio of a token
    sequence_clip = "sequence_clip"  # PPO's, with the mean ratio of its sequence (GSPO)
    clipped_weight = "clipped_weight"  # REINFORCE weighted by the clipped ratio (CISPO)


class Average(Enum):
    tokens = "tokens"  # over all tokens of the update (DAPO, PPO)
    sequences = "sequences"  # over sequences, of the mean over the tokens of each (GRPO, GSPO)
    sums = "sums"  # over sequences, of the sum over the tokens of each (RLOO)
    budget = "budget"  # the same, divided by the most tokens a sample may have: no length is preferred (Dr.GRPO)


class Correction(Enum):
    auto = "auto"  # truncated where samples may be of older weights than those that are trained, else none
    none = "none"
    truncated = "truncated"  # each token by its ratio, at most correction_high (TIS)
    masked = "masked"  # the same, and not at all outside [correction_low, correction_high]
    sequence = "sequence"  # by the ratio of the whole sequence, at most correction_high
    sequence_masked = "sequence_masked"


@option("algorithm", "policy_gradient", builds="llmscale.rl.policy_gradient:PolicyGradient")
@dataclass
class PolicyGradientConfig(AlgorithmConfig):
    """The general form of which PPO, GRPO, RLOO and the others are settings; the defaults are PPO's, as InstructGPT used it."""

    name: str = "policy_gradient"
    method: str = "own"  # what its YAML calls this setting, for records
    advantage: Advantage = Advantage.gae
    gamma: float = 1.0  # discount per token, 0..1, of gae and returns
    lam: float = 0.95  # gae's lambda, 0..1
    normalize_std: bool = True  # group_relative: divide by the deviation of the group's rewards
    whiten_advantages: bool = True  # to mean 0, deviation 1 over the tokens of the step
    surrogate: Surrogate = Surrogate.clip
    clip_low: float = 0.2  # ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = 0.2
    dual_clip: float | None = None  # above 1: bounds the loss of negative advantages at this multiple of them
    value_clip: float | None = 0.2  # a new value moves this far from the old one before its loss is clipped; None: any
    loss_average: Average = Average.tokens
    mask_unfinished: bool = False  # samples cut off at the length limit are not learned from (DAPO)
    kl_place: KLPlace = KLPlace.reward
    kl_estimator: KLEstimator = KLEstimator.k1  # k1 in the reward; k2 or k3 as a loss
    correction: Correction = Correction.auto  # of samples that another distribution than the trainer's drew
    correction_low: float = 0.0
    correction_high: float = 2.0

    @property
    def needs_critic(self) -> bool:
        return self.advantage is Advantage.gae

    @property
    def needs_old_logprobs(self) -> bool:
        in_reward = self.kl_place is KLPlace.reward and self.needs_reference
        return in_reward or self.corrects

    @property
    def corrects(self) -> bool:
        return self.correction not in (Correction.auto, Correction.none)

    def chosen_for(self, stale: bool) -> PolicyGradientConfig:
        if self.correction is not Correction.auto:
            return self
        return replace(self, correction=Correction.truncated if stale else Correction.none)

    @property
    def needs_groups(self) -> bool:
        grouped = (Advantage.group_relative, Advantage.leave_one_out, Advantage.group_returns)
        return super().needs_groups or self.advantage in grouped

    @property
    def needs_advantages(self) -> bool:
        kl_as_loss = self.kl_place is KLPlace.loss and self.needs_reference
        return (
            type(self) is PolicyGradientConfig and not kl_as_loss and self.entropy_coef == 0
        )  # a loss of your own may not

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from at_least(self, clip_low=0, clip_high=0, gamma=0, lam=0, correction_low=0)
        if self.value_clip is not None and self.value_clip <= 0:
            yield "value_clip", f"must be above 0, is {self.value_clip}", "null means no clipping."
        if self.dual_clip is not None and self.dual_clip <= 1:
            yield "dual_clip", f"must be above 1, is {self.dual_clip}", "3 is common; null means none."
        if self.correction_high < max(1.0, self.correction_low):
            yield (
                "correction_high",
                "must be at least 1 and correction_low",
                "A sample of the policy's own has weight 1.",
            )
        for name in ("gamma", "lam"):
            if getattr(self, name) > 1:
                yield name, f"must be at most 1, is {getattr(self, name)}", "1 means no discount."
        yield from self._wrong_gradient()

    def _wrong_gradient(self) -> Iterator[Problem]:
        """See `llmscale.rl.kl` for what each estimator's gradient is."""
        in_reward = self.kl_place is KLPlace.reward
        if self.kl_coef > 0 and in_reward and self.kl_estimator is not KLEstimator.k1:
            what = f"{self.kl_estimator.name} in the reward does not give the gradient of a KL"
            yield "kl_estimator", what, "Set it to k1, or kl_place=loss."
        if self.kl_coef > 0 and not in_reward and self.kl_estimator is KLEstimator.k1:
            what = "k1 as a loss has a gradient of mean zero: it would only add noise"
            yield "kl_estimator", what, "Set it to k2 (KL to the reference) or k3 (GRPO's), or kl_place=reward."
