"""Process reward models: a probability for each step of a solution (Lightman et al. 2023, arXiv:2305.20050; Wang et al. 2024,
arXiv:2312.08935).

L = -1/N sum_s [y_s log sigmoid(z_s) + (1 - y_s) log(1 - sigmoid(z_s))], z_s the scalar at the last token of step s, y_s its
label, N the labelled steps of the whole step (of the optimizer). Lightman et al. predict a token there; here a scalar head
does, so that the model scores as other reward models do. Labels between 0 and 1 are the soft estimates of Wang et al.

Legend: B rows, T tokens, N labelled steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from llmscale.batch import APART, Batch, Layout, Rows, SteppedExample
from llmscale.functional import masked_sum
from llmscale.objectives.config import ProcessConfig
from llmscale.protocols import Forward, LossSums


class Process:
    """Term `steps`; metrics: `accuracy` over the labelled steps, `accuracy_wrong` over those that are wrong, which are the
    fewer, and `score` (mean logit)."""

    def __init__(self, config: ProcessConfig):
        self.config = config

    def prepare(self, examples: Sequence[SteppedExample], rows: Rows = APART) -> Batch:
        layout = Layout([len(e.token_ids) for e in examples], rows)
        tensors = layout.tensors([e.token_ids for e in examples])
        labels = layout.place([e.labels.astype(np.float32) for e in examples], fill=float("nan")).float()
        tensors["labels"] = labels
        wrong = labels < 0.5  # which NaN is not
        return Batch(tensors, {"steps": float((~labels.isnan()).sum()), "wrong": float(wrong.sum())})

    def loss(self, forward: Forward, batch: Batch) -> LossSums:
        output = forward(batch)
        labelled = ~batch["labels"].isnan()
        logits = output[labelled]
        labels = batch["labels"][labelled].to(logits.dtype)
        # The second term is zero, but a path to the weights: a rank without examples must take part in the backward.
        total = binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        total = total + masked_sum(output, torch.zeros_like(output))
        logits, wrong = logits.detach(), labels < 0.5
        right = (logits > 0) != wrong
        metrics = {
            "accuracy": (right.float().sum(), "steps"),
            "accuracy_wrong": (right[wrong].float().sum(), "wrong"),
            "score": (logits.sum(), "steps"),
        }
        return LossSums({"steps": total}, metrics)

    def scores(self, output: Tensor, batch: Batch) -> Tensor:
        """The logit of each labelled step."""
        return output[~batch["labels"].isnan()]

    def evidence(self, output: Tensor, batch: Batch) -> Tensor:
        """Of each step that is labelled right or wrong for sure: the log-odds that the model gives to its label."""
        labels = batch["labels"]
        sure = (labels == 0) | (labels == 1)
        return (2 * labels[sure] - 1) * output[sure]
