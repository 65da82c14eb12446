"""Shared tensor functions against loops over tokens."""

from __future__ import annotations

import math

import pytest
import torch

from llmscale.functional import masked_mean, masked_sum, masked_var, token_entropy, token_logprobs

NAN = float("nan")


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_logprobs_and_entropy_equal_a_loop(temperature: float):
    torch.manual_seed(0)
    logits, ids = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
    logprobs, entropy = token_logprobs(logits, ids, temperature), token_entropy(logits, temperature)
    assert logprobs.dtype is torch.float32
    for b in range(3):
        assert logprobs[b, 0] == 0 and entropy[b, 0] == 0
        for t in range(1, 5):
            weights = [math.exp(x / temperature) for x in logits[b, t - 1].tolist()]
            p = [w / sum(weights) for w in weights]
            assert logprobs[b, t].item() == pytest.approx(math.log(p[ids[b, t]]), abs=1e-6)
            assert entropy[b, t].item() == pytest.approx(-sum(x * math.log(x) for x in p), abs=1e-6)


def test_logprobs_are_computed_in_fp32():
    logits = torch.randn(1, 4, 1000).bfloat16()
    ids = torch.zeros(1, 4, dtype=torch.long)
    assert torch.equal(token_logprobs(logits, ids), token_logprobs(logits.float(), ids))


def test_masked_sums_equal_selection():
    torch.manual_seed(0)
    values, mask = torch.randn(4, 6, dtype=torch.float64), torch.rand(4, 6) < 0.5
    chosen = values[mask]
    assert masked_sum(values, mask) == pytest.approx(chosen.sum().item(), abs=1e-9)
    assert masked_mean(values, mask) == pytest.approx(chosen.mean().item(), abs=1e-9)
    assert masked_var(values, mask) == pytest.approx(chosen.var(correction=0).item(), abs=1e-9)


@pytest.mark.parametrize("reduce", [masked_sum, masked_mean, masked_var])
def test_nan_in_masked_slots_changes_neither_value_nor_gradient(reduce):
    mask = torch.tensor([True, False, True, True])
    clean = torch.tensor([1.0, 0.0, 2.0, 5.0], requires_grad=True)
    dirty = torch.tensor([1.0, NAN, 2.0, 5.0], requires_grad=True)
    first, second = reduce(clean, mask), reduce(dirty, mask)
    first.backward()
    second.backward()
    assert torch.equal(first, second)
    assert torch.equal(clean.grad[mask], dirty.grad[mask])


def test_nothing_selected_is_zero():
    nothing = torch.zeros(3, dtype=torch.bool)
    assert [f(torch.tensor([1.0, NAN, 2.0]), nothing).item() for f in (masked_sum, masked_mean, masked_var)] == [
        0,
        0,
        0,
    ]
