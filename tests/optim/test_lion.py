"""Lion against a loop from the paper, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmscale.optim import lion
from llmscale.optim.lion import Lion

LRS = [0.1, 0.05, 0.2, 0.1]


def weights() -> list[Tensor]:
    """A matrix, one whose rows do not follow each other in memory, a vector, a scalar, and nothing."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 3), (4, 7), (11,), (), (0, 3)]
    values = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    values[1] = values[1].t()
    return [v.requires_grad_() for v in values]


def gradient(weight: Tensor, step: int) -> Tensor:
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def optimizer(held: list[Tensor]) -> Lion:
    groups = [{"params": held[:2], "weight_decay": 0.3}, {"params": held[2:], "weight_decay": 0.0}]
    return Lion(groups, lr=1.0, betas=(0.9, 0.99))


def take(step: int, held: list[Tensor], by: Lion) -> None:
    for p in held:
        p.grad = gradient(p, step)
    for group in by.param_groups:
        group["lr"] = LRS[step]
    by.step()


@pytest.mark.parametrize("piece", [1, 7, 1 << 17])
def test_equals_the_papers_loop(piece: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lion, "PIECE", piece)
    held, expected = weights(), [p.detach().clone() for p in weights()]
    momenta = [torch.zeros_like(p) for p in expected]
    ours = optimizer(held)
    for step, lr in enumerate(LRS):
        take(step, held, ours)
        for i, (theta, m) in enumerate(zip(expected, momenta, strict=True)):
            g, decay = gradient(theta, step), 0.3 if i < 2 else 0.0
            c = 0.9 * m + (1 - 0.9) * g
            theta -= lr * (c.sign() + decay * theta)
            m.copy_(0.99 * m + (1 - 0.99) * g)
    for own, theta in zip(held, expected, strict=True):
        torch.testing.assert_close(own.detach(), theta, rtol=0, atol=1e-9)


def test_all_at_once_as_on_a_gpu_equals_piece_by_piece():
    held = [(p.detach(), gradient(p, 0), gradient(p, 1)) for p in weights()]
    everything = [torch.cat([t.flatten() for t in tensors]) for tensors in zip(*held, strict=True)]
    pieces = [torch.cat([t.flatten() for [t] in tensors]) for tensors in zip(*lion._batches(held), strict=True)]
    for one, other in zip(everything, pieces, strict=True):
        assert torch.equal(one, other)
    on_gpu = [tuple(t.to("meta") for t in tensors) for tensors in held]
    (batch,) = lion._batches(on_gpu)
    assert [len(tensors) for tensors in batch] == [len(held)] * 3


def test_a_weight_without_a_gradient_stays():
    held = weights()
    ours = optimizer(held)
    held[0].grad = gradient(held[0], 0)
    ours.step()
    assert torch.equal(held[2], weights()[2]) and list(ours.state) == [held[0]]


def test_saved_and_loaded_it_goes_on_bit_for_bit():
    whole, stopped = weights(), weights()
    straight, first = optimizer(whole), optimizer(stopped)
    for step in range(4):
        take(step, whole, straight)
    for step in range(2):
        take(step, stopped, first)
    second = optimizer(stopped)
    second.load_state_dict(first.state_dict())
    for step in range(2, 4):
        take(step, stopped, second)
    for one, other in zip(whole, stopped, strict=True):
        assert torch.equal(one, other)
