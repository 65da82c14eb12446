"""Muon and AdamW as one optimizer: to the bit what the two do side by side."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llmscale.errors import ConfigError
from llmscale.optim.build import build_optimizer, set_learning_rate
from llmscale.optim.config import OptimConfig, Optimizer
from llmscale.optim.muon import MuonWithAdamW
from tests.tiny import language_model, scalar_model

CONFIG = OptimConfig(optimizer=Optimizer.muon, lr=0.02, weight_decay=0.1)


def optimizer(model: nn.Module) -> MuonWithAdamW:
    built = build_optimizer(CONFIG, model)
    assert isinstance(built, MuonWithAdamW)
    return built


def give_gradients(model: nn.Module, step: int) -> None:
    torch.manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn_like(p)


def is_in_block(name: str, p: Tensor) -> bool:
    return ".layers." in name and p.ndim == 2


@pytest.mark.parametrize("model", [language_model(tie=True), language_model(tie=False), scalar_model()])
def test_muon_has_the_blocks_matrices_and_adamw_the_rest(model: nn.Module):
    built = optimizer(model)
    names = {id(p): name for name, p in model.named_parameters()}
    muons = {names[id(p)] for g in built.muon.param_groups for p in g["params"]}
    adamws = {names[id(p)] for g in built.adamw.param_groups for p in g["params"]}
    assert muons == {name for name, p in model.named_parameters() if is_in_block(name, p)}
    assert muons | adamws == set(names.values()) and not muons & adamws and len(muons) == 14


def test_equals_the_two_side_by_side():
    ours, bare = language_model(), language_model()
    parts = {
        wanted: [p for name, p in bare.named_parameters() if is_in_block(name, p) == wanted] for wanted in (True, False)
    }
    muon = torch.optim.Muon(parts[True], weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    groups = [
        {"params": [p for p in parts[False] if (p.ndim == 2) == matrix], "weight_decay": 0.1 * matrix}
        for matrix in (True, False)
    ]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)
    built = optimizer(ours)
    for step in range(4):
        for each in (built, muon, adamw):
            set_learning_rate(each, 0.02 / (step + 1))
        give_gradients(ours, step)
        give_gradients(bare, step)
        built.step()
        muon.step()
        adamw.step()
    for one, other in zip(ours.parameters(), bare.parameters(), strict=True):
        assert torch.equal(one, other)
    built.zero_grad()
    assert all(p.grad is None for p in ours.parameters())


def test_one_learning_rate_serves_both():
    """AdamW's first step moves every weight by lr; Liu et al. 2025 measured 0.2 to 0.4 of it later, and aim at 0.2."""
    model = language_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    built = build_optimizer(OptimConfig(optimizer=Optimizer.muon, lr=0.02, weight_decay=0.0), model)
    give_gradients(model, 0)
    built.step()
    for name, p in model.named_parameters():
        size = float((p.detach() - before[name]).square().mean().sqrt())
        expected = 0.2 if is_in_block(name, p) else 1.0
        assert size == pytest.approx(expected * 0.02, rel=0.3), name


def test_saved_and_loaded_it_goes_on_bit_for_bit(tmp_path: Path):
    whole, stopped = language_model(), language_model()
    straight, first = optimizer(whole), optimizer(stopped)
    for step in range(4):
        give_gradients(whole, step)
        straight.step()
    for step in range(2):
        give_gradients(stopped, step)
        first.step()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = optimizer(stopped)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(2, 4):
        give_gradients(stopped, step)
        second.step()
    for one, other in zip(whole.parameters(), stopped.parameters(), strict=True):
        assert torch.equal(one, other)
    assert len(second.state) == len(list(stopped.parameters()))


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ConfigError, match="no such stack") as caught:
        optimizer(nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2)))
    assert caught.value.where == "optim.optimizer"
