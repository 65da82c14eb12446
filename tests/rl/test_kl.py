"""KL estimators against their definitions, and against the exact KL in expectation."""

from __future__ import annotations

import math

import pytest
import torch

from llmscale.rl.kl import AdaptiveCoefficient, estimate

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


# ---------------------------------------------------------------- what may be optimised


def gradients(kind: str) -> dict[str, torch.Tensor]:
    """Expected gradients over nine completions, exactly: of the estimate where it is a reward, and where it is a loss; and of
    the two KLs."""
    torch.manual_seed(0)
    logits = torch.randn(9).double().requires_grad_()
    reference = torch.log_softmax(torch.randn(9).double(), 0)

    def grad(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, logits)[0]

    policy = torch.log_softmax(logits, 0)
    p = policy.detach().exp()
    in_reward = (p * estimate(policy.detach(), reference, kind) * torch.log_softmax(logits, 0)).sum()
    return {
        "reward": grad(in_reward),
        "loss": grad((p * estimate(torch.log_softmax(logits, 0), reference, kind)).sum()),
        "KL(policy || ref)": grad((policy.exp() * (policy - reference)).sum()),
        "KL(ref || policy)": grad(-(reference.exp() * torch.log_softmax(logits, 0)).sum()),
    }


def test_each_estimator_has_the_gradient_that_the_module_says():
    k1, k2, k3 = (gradients(kind) for kind in FORMULAS)
    close = {"atol": 1e-12, "rtol": 0}
    torch.testing.assert_close(k1["reward"], k1["KL(policy || ref)"], **close)
    torch.testing.assert_close(k1["loss"], torch.zeros(9).double(), **close)
    torch.testing.assert_close(k2["loss"], k2["KL(policy || ref)"], **close)
    torch.testing.assert_close(k3["loss"], k3["KL(ref || policy)"], **close)
    for wrong in (k2, k3):
        assert (wrong["reward"] - wrong["KL(policy || ref)"]).norm() > 0.1 * wrong["KL(policy || ref)"].norm()


# ---------------------------------------------------------------- an adaptive coefficient


@pytest.mark.parametrize(("observed", "factor"), [(6.0, 1.0), (6.6, 1.01), (60.0, 1.02), (5.4, 0.99), (0.0, 0.98)])
def test_the_coefficient_follows_ziegler(observed: float, factor: float):
    coefficient = AdaptiveCoefficient(0.2, target=6.0, horizon=1000)
    coefficient.update(observed, num_samples=100)
    assert coefficient.value == pytest.approx(0.2 * factor)


def test_a_coefficient_without_target_stays_and_its_state_returns():
    fixed = AdaptiveCoefficient(0.2, None, 1000)
    fixed.update(100.0, 1000)
    assert fixed.value == 0.2
    moved = AdaptiveCoefficient(0.2, 1.0, 1000)
    moved.update(100.0, 1000)
    fixed.load_state_dict(moved.state_dict())
    assert fixed.value == moved.value == pytest.approx(0.24)
