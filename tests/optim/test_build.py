"""Which optimizer, with which numbers, and which weights decay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmscale.optim.build import build_optimizer, parameter_groups, set_learning_rate
from llmscale.optim.config import OptimConfig, Optimizer
from tests.tiny import language_model


class WithBiases(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.linear = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)


def test_matrices_decay_biases_and_norms_do_not():
    model = WithBiases()
    decayed, plain = parameter_groups(model, 0.1)
    assert [group["weight_decay"] for group in (decayed, plain)] == [0.1, 0.0]
    assert {id(p) for p in decayed["params"]} == {id(model.embedding.weight), id(model.linear.weight)}
    assert {id(p) for p in plain["params"]} == {id(model.linear.bias), id(model.norm.weight), id(model.norm.bias)}


@pytest.mark.parametrize("tie", [True, False])
def test_each_weight_is_in_one_group_once(tie: bool):
    model = language_model(tie=tie)
    grouped = [p for group in parameter_groups(model, 0.1) for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))
    assert sum(p.shape == (64, 32) for p in grouped) == (1 if tie else 2)


def test_the_optimizer_has_the_configured_numbers():
    optimizer = build_optimizer(OptimConfig(lr=0.5, betas=[0.7, 0.8], eps=1e-3, weight_decay=0.3), WithBiases())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["fused"] is True
    for group, decay in zip(optimizer.param_groups, (0.3, 0.0), strict=True):
        assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.5, (0.7, 0.8), 1e-3, decay)
    set_learning_rate(optimizer, 0.25)
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}


@pytest.mark.parametrize(
    ("kind", "betas"), [(Optimizer.adamw, (0.9, 0.95)), (Optimizer.lion, (0.9, 0.99)), (Optimizer.muon, (0.9, 0.95))]
)
def test_betas_not_given_are_the_usual_ones(kind: Optimizer, betas: tuple[float, float]):
    for given, expected in ((None, betas), ([0.6, 0.7], (0.6, 0.7))):
        groups = build_optimizer(OptimConfig(optimizer=kind, betas=given), language_model()).param_groups
        assert [g["betas"] for g in groups if "betas" in g] == [expected] * 2


@pytest.mark.parametrize("kind", Optimizer)
def test_every_optimizer_decays_matrices_alone_and_follows_the_schedule(kind: Optimizer):
    model = language_model(tie=False)
    optimizer = build_optimizer(OptimConfig(optimizer=kind, lr=0.5, weight_decay=0.3), model)
    set_learning_rate(optimizer, 0.25)
    held = [(p, g) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(id(p) for p, _ in held) == sorted(id(p) for p in model.parameters())
    for p, group in held:
        assert (group["weight_decay"], group["lr"]) == (0.3 if p.ndim == 2 else 0.0, 0.25)


def test_a_model_without_biases_has_one_group():
    assert len(build_optimizer(OptimConfig(), nn.Linear(2, 2, bias=False)).param_groups) == 1
