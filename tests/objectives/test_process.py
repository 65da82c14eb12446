"""Process reward models against a loop written from the papers, in float64, and through a real scalar model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llmscale.batch import Batch, Rows, SteppedExample
from llmscale.engine.accounting import StepTotals
from llmscale.models.forward import ModelForward
from llmscale.objectives.config import ProcessConfig
from llmscale.objectives.process import Process
from tests.tiny import VOCAB_SIZE, scalar_model

OBJECTIVE = Process(ProcessConfig())
NAN = math.nan


def solutions(num: int = 7, seed: int = 0) -> list[SteppedExample]:
    """Of 3 to 14 random tokens; a third of them end a step that is labelled right, wrong, or by a probability."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(num):
        length = int(rng.integers(3, 15))
        labels = rng.choice([NAN] * 6 + [0.0, 1.0, 0.25], size=length).astype(np.float32)
        labels[-1] = rng.integers(0, 2)
        made.append(SteppedExample(rng.integers(0, VOCAB_SIZE, length), labels))
    return made


def loop(outputs: Sequence[Sequence[float]], examples: Sequence[SteppedExample]) -> float:
    """Lightman et al. 2023: log-likelihood of each labelled step, one after the other; the mean over the labelled steps."""
    losses = []
    for output, example in zip(outputs, examples, strict=True):
        for z, y in zip(output, example.labels.tolist(), strict=False):
            if not math.isnan(y):
                p = 1 / (1 + math.exp(-z))
                losses.append(-(y * math.log(p) + (1 - y) * math.log(1 - p)))
    return sum(losses) / len(losses)


def test_equals_the_paper():
    examples = solutions()
    batch = OBJECTIVE.prepare(examples)
    torch.manual_seed(0)
    output = torch.randn(batch["input_ids"].shape, dtype=torch.float64)
    sums = OBJECTIVE.loss(lambda _: output, batch)
    mean = sums.terms["steps"].item() / batch.counts["steps"]
    assert mean == pytest.approx(loop(output.tolist(), examples), abs=1e-9)
    assert batch.counts["steps"] == sum(int((~np.isnan(e.labels)).sum()) for e in examples)


def step(model: nn.Module, batches: Sequence[Batch]) -> tuple[dict[str, float], Tensor]:
    model.zero_grad()
    totals = StepTotals(batches)
    for batch in batches:
        totals.add(OBJECTIVE.loss(ModelForward(model), batch)).backward()
    return totals.metrics(), torch.cat([p.grad.flatten() for p in model.parameters()])


def test_metrics_are_over_all_steps_and_over_the_wrong_ones():
    model, examples = scalar_model(), solutions()
    metrics, _ = step(model, [OBJECTIVE.prepare(examples)])
    rows = [torch.from_numpy(e.token_ids)[None] for e in examples]
    with torch.no_grad():
        outputs = [model(row, torch.arange(row.shape[1])[None])[0].tolist() for row in rows]
    judged = [
        (z, y) for o, e in zip(outputs, examples, strict=True) for z, y in zip(o, e.labels, strict=True) if y == y
    ]
    assert metrics["loss"] == pytest.approx(loop(outputs, examples), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(np.mean([(z > 0) == (y >= 0.5) for z, y in judged]))
    assert metrics["accuracy_wrong"] == pytest.approx(np.mean([z <= 0 for z, y in judged if y < 0.5]))
    assert metrics["score"] == pytest.approx(np.mean([z for z, _ in judged]), abs=1e-5)


@pytest.mark.parametrize("sizes", [[1] * 7, [3, 4], [7, 0]])
def test_the_split_into_micro_batches_changes_nothing(sizes: list[int]):
    model, examples = scalar_model(), solutions()
    starts = np.cumsum([0, *sizes])
    parts = [examples[start : start + size] for start, size in zip(starts, sizes, strict=False)]
    whole, gradient = step(model, [OBJECTIVE.prepare(examples)])
    split, same = step(model, [OBJECTIVE.prepare(part) for part in parts])
    assert split == pytest.approx(whole, rel=1e-5, abs=1e-6)
    assert (gradient - same).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize("row_tokens", [14, 30, 1000])
def test_solutions_that_share_rows_change_nothing(row_tokens: int):
    model, examples = scalar_model(), solutions()
    padded, gradient = step(model, [OBJECTIVE.prepare(examples)])
    batch = OBJECTIVE.prepare(examples, Rows(row_tokens))
    assert len(batch["input_ids"]) < len(examples)
    packed, same = step(model, [batch])
    assert packed == pytest.approx(padded, rel=1e-5, abs=1e-6)
    assert (gradient - same).norm() < 1e-5 * gradient.norm()


def test_nan_between_the_steps_changes_nothing():
    batch = OBJECTIVE.prepare(solutions())
    torch.manual_seed(0)
    clean = torch.randn(batch["input_ids"].shape)
    labelled = ~batch["labels"].isnan()
    dirty = torch.where(labelled, clean, NAN)
    results = []
    for output in (clean.requires_grad_(), dirty.requires_grad_()):
        sums = OBJECTIVE.loss(lambda _, output=output: output, batch)
        sums.terms["steps"].backward()
        results.append((sums.terms["steps"].item(), output.grad))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])
    assert not results[0][1][~labelled].any()


def test_large_logits_do_not_overflow():
    batch = OBJECTIVE.prepare([SteppedExample(np.array([1, 2]), np.array([1.0, 0.0], dtype=np.float32))])
    output = torch.tensor([[-1e4, 1e4]], requires_grad=True)
    loss = OBJECTIVE.loss(lambda _: output, batch).terms["steps"]
    loss.backward()
    assert loss.item() == pytest.approx(2e4) and output.grad.tolist() == [[-1.0, 1.0]]


def test_nothing_to_learn_from_gives_no_loss_and_a_backward_that_works():
    unlabelled = SteppedExample(np.array([1, 2, 3]), np.full(3, NAN, dtype=np.float32))
    for examples in ([], [unlabelled]):
        metrics, gradient = step(scalar_model(), [OBJECTIVE.prepare(examples)])
        assert metrics["loss"] == 0 and not gradient.any()


def test_evidence_is_of_the_labels_that_are_sure():
    labels = np.array([1.0, NAN, 0.0, 0.25], dtype=np.float32)
    batch = OBJECTIVE.prepare([SteppedExample(np.array([1, 2, 3, 4]), labels)])
    output = torch.tensor([[2.0, 9.0, 3.0, 5.0]])
    assert OBJECTIVE.evidence(output, batch).tolist() == [2.0, -3.0]
    assert OBJECTIVE.scores(output, batch).tolist() == [2.0, 3.0, 5.0]
