"""Per-token estimates of KL(policy || reference) from samples of the policy (Schulman 2020, "Approximating KL
divergence").

With d = log ref - log policy of the sampled token: k1 = -d is unbiased and may be negative; k2 = d^2 / 2 is biased, low
variance; k3 = exp(d) - 1 - d is unbiased and never negative.
"""

from __future__ import annotations

from torch import Tensor


def estimate(policy_logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """KL estimate of each token, any shape, in nats; kind: "k1", "k2" or "k3"."""
    difference = ref_logprobs - policy_logprobs
    if kind == "k1":
        return -difference
    if kind == "k2":
        return difference.square() / 2
    if kind == "k3":
        return difference.exp() - 1 - difference
    raise ValueError(f"unknown KL estimator {kind!r}: k1, k2 or k3")
