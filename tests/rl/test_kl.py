"""KL estimators against their definitions, and against the exact KL in expectation."""

from __future__ import annotations

import math

import pytest
import torch

from llmscale.rl.kl import estimate

FORMULAS = {
    "k1": lambda p, q: p - q,
    "k2": lambda p, q: (p - q) ** 2 / 2,
    "k3": lambda p, q: math.exp(q - p) - 1 - (q - p),
}


@pytest.mark.parametrize("kind", FORMULAS)
def test_equals_its_formula(kind: str):
    torch.manual_seed(0)
    policy, reference = torch.randn(4, 5).double(), torch.randn(4, 5).double()
    result = estimate(policy, reference, kind)
    for p, q, k in zip(policy.flatten().tolist(), reference.flatten().tolist(), result.flatten().tolist(), strict=True):
        assert k == pytest.approx(FORMULAS[kind](p, q), abs=1e-9)
    assert not estimate(policy, policy, kind).any()


def test_k1_and_k3_are_unbiased_and_k3_is_never_negative():
    torch.manual_seed(0)
    policy, reference = (torch.log_softmax(torch.randn(9).double(), 0) for _ in range(2))
    exact = (policy.exp() * (policy - reference)).sum().item()
    for kind in ("k1", "k3"):
        assert (policy.exp() * estimate(policy, reference, kind)).sum().item() == pytest.approx(exact, abs=1e-9)
    assert (estimate(policy, reference, "k3") >= 0).all() and (estimate(policy, reference, "k1") < 0).any()


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="k4"):
        estimate(torch.zeros(1), torch.zeros(1), "k4")
