"""Per-token estimates of KL(policy || reference) from samples of the policy (Schulman 2020, "Approximating KL
divergence"), and a coefficient that adapts.

With d = log ref - log policy of the sampled token: k1 = -d is unbiased and may be negative; k2 = d^2 / 2 is biased, low
variance; k3 = exp(d) - 1 - d is unbiased and never negative.

As a number all of them will do. What may be *optimised* is another matter, for samples come from the policy itself:

- In the reward, where only the sampling is differentiated, k1 gives the gradient of the KL. k2 and k3 leave out a part of
  theirs, E[grad k2] and E[grad k3], and lead elsewhere: refused.
- As a loss, where only the estimate is differentiated, k1's gradient has mean zero, E[grad log policy] = 0: it does nothing
  but add noise, and is refused. k2's is that of KL(policy || ref). k3's, as GRPO has it, is that of KL(ref || policy). Both
  are those of each token given what stands before it: what a token does to the KL of later ones is left out (Tang and Munos
  2025), which the reward takes into account.
"""

from __future__ import annotations

from torch import Tensor

from llmscale.protocols import State


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


class AdaptiveCoefficient:
    """A KL coefficient that steers the KL towards `target` (Ziegler et al. 2019, section 2.2): after a step it is multiplied
    by 1 + clip(observed / target - 1, -0.2, 0.2) * num_samples / horizon. `target` None: it stays as it is.

    `horizon`: samples over which it can change by 20%.
    """

    def __init__(self, value: float, target: float | None, horizon: int):
        self.value, self.target, self.horizon = value, target, horizon

    def update(self, observed_kl: float, num_samples: int) -> None:
        """observed_kl: nats per sample, the mean of the step."""
        if self.target is not None:
            error = min(max(observed_kl / self.target - 1, -0.2), 0.2)
            self.value *= 1 + error * num_samples / self.horizon

    def state_dict(self) -> State:
        return {"value": self.value}

    def load_state_dict(self, state: State) -> None:
        self.value = state["value"]
