"""Each algorithm's loss equals a loop over samples and tokens written from its paper, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import pytest
import torch
from torch import Tensor

from llmscale.batch import Batch
from llmscale.config import check
from llmscale.errors import ConfigError
from llmscale.rl.config import Advantage, PolicyGradientConfig
from llmscale.rl.policy_gradient import PolicyGradient
from tests.conftest import ROOT
from tests.rl.settings import ALGORITHMS, MAX_NEW_TOKENS, algorithm, setting

GROUP = 3


@dataclass
class Samples:
    """Six samples, two groups; a prompt of one token, then the policy's own, one of which a tool interrupts."""

    mask: Tensor
    policy: Tensor
    old: Tensor
    ref: Tensor
    rewards: Tensor

    def own(self, i: int) -> list[int]:
        return [int(t) for t in self.mask[i].nonzero().flatten()]

    def ratio(self, i: int, t: int) -> float:
        return math.exp(self.policy[i, t].item() - self.old[i, t].item())

    def group(self, i: int) -> list[float]:
        return self.rewards[i // GROUP * GROUP :][:GROUP].tolist()


@pytest.fixture
def samples() -> Samples:
    torch.manual_seed(0)
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 1, 0, 1, 1], [0, 1, 0, 0, 0]] * 2).bool()
    old = -torch.rand(6, 5).double() * 3
    near = old + torch.randn(6, 5).double() * 0.4
    return Samples(mask, near.requires_grad_(), old, old + torch.randn(6, 5).double(), torch.randn(6).double())


def ours(method: PolicyGradient, s: Samples, kl_coef: float) -> Tensor:
    """The loss as experience and objective put it together."""
    nan = float("nan")  # in masked slots, where nothing may be read
    old, ref, policy = (torch.where(s.mask, x, nan) for x in (s.old, s.ref, s.policy))
    kl = torch.where(s.mask, old - ref, 0.0)
    sizes = [GROUP] * (len(s.rewards) // GROUP)
    advantages, _ = method.advantages(
        s.rewards, torch.zeros_like(kl), kl_coef * kl, torch.zeros_like(kl), s.mask, sizes
    )
    sequence = torch.arange(len(s.rewards)).unsqueeze(1).expand_as(s.mask)
    fields = {"old_logprobs": old, "ref_logprobs": ref, "advantages": advantages, "loss_mask": s.mask}
    fields |= {"sequence": sequence, "importance": torch.ones_like(kl), "kl_coef": torch.full_like(kl, kl_coef)}
    losses, _ = method.loss(policy, Batch(fields))
    num_tokens = s.mask.sum(1).tolist()
    weights = torch.tensor([method.weight(n) for n in num_tokens], dtype=torch.float64).unsqueeze(1)
    total = torch.where(s.mask, losses * weights, torch.zeros(())).sum()
    return total / sum(method.count(n) for n in num_tokens)


def clip(ratio: float, advantage: float, low: float, high: float) -> float:
    return min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def standardised(s: Samples, i: int) -> float:
    return (float(s.rewards[i]) - mean(s.group(i))) / stdev(s.group(i))


def grpo(s: Samples) -> float:
    """Shao et al. 2024, eq. 3-4."""
    total = 0.0
    for i in range(6):
        own = s.own(i)
        for t in own:
            d = s.ref[i, t].item() - s.policy[i, t].item()
            surrogate = clip(s.ratio(i, t), standardised(s, i), 0.2, 0.2) - 0.04 * (math.exp(d) - d - 1)
            total -= surrogate / len(own) / 6
    return total


def dr_grpo(s: Samples) -> float:
    """Liu et al. 2025, section 3.2: no deviation, and a constant in place of the length."""
    pairs = [(i, t) for i in range(6) for t in s.own(i)]
    return sum(
        -clip(s.ratio(i, t), float(s.rewards[i]) - mean(s.group(i)), 0.2, 0.2) / MAX_NEW_TOKENS / 6 for i, t in pairs
    )


def dapo(s: Samples) -> float:
    """Yu et al. 2025, eq. 8."""
    pairs = [(i, t) for i in range(6) for t in s.own(i)]
    return sum(-clip(s.ratio(i, t), standardised(s, i), 0.2, 0.28) for i, t in pairs) / len(pairs)


def gspo(s: Samples) -> float:
    """Zheng et al. 2025, eq. 5-7."""
    total = 0.0
    for i in range(6):
        ratio = math.exp(mean(s.policy[i, t].item() - s.old[i, t].item() for t in s.own(i)))
        total -= clip(ratio, standardised(s, i), 3e-4, 4e-4) / 6
    return total


def rloo(s: Samples) -> float:
    """Ahmadian et al. 2024, eq. 8, the KL in the reward of the whole completion; with PPO's ratio in place of log p."""

    def reward(i: int) -> float:
        return float(s.rewards[i]) - 0.05 * sum(float(s.old[i, t] - s.ref[i, t]) for t in s.own(i))

    total = 0.0
    for i in range(6):
        others = [j for j in range(6) if j // GROUP == i // GROUP and j != i]
        advantage = reward(i) - mean(reward(j) for j in others)
        total -= sum(clip(s.ratio(i, t), advantage, 0.2, 0.2) for t in s.own(i)) / 6
    return total


def _whitened(advantages: dict[tuple[int, int], float]) -> dict[tuple[int, int], float]:
    centre = mean(advantages.values())
    variance = mean((a - centre) ** 2 for a in advantages.values())
    return {key: (a - centre) / math.sqrt(variance + 1e-8) for key, a in advantages.items()}


def reinforce_pp(s: Samples) -> float:
    """Hu et al. 2025, section 3.1: A_t = r - beta sum_{u >= t} KL_u, normalised over the batch."""
    raw = {}
    for i in range(6):
        for t in s.own(i):
            to_come = sum(float(s.old[i, u] - s.ref[i, u]) for u in s.own(i) if u >= t)
            raw[i, t] = float(s.rewards[i]) - 0.05 * to_come
    return mean(-clip(s.ratio(*key), a, 0.2, 0.2) for key, a in _whitened(raw).items())


def reinforce_pp_baseline(s: Samples) -> float:
    """Hu et al. 2025, section 3.2: the group's mean is taken off first; k2 as a loss."""
    raw = {(i, t): float(s.rewards[i]) - mean(s.group(i)) for i in range(6) for t in s.own(i)}
    total = [-clip(s.ratio(*key), a, 0.2, 0.2) for key, a in _whitened(raw).items()]
    return mean(total) + mean(0.05 * (s.policy[k] - s.ref[k]).item() ** 2 / 2 for k in raw)


def ppo(s: Samples) -> float:
    """Schulman et al. 2017, eq. 7 and 11, with a critic that says 0: lambda-weighted rewards to come."""
    raw = {}
    for i in range(6):
        own = s.own(i)
        for n, t in enumerate(own):
            rewards = {u: -0.05 * float(s.old[i, u] - s.ref[i, u]) + (u == own[-1]) * float(s.rewards[i]) for u in own}
            raw[i, t] = sum(0.95 ** (m - n) * rewards[u] for m, u in enumerate(own) if m >= n)
    return mean(-clip(s.ratio(*key), a, 0.2, 0.2) for key, a in _whitened(raw).items())


LOOPS: dict[str, Callable[[Samples], float]] = {
    f.__name__: f for f in (ppo, grpo, dr_grpo, dapo, gspo, rloo, reinforce_pp, reinforce_pp_baseline)
}


def test_every_shipped_algorithm_is_compared() -> None:
    assert sorted([*LOOPS, "cispo"]) == ALGORITHMS


def test_the_readme_names_every_algorithm() -> None:
    _, _, section = (ROOT / "README.md").read_text().partition("### Algorithms")
    assert [n for n in ALGORITHMS if f"| `{n}` | " not in section.partition("\n### ")[0]] == []


@pytest.mark.parametrize("name", LOOPS)
def test_the_loss_is_the_papers(name: str, samples: Samples) -> None:
    method = algorithm(name)
    assert ours(method, samples, method.config.kl_coef).item() == pytest.approx(LOOPS[name](samples), abs=1e-9)


def test_the_gradient_of_cispo_is_the_papers(samples: Samples) -> None:
    """MiniMax 2025, eq. 4-5: the weight is a constant, so it is the gradient that has to agree."""
    ours(algorithm("cispo"), samples, 0.0).backward()
    pairs = [(i, t) for i in range(6) for t in samples.own(i)]
    expected = torch.zeros_like(samples.old)
    for i, t in pairs:
        expected[i, t] = -min(max(samples.ratio(i, t), 0.0), 5.0) * standardised(samples, i) / len(pairs)
    torch.testing.assert_close(samples.policy.grad, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", [n for n in ALGORITHMS if setting(n).needs_groups])
def test_groups_with_equal_rewards_give_exactly_nothing(name: str, samples: Samples) -> None:
    """Also where the mean of equal numbers is not that number: 3 x 0.1 / 3 in float32."""
    samples.rewards = torch.full((6,), 0.1).double()
    method = algorithm(name, "algorithm.kl_place=reward", "algorithm.kl_estimator=k1", "algorithm.kl_coef=0")
    ours(method, samples, 0.0).backward()
    assert samples.policy.grad is not None and not samples.policy.grad.any()


def test_unfinished_samples_can_be_left_out() -> None:
    finished = torch.tensor([True, False])
    mask = torch.tensor([[False, True], [True, True]])
    assert torch.equal(algorithm("dapo").learned_from(mask, finished), mask)
    masking = algorithm("dapo", "algorithm.mask_unfinished=true")
    assert masking.learned_from(mask, finished).tolist() == [[False, True], [False, False]]
    assert masking.count(0) == 0 and algorithm("grpo").count(0) == 0


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        ({"gamma": 1.5}, "gamma"),
        ({"lam": -0.1}, "lam"),
        ({"kl_coef": -1}, "kl_coef"),
        ({"num_epochs": 0}, "num_epochs"),
        ({"dual_clip": 0.5}, "dual_clip"),
        ({"kl_estimator": "k3"}, "kl_estimator"),
        ({"kl_place": "loss"}, "kl_estimator"),
        ({"kl_target": 1.0, "kl_coef": 0}, "kl_target"),
        ({"correction_high": 0.5}, "correction_high"),
        ({"overlong_share": 2}, "overlong_share"),
    ],
)
def test_impossible_settings_are_refused(overrides: dict[str, object], where: str) -> None:
    check(PolicyGradientConfig())
    with pytest.raises(ConfigError) as caught:
        setting("ppo", *(f"algorithm.{k}={v}" for k, v in overrides.items()))
    assert caught.value.where == f"algorithm.{where}"


@pytest.mark.parametrize("name", [n for n in ALGORITHMS if setting(n).needs_groups])
def test_a_group_of_one_is_refused(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        setting(name, "rollout.group_size=1")
    assert caught.value.where == "rollout.group_size"


def test_sizes_of_groups_may_differ(samples: Samples) -> None:
    """Where a sample was excluded, the rest of its group is compared with itself."""
    method = algorithm("rloo")
    zeros = torch.zeros(6, 5).double()
    sizes: Sequence[int] = [1, 2, 3]
    advantages, _ = method.advantages(samples.rewards, zeros, zeros, zeros, samples.mask, sizes)
    r = samples.rewards.tolist()
    expected = [0, r[1] - r[2], r[2] - r[1], *(r[i] - (sum(r[3:]) - r[i]) / 2 for i in (3, 4, 5))]
    assert advantages[:, 1].tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_early_reward_counts_from_its_token_on(samples: Samples, name: str) -> None:
    """Of the reward to come, what was given at an earlier token is gone after it; whole samples are compared as before."""
    method = algorithm(name, "algorithm.whiten_advantages=false")
    zeros = torch.zeros(6, 5).double()
    early = torch.where(torch.arange(5) == 1, torch.randn(6, 1).double(), 0.0)
    early[[2, 5]] = 0.0  # their first token is their last
    late, both = (
        method.advantages(samples.rewards, part, zeros, zeros, samples.mask, [GROUP, GROUP])[0]
        for part in (zeros, early)
    )
    if method.config.advantage in (Advantage.group_relative, Advantage.leave_one_out):
        assert torch.equal(late, both)
        return
    discount = method.config.gamma * (method.config.lam if method.config.needs_critic else 1.0)
    for i in range(6):
        t, *rest = samples.own(i)
        assert both[i, t].item() == pytest.approx(
            late[i, t].item() + early[i, t].item() * (1 - discount ** len(rest)), abs=1e-9
        )
        for k, s in enumerate(rest):
            lost = early[i, t].item() * discount ** (len(rest) - 1 - k)
            assert both[i, s].item() == pytest.approx(late[i, s].item() - lost, abs=1e-9)
