"""PPO finds the optimum that is known in closed form: pi*(y) = pi_ref(y) exp(r(y) / beta) / Z."""

from __future__ import annotations

import pytest
import torch

from llmscale.batch import Batch
from llmscale.config import check
from llmscale.errors import ConfigError
from llmscale.rl.config import PPOConfig
from llmscale.rl.kl import estimate
from llmscale.rl.ppo import PPO

BETA = 0.5
NUM_TOKENS = 3  # of the vocabulary; completions are two tokens long, so there are nine


class Table:
    """A policy or critic over completions of two tokens, by look-up: all states are 0 (empty) and 1 + first token."""

    def __init__(self, *shape: int):
        self.table = torch.zeros(*shape, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.table], lr=0.02)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [B, 2] -> what the table says in the state before each, [B, 2, ...]."""
        return torch.stack([self.table[:1].expand(len(tokens), *self.table.shape[1:]), self.table[1 + tokens[:, 0]]], 1)

    def descend(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def logprobs(policy: Table, tokens: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(policy(tokens), -1).gather(-1, tokens[..., None]).squeeze(-1)


@pytest.mark.parametrize("whiten", [False, True])
def test_reaches_the_known_optimum(whiten: bool):
    torch.manual_seed(0)
    algorithm = PPO(PPOConfig(whiten_advantages=whiten))
    reference, policy, critic = (
        Table(1 + NUM_TOKENS, NUM_TOKENS),
        Table(1 + NUM_TOKENS, NUM_TOKENS),
        Table(1 + NUM_TOKENS),
    )
    with torch.no_grad():
        reference.table.normal_()
        policy.table.copy_(reference.table)
    score = torch.randn(NUM_TOKENS, NUM_TOKENS)
    everything = torch.cartesian_prod(torch.arange(NUM_TOKENS), torch.arange(NUM_TOKENS))
    with torch.no_grad():
        unnormalised = logprobs(reference, everything).sum(-1) + score.flatten() / BETA
        optimum = torch.softmax(unnormalised, 0)
        start = logprobs(policy, everything).sum(-1).exp()
    assert (start - optimum).abs().sum() / 2 > 0.3

    mask = torch.ones(512, 2, dtype=torch.bool)
    for _ in range(150):
        with torch.no_grad():
            drawn = torch.multinomial(logprobs(policy, everything).sum(-1).exp(), 512, replacement=True)
            tokens = everything[drawn]
            old, values = logprobs(policy, tokens), critic(tokens)
            rewards = -BETA * estimate(old, logprobs(reference, tokens), "k1")
            rewards[:, -1] += score[tokens[:, 0], tokens[:, 1]]
            advantages, returns = algorithm.advantages(rewards, values, mask)
        batch = Batch({"old_logprobs": old, "old_values": values, "advantages": advantages, "returns": returns})
        for _ in range(2):
            policy.descend(algorithm.loss(logprobs(policy, tokens), batch)[0].mean())
            critic.descend(algorithm.value_loss(critic(tokens), batch).mean())
    with torch.no_grad():
        found = logprobs(policy, everything).sum(-1).exp()
    assert (found - optimum).abs().sum() / 2 < 0.05


@pytest.mark.parametrize(("field", "value"), [("gamma", 1.5), ("lam", -0.1), ("kl_coef", -1), ("num_epochs", 0)])
def test_impossible_settings_are_refused(field: str, value: float):
    check(PPOConfig())
    with pytest.raises(ConfigError) as caught:
        check(PPOConfig(**{field: value}))
    assert caught.value.where == field
