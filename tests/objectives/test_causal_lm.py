"""Causal language modelling against a loop over tokens; packing and splitting change nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llmscale.batch import Batch, Rows, TokenExample
from llmscale.engine.accounting import StepTotals
from llmscale.models.forward import ModelForward
from llmscale.models.head import TokenHead, scored
from llmscale.objectives.causal_lm import CausalLM
from llmscale.objectives.config import CausalLMConfig
from tests.tiny import VOCAB_SIZE, language_model, packed, token_examples

OBJECTIVE = CausalLM(CausalLMConfig())
LENGTHS = [9, 4, 12, 7, 1, 15]


def step(model: nn.Module, batches: Sequence[Batch]) -> tuple[float, Tensor]:
    """The mean loss over all target tokens, and the whole gradient as one vector."""
    model.zero_grad()
    totals = StepTotals(batches)
    for batch in batches:
        totals.add(OBJECTIVE.loss(ModelForward(model), batch)).backward()
    return totals.metrics()["loss"], torch.cat([p.grad.flatten() for p in model.parameters()])


def assert_same_step(one: tuple[float, Tensor], other: tuple[float, Tensor], tolerance: float = 1e-5) -> None:
    assert other[0] == pytest.approx(one[0], rel=tolerance)
    assert (one[1] - other[1]).norm() < tolerance * one[1].norm()


def test_equals_a_loop_over_tokens():
    model, examples = language_model(), token_examples(LENGTHS)
    losses = []
    for e in examples:
        logits = model(torch.from_numpy(e.token_ids)[None], torch.arange(len(e.token_ids))[None])[0].double()
        for t in range(1, len(e.token_ids)):  # nothing predicts the first token
            if e.loss_mask[t]:
                losses.append(-torch.log_softmax(logits[t - 1], -1)[e.token_ids[t]])
    batch = OBJECTIVE.prepare(examples)
    assert batch.counts == {"tokens": len(losses)} and batch.num_tokens == sum(LENGTHS)

    model.zero_grad()
    mean = torch.stack(losses).mean()
    mean.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert_same_step((mean.item(), gradient), step(model, [batch]))


@pytest.mark.parametrize("sizes", [[1] * 6, [4, 2], [3, 3], [6, 0]])
def test_the_split_into_micro_batches_changes_nothing(sizes: list[int]):
    model, examples = language_model(), token_examples(LENGTHS)
    starts = np.cumsum([0, *sizes])
    parts = [examples[start : start + size] for start, size in zip(starts, sizes, strict=False)]
    whole = step(model, [OBJECTIVE.prepare(examples)])
    assert_same_step(whole, step(model, [OBJECTIVE.prepare(part) for part in parts]))


@pytest.mark.parametrize("rows", [[[0, 1, 2, 3, 4, 5]], [[0, 1, 2], [3, 4, 5]], [[5, 0], [1, 2, 4], [3]]])
def test_packed_documents_give_what_separate_ones_give(rows: list[list[int]]):
    """Differences are of fp32 rounding (6e-7 of the loss); a leak between documents would be of order one."""
    model, examples = language_model(), token_examples(LENGTHS)
    batch = OBJECTIVE.prepare([packed([examples[i] for i in row]) for row in rows])
    separate = step(model, [OBJECTIVE.prepare(examples)])
    together = step(model, [batch])
    assert together[0] == pytest.approx(separate[0], rel=2e-6)
    assert_same_step(separate, together)


def test_the_order_of_examples_changes_nothing():
    model, examples = language_model(), token_examples(LENGTHS)
    assert_same_step(step(model, [OBJECTIVE.prepare(examples)]), step(model, [OBJECTIVE.prepare(examples[::-1])]))


class HeadOnly:
    """A forward of which only the output layer is left."""

    def __init__(self, head: TokenHead, hidden: Tensor):
        self.head, self.hidden = head, hidden

    def logprobs(self, batch: Batch, mask: Tensor) -> tuple[Tensor, Tensor]:
        return ModelForward(self._scored).logprobs(batch, mask)

    def _scored(self, targets: Tensor, wanted: Tensor, **inputs: object) -> tuple[Tensor, Tensor]:
        return scored(self.head, self.hidden, targets, wanted, 1.0, "none")


def test_nan_in_masked_slots_changes_nothing():
    batch = OBJECTIVE.prepare(token_examples(LENGTHS))
    torch.manual_seed(0)
    clean = torch.randn(*batch["input_ids"].shape, 8)
    predicts = torch.nn.functional.pad(batch["loss_mask"], (0, 1))[:, 1:]  # token t-1 predicts token t
    dirty = torch.where(predicts[..., None], clean, float("nan"))
    head, results = TokenHead(8, VOCAB_SIZE), []
    for hidden in (clean.requires_grad_(), dirty.requires_grad_()):
        head.zero_grad()
        loss = OBJECTIVE.loss(HeadOnly(head, hidden), batch).terms["tokens"]
        loss.backward()
        results.append((loss.item(), hidden.grad, head.weight.grad.clone()))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(one, other) for one, other in zip(results[0][1:], results[1][1:], strict=True))


def test_padding_on_the_left_changes_nothing():
    model, examples = language_model(), token_examples(LENGTHS)
    right = OBJECTIVE.prepare(examples)
    width = right["input_ids"].shape[1]
    shift = [width - len(e.token_ids) for e in examples]
    moved = {
        name: torch.stack([row.roll(by) for row, by in zip(right[name], shift, strict=True)])
        for name in ("input_ids", "loss_mask")
    }
    # Padding is a document of its own, whose positions end where the real one's begin.
    positions = torch.stack([torch.cat([torch.arange(by), torch.arange(width - by)]) for by in shift])
    left = Batch(moved | {"position_ids": positions, "lengths": right["lengths"]}, right.counts)
    assert_same_step(step(model, [right]), step(model, [left]))


@pytest.mark.parametrize("row_tokens", [15, 24, 1000])
def test_documents_that_share_rows_change_nothing(row_tokens: int):
    model, examples = language_model(), token_examples(LENGTHS)
    batch = OBJECTIVE.prepare(examples, Rows(row_tokens))
    assert len(batch["input_ids"]) < len(examples)
    assert_same_step(step(model, [OBJECTIVE.prepare(examples)]), step(model, [batch]))


def test_a_documents_first_token_is_no_target():
    everything = np.ones(3, dtype=bool)
    document = TokenExample(np.arange(3), everything)
    both = TokenExample(np.arange(6), np.ones(6, dtype=bool), np.array([0, 1, 2, 0, 1, 2]))
    assert OBJECTIVE.prepare([document])["loss_mask"].tolist() == [[False, True, True]]
    assert OBJECTIVE.prepare([both])["loss_mask"].tolist() == [[False, True, True] * 2]


@pytest.mark.parametrize("examples", [[], token_examples([1]), [TokenExample(np.arange(4), np.zeros(4, dtype=bool))]])
def test_nothing_to_learn_from_gives_no_loss_and_a_backward_that_works(examples: list[TokenExample]):
    batch = OBJECTIVE.prepare(examples)
    assert batch.counts == {"tokens": 0}
    loss, gradient = step(language_model(), [batch])
    assert loss == 0 and not gradient.any()
