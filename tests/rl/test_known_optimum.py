"""What each algorithm converges to is known in closed form on a finite set of completions.

With r the reward of a completion, beta the coefficient of the KL and ref the reference:

- KL in the reward, or k2 as a loss (completions of one token): p = ref exp(r / beta) / Z, where reward and KL balance.
- k3 as a loss: the gradient is that of E[r] - beta KL(ref || p), which is largest at p = beta ref / (c - r), c such that it
  sums to one. Dividing by the deviation of the rewards changes r to r / std(r), the deviation under p itself.
- no KL: all that is left is the best completion.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmscale.batch import Batch
from llmscale.rl.kl import estimate
from llmscale.rl.policy_gradient import PolicyGradient
from tests.rl.settings import algorithm

BETA = 0.5
NUM_TOKENS = 3  # of the vocabulary; completions are two tokens long, so there are nine
NUM_SAMPLES = 512


class Table:
    """A policy or critic over completions of two tokens, by look-up: all states are 0 (empty) and 1 + first token."""

    def __init__(self, *shape: int):
        self.table = torch.zeros(*shape, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.table], lr=0.02)

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens [B, 2] -> what the table says in the state before each, [B, 2, ...]."""
        return torch.stack([self.table[:1].expand(len(tokens), *self.table.shape[1:]), self.table[1 + tokens[:, 0]]], 1)

    def descend(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def logprobs(policy: Table, tokens: Tensor) -> Tensor:
    return torch.log_softmax(policy(tokens), -1).gather(-1, tokens[..., None]).squeeze(-1)


class Bench:
    """Nine completions with their rewards, a reference, and a policy that starts from it. With `one_token` the choice of the
    second token has no part in it: three completions."""

    def __init__(self, one_token: bool = False):
        torch.manual_seed(0)
        self.reference, self.policy = Table(1 + NUM_TOKENS, NUM_TOKENS), Table(1 + NUM_TOKENS, NUM_TOKENS)
        self.critic = Table(1 + NUM_TOKENS)
        with torch.no_grad():
            self.reference.table.normal_()
            self.policy.table.copy_(self.reference.table)
        tokens = torch.arange(NUM_TOKENS)
        self.everything = torch.cartesian_prod(tokens, torch.zeros(1).long() if one_token else tokens)
        self.score = torch.randn(len(self.everything))
        self.mask = torch.ones(NUM_SAMPLES, 2, dtype=torch.bool)
        self.mask[:, 1] = not one_token

    def probabilities(self, policy: Table) -> Tensor:
        own = self.mask[0]
        with torch.no_grad():
            return logprobs(policy, self.everything)[:, own].sum(-1).exp()

    def train(self, method: PolicyGradient, num_steps: int, lr: float = 0.02) -> Tensor:
        """On-policy steps of one group; two updates on each for whoever has a critic. Returns what the policy says."""
        self.policy.optimizer.param_groups[0]["lr"] = lr
        updates = 2 if method.config.needs_critic else 1
        for _ in range(num_steps):
            with torch.no_grad():
                drawn = torch.multinomial(self.probabilities(self.policy), NUM_SAMPLES, replacement=True)
                tokens = self.everything[drawn]
                old, ref = logprobs(self.policy, tokens), logprobs(self.reference, tokens)
                kl = torch.where(self.mask, method.config.kl_coef * estimate(old, ref, "k1"), 0.0)
                values = torch.where(self.mask, self.critic(tokens), 0.0)
                sizes, none = [NUM_SAMPLES], torch.zeros_like(kl)
                advantages, returns = method.advantages(self.score[drawn], none, kl, values, self.mask, sizes)
            fields = {"old_logprobs": old, "ref_logprobs": ref, "old_values": values, "advantages": advantages}
            fields |= {"returns": returns, "loss_mask": self.mask, "importance": torch.ones_like(old)}
            fields |= {"sequence": torch.arange(NUM_SAMPLES).unsqueeze(1).expand(-1, 2)}
            batch = Batch(fields | {"kl_coef": torch.full_like(old, method.config.kl_coef)})
            for _ in range(updates):
                losses = method.loss(logprobs(self.policy, tokens), batch)[0]
                self.policy.descend(torch.where(self.mask, losses, 0.0).mean())
                if method.config.needs_critic:
                    self.critic.descend(method.value_loss(self.critic(tokens), batch).mean())
        return self.probabilities(self.policy)


def distance(p: Tensor, q: Tensor) -> float:
    """Total variation."""
    return float((p - q).abs().sum() / 2)


IN_REWARD = ["algorithm.kl_place=reward", "algorithm.kl_estimator=k1", f"algorithm.kl_coef={BETA}"]
BALANCED = {
    "ppo": ("ppo", [], False),
    "ppo without whitening": ("ppo", ["algorithm.whiten_advantages=false"], False),
    "rloo": ("rloo", [], False),
    "reinforce_pp": ("reinforce_pp", [], False),
    "dr_grpo": ("dr_grpo", [], False),
    "cispo": ("cispo", ["algorithm.normalize_std=false"], False),
    "gspo": ("gspo", ["algorithm.normalize_std=false"], False),
}


@pytest.mark.parametrize("name", BALANCED)
def test_kl_in_the_reward_balances_it(name: str) -> None:
    method, overrides, one_token = BALANCED[name]
    bench = Bench(one_token)
    optimum = torch.softmax(bench.probabilities(bench.reference).log() + bench.score / BETA, 0)
    assert distance(bench.probabilities(bench.policy), optimum) > 0.3
    assert distance(bench.train(algorithm(method, *IN_REWARD, *overrides), 200), optimum) < 0.05


def test_k2_as_a_loss_has_the_same_optimum_where_completions_have_one_token() -> None:
    bench = Bench(one_token=True)
    optimum = torch.softmax(bench.probabilities(bench.reference).log() + bench.score / BETA, 0)
    method = algorithm("dr_grpo", "algorithm.kl_place=loss", "algorithm.kl_estimator=k2", f"algorithm.kl_coef={BETA}")
    assert distance(bench.probabilities(bench.policy), optimum) > 0.3
    assert distance(bench.train(method, 300), optimum) < 0.05


def forward_kl_optimum(ref: Tensor, reward: Tensor, beta: float) -> Tensor:
    """p = beta ref / (c - r): c by bisection, above the best reward."""
    low, high = float(reward.max()), float(reward.max()) + beta
    for _ in range(60):
        c = (low + high) / 2
        low, high = (c, high) if float((beta * ref / (c - reward)).sum()) > 1 else (low, c)
    return beta * ref / (high - reward)


@pytest.mark.parametrize("normalize_std", [False, True])
def test_grpo_has_an_optimum_of_its_own(normalize_std: bool) -> None:
    bench, beta = Bench(one_token=True), 1.5
    ref = bench.probabilities(bench.reference)
    optimum = forward_kl_optimum(ref, bench.score, beta)
    for _ in range(200 if normalize_std else 0):  # the deviation is that under the optimum itself
        variance = (optimum * (bench.score - (optimum * bench.score).sum()).square()).sum()
        optimum = (optimum + forward_kl_optimum(ref, bench.score / variance.sqrt(), beta)) / 2
    settings = [f"algorithm.kl_coef={beta}", f"algorithm.normalize_std={normalize_std}".lower()]
    found = bench.train(algorithm("grpo", *settings), 400)
    others = [bench.probabilities(bench.reference), torch.softmax(ref.log() + bench.score / beta, 0)]
    assert distance(found, optimum) < 0.03 < 0.06 < min(distance(found, other) for other in others)


@pytest.mark.parametrize("name", ["dapo", "dr_grpo", "gspo", "cispo"])
def test_without_kl_the_best_completion_remains(name: str) -> None:
    bench = Bench()
    found = bench.train(algorithm(name), 150, lr=0.05)
    assert found.argmax() == bench.score.argmax() and found.max() > 0.95
