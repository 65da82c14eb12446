"""Causal language modelling, L = -sum_t log p(x_t | x_<t) over target tokens (Radford et al. 2018), and SFT, which is
the same sum over the assistant's tokens only. Normalised by the number of target tokens of the whole step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmscale.batch import APART, Batch, Layout, Rows, TokenExample
from llmscale.functional import masked_sum
from llmscale.objectives.config import CausalLMConfig
from llmscale.protocols import Forward, LossSums


class CausalLM:
    """Term `tokens`: cross-entropy in nats, counted in target tokens."""

    def __init__(self, config: CausalLMConfig):
        self.config = config

    def prepare(self, examples: Sequence[TokenExample], rows: Rows = APART) -> Batch:
        layout = Layout([len(e.token_ids) for e in examples], rows)
        tensors = layout.tensors([e.token_ids for e in examples], [e.position_ids for e in examples])
        tensors["loss_mask"] = layout.place([e.loss_mask & _has_predecessor(e) for e in examples], fill=False)
        return Batch(tensors, {"tokens": float(tensors["loss_mask"].sum())})

    def loss(self, forward: Forward, batch: Batch) -> LossSums:
        logprobs, _ = forward.logprobs(batch, batch["loss_mask"])
        return LossSums({"tokens": -masked_sum(logprobs, batch["loss_mask"])})


def _has_predecessor(example: TokenExample) -> np.ndarray:
    """Token t is predicted from token t-1 of the same document, so nothing predicts a document's first token."""
    if example.position_ids is not None:
        return example.position_ids > 0
    return np.arange(len(example.token_ids)) > 0
