"""Policy and critic losses as objectives that any engine can step on. Normalised over the whole update, so that the gradient
does not depend on micro-batches or ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from llmscale.batch import APART, Batch, Layout, Rows, prompt_branches
from llmscale.functional import masked_sum
from llmscale.protocols import Forward, LossSums
from llmscale.rl.experience import Algorithm, Experience

FIELDS = ("old_logprobs", "ref_logprobs", "old_values", "advantages", "returns", "importance")


def prepare_experience(examples: Sequence[Experience], rows: Rows) -> Batch:
    """Rows with everything that an update needs; counts the tokens that are learned from as `tokens`."""
    layout = Layout([len(e.token_ids) for e in examples], rows, prompt_branches(examples))
    tensors = layout.tensors([e.token_ids for e in examples])
    tensors["loss_mask"] = layout.place([e.loss_mask for e in examples], fill=False)
    for name in FIELDS:
        values = layout.place([getattr(e, name) for e in examples], fill=0.0).float()
        # Before the loss: a loss that is selected afterwards would still carry a NaN of another's token into the gradient.
        tensors[name] = torch.where(tensors["loss_mask"], values, torch.zeros_like(values))
    tensors["kl_coef"] = layout.place([np.full(len(e.token_ids), e.kl_coef) for e in examples], fill=0.0).float()
    tensors["sequence"] = layout.place([np.full(len(e.token_ids), i) for i, e in enumerate(examples)])
    return Batch(tensors, {"tokens": float(tensors["loss_mask"].sum())})


class PolicyObjective:
    """Term `policy`, normalised as the algorithm says; metrics over tokens: `entropy`, `approx_kl` (k3 of the old policy to
    the new), `clipfrac`, and the largest `logprob_diff` between the two.

    `old_is_rollout`: the experience has the log-probabilities of the rollout in place of the old policy's, which is the policy
    as it is at this update: its ratio is 1, and the metrics compare rollout and trainer."""

    def __init__(
        self,
        algorithm: Algorithm,
        temperature: float,
        entropy_coef: float,
        old_is_rollout: bool = False,
        needs_advantages: bool = False,
    ):
        self.algorithm, self.temperature, self.entropy_coef = algorithm, temperature, entropy_coef
        self.old_is_rollout, self.needs_advantages = old_is_rollout, needs_advantages

    def teaches(self, example: Experience) -> bool:
        """Whether it has a gradient. A group with equal rewards has none (GRPO), nor a sample that is masked as a whole."""
        return not self.needs_advantages or bool(np.any(example.advantages[example.loss_mask]))

    def prepare(self, examples: Sequence[Experience], rows: Rows = APART) -> Batch:
        """What teaches nothing takes no part in forward and metrics, and counts all the same."""
        taught = [e for e in examples if self.teaches(e)]
        batch = prepare_experience(taught, rows)
        weights = torch.tensor([self.algorithm.weight(int(e.loss_mask.sum())) for e in taught] or [1.0])
        batch.tensors["weight"] = weights[batch["sequence"]]
        batch.counts["policy"] = sum(self.algorithm.count(int(e.loss_mask.sum())) for e in examples)
        return batch

    def loss(self, forward: Forward, batch: Batch) -> LossSums:
        mask = batch["loss_mask"]
        wanted = "grad" if self.entropy_coef > 0 else "value"
        logprobs, entropy = forward.logprobs(batch, mask, self.temperature, wanted)
        log_ratio = logprobs.detach() - batch["old_logprobs"]
        if self.old_is_rollout:
            batch = Batch(batch.tensors | {"old_logprobs": logprobs.detach()}, batch.counts)
        losses, metrics = self.algorithm.loss(logprobs, batch)
        metrics |= {"entropy": entropy.detach(), "approx_kl": log_ratio.exp() - 1 - log_ratio}
        if self.entropy_coef:
            losses = losses - self.entropy_coef * entropy
        total = masked_sum(losses * batch["weight"], mask)
        sums = {k: (masked_sum(v, mask), "tokens") for k, v in metrics.items()}
        largest = torch.where(mask, log_ratio.abs(), torch.zeros_like(log_ratio)).max()
        return LossSums({"policy": total}, sums, {"logprob_diff": largest})


class ValueObjective:
    """Term `value`: the algorithm's loss of each state's value, averaged over tokens."""

    def __init__(self, algorithm: Algorithm):
        self.algorithm = algorithm

    def teaches(self, example: Experience) -> bool:
        return True

    def prepare(self, examples: Sequence[Experience], rows: Rows = APART) -> Batch:
        batch = prepare_experience(examples, rows)
        batch.counts["value"] = batch.counts["tokens"]
        return batch

    def loss(self, forward: Forward, batch: Batch) -> LossSums:
        losses = self.algorithm.value_loss(state_values(forward(batch)), batch)
        return LossSums({"value": masked_sum(losses, batch["loss_mask"])})


def state_values(scalars: Tensor) -> Tensor:
    """[B, T] -> [B, T]: the value of the state *before* token t is what the critic says after token t-1."""
    return torch.nn.functional.pad(scalars[:, :-1], (1, 0))
