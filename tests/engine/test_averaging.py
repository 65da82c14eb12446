"""The average of the weights against a loop in float64, and what an engine does with it. Over ranks: test_conformance.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmscale.engine.averaging import WeightAverage, average_decay
from llmscale.engine.config import SingleConfig
from llmscale.engine.single import SingleEngine
from llmscale.objectives.causal_lm import CausalLM
from llmscale.objectives.config import CausalLMConfig
from llmscale.optim.config import OptimConfig, Optimizer
from tests.tiny import language_model, token_examples, tokenizer

OBJECTIVE = CausalLM(CausalLMConfig())
OPTIM = OptimConfig(lr=1e-2, warmup_steps=2, ema_decay=0.9)
NUM_STEPS = 6
BATCH = OBJECTIVE.prepare(token_examples([9, 4, 12]))


def engine(optim: OptimConfig = OPTIM, seed: int = 0) -> SingleEngine:
    return SingleEngine(SingleConfig(), language_model(seed), optim, NUM_STEPS)


def train(by: SingleEngine, num_steps: int = NUM_STEPS) -> None:
    while by.num_steps < num_steps:
        by.step([OBJECTIVE.prepare(token_examples([9, 4, 12], seed=by.num_steps))], OBJECTIVE)


def copies(of: SingleEngine) -> list[Tensor]:
    return [p.detach().clone() for p in of.model.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def moves(ema_decay: float, num_steps: int) -> tuple[list[Tensor], WeightAverage, list[list[Tensor]]]:
    """Weights that AdamW moves, their average, and a copy of the weights after each step."""
    torch.manual_seed(0)
    weights = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (5,))]
    optimizer = torch.optim.AdamW(weights, lr=0.1)
    average, history = WeightAverage(ema_decay, optimizer), []
    for step in range(num_steps):
        for p in weights:
            p.grad = torch.randn_like(p)
        optimizer.step()
        average.update(step)
        history.append([p.detach().clone() for p in weights])
    return weights, average, history


@pytest.mark.parametrize("ema_decay", [0.05, 0.6, 0.999])
def test_equals_a_loop(ema_decay: float):
    weights, average, history = moves(ema_decay, 30)
    shadows = [w.clone() for w in history[0]]
    for n, current in enumerate(history[1:]):
        decay = min(ema_decay, (1 + n) / (10 + n))
        shadows = [decay * s + (1 - decay) * w for s, w in zip(shadows, current, strict=True)]
    with average.swapped_in():
        for weight, shadow in zip(weights, shadows, strict=True):
            torch.testing.assert_close(weight.detach(), shadow, rtol=0, atol=1e-9)
    assert same([w.detach() for w in weights], history[-1])


def test_the_decay_rises_from_nothing_to_what_is_configured():
    assert [average_decay(0.5, n) for n in (0, 1, 2, 9, 10, 1000)] == [0, 1 / 10, 2 / 11, 0.5, 0.5, 0.5]


def test_without_a_decay_there_is_none():
    plain = engine(replace(OPTIM, ema_decay=0.0))
    train(plain)
    assert {name for state in plain.optimizer.state.values() for name in state} == {"step", "exp_avg", "exp_avg_sq"}
    weights = copies(plain)
    with plain.averaged():
        assert same(copies(plain), weights)


def test_training_does_not_notice_it():
    plain, averaged = engine(replace(OPTIM, ema_decay=0.0)), engine()
    train(plain)
    train(averaged)
    assert same(copies(plain), copies(averaged))


def test_before_the_first_step_it_is_the_weights():
    fresh = engine()
    with fresh.averaged():
        assert same(copies(fresh), copies(engine()))
    train(fresh, 1)
    after = copies(fresh)
    with fresh.averaged():
        assert same(copies(fresh), after)


def test_a_weight_that_is_trained_later_starts_then():
    """Adam takes a state that is not empty for one that it has initialised."""
    weights = [torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)]
    optimizer = torch.optim.AdamW(weights, lr=0.1)
    average = WeightAverage(0.9, optimizer)
    for step in range(4):
        weights[0].grad = torch.ones(3)
        weights[1].grad = torch.ones(2) if step > 1 else None
        assert optimizer.state[weights[1]] is not None  # whoever looks makes an empty one
        optimizer.step()
        average.update(step)
    trained = weights[1].detach().clone()
    with average.swapped_in():
        assert (weights[1] > trained).all() and (weights[1] < 1).all()


def test_evaluation_and_export_use_it_publishing_and_forward_do_not(tmp_path: Path):
    trained = engine()
    train(trained)
    weights = copies(trained)
    with trained.averaged():
        average = copies(trained)
        inside = trained.evaluate([BATCH], OBJECTIVE)
    assert not same(average, weights)
    by_hand = engine()
    for p, value in zip(by_hand.model.parameters(), average, strict=True):
        p.data.copy_(value)
    expected = by_hand.evaluate([BATCH], OBJECTIVE)
    assert trained.evaluate([BATCH], OBJECTIVE) == expected == inside
    trained.export(tmp_path, tokenizer())
    exported = type(trained.model.hf).from_pretrained(tmp_path)
    assert same(list(exported.parameters()), average)
    (published,) = trained.full_parameters(1 << 62)
    assert same(list(published.values()), weights)
    (own,) = trained.forward([BATCH], lambda f, b: {"out": f(b)})
    (averages,) = by_hand.forward([BATCH], lambda f, b: {"out": f(b)})
    assert not torch.equal(own["out"], averages["out"])
    assert same(copies(trained), weights)


def test_an_error_inside_gives_the_weights_back():
    trained = engine()
    train(trained)
    weights = copies(trained)
    with pytest.raises(ZeroDivisionError), trained.averaged():
        raise ZeroDivisionError
    assert same(copies(trained), weights)
    with trained.averaged():
        assert not same(copies(trained), weights)


@pytest.mark.parametrize("kind", Optimizer)
def test_interrupted_and_resumed_equals_uninterrupted(kind: Optimizer, tmp_path: Path):
    optim = replace(OPTIM, optimizer=kind)
    straight, stopped, resumed = engine(optim), engine(optim), engine(optim, seed=9)
    train(straight)
    train(stopped, 3)
    stopped.snapshot()(tmp_path)
    resumed.load(tmp_path)
    train(resumed)
    assert same(copies(straight), copies(resumed))
    with straight.averaged(), resumed.averaged():
        assert same(copies(straight), copies(resumed))


@pytest.mark.parametrize("kind", Optimizer)
def test_every_optimizer_learns(kind: Optimizer):
    lr = 1e-3 if kind is Optimizer.lion else 1e-2
    trained = engine(OptimConfig(optimizer=kind, lr=lr, warmup_steps=0))
    losses = [trained.step([BATCH], OBJECTIVE)["loss"] for _ in range(NUM_STEPS)]
    assert losses[-1] < losses[0] - 0.3
