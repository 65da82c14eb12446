"""Ranking losses against loops written from the papers, in float64, and through a real scalar model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llmscale.batch import Batch, RankedExample, Rows
from llmscale.engine.accounting import StepTotals
from llmscale.errors import DataError
from llmscale.models.attention import attend_by_document
from llmscale.models.forward import ModelForward
from llmscale.objectives.config import RankingConfig, RankingKind
from llmscale.objectives.ranking import Ranking, ranking_loss, untied_pairs
from tests.tiny import VOCAB_SIZE, scalar_model

KINDS = [kind.name for kind in RankingKind]
RANKINGS = [[1, 2], [2, 1], [1, 2, 3, 4], [3, 1, 4, 2], [1, 1, 2], [2, 1, 2, 3], [1, 3, 3, 3, 2, 1]]
TIED = [[1], [1, 1], [2, 2, 2]]


def pairs(scores: list[float], ranks: list[int]) -> float:
    """Ouyang et al. 2022, eq. 1: the mean over pairs of -log sigmoid(r_w - r_l)."""
    losses = []
    for w, winner in enumerate(ranks):
        for x, loser in enumerate(ranks):
            if winner < loser:
                losses.append(-math.log(1 / (1 + math.exp(-(scores[w] - scores[x])))))
    return sum(losses) / len(losses)


def plackett_luce(scores: list[float], ranks: list[int]) -> float:
    """Plackett 1975: choose the best, then the best of the rest, and so on; the last rank leaves no choice."""
    loss = 0.0
    for i, rank in enumerate(ranks):
        if rank < max(ranks):
            rest = [math.exp(scores[j]) for j, other in enumerate(ranks) if other >= rank]
            loss -= math.log(math.exp(scores[i]) / sum(rest))
    return loss


LOOPS = {"pairs": pairs, "plackett_luce": plackett_luce}


def scores_of(ranks: list[int]) -> Tensor:
    torch.manual_seed(len(ranks))
    return torch.randn(len(ranks), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", RANKINGS)
def test_equals_the_paper(kind: str, ranks: list[int]):
    scores = scores_of(ranks)
    loss = ranking_loss(scores, torch.tensor(ranks), kind)
    assert loss.item() == pytest.approx(LOOPS[kind](scores.tolist(), ranks), abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_two_completions_give_the_log_sigmoid_of_their_difference(kind: str):
    for ranks, sign in (([1, 2], 1), ([2, 1], -1)):
        scores = scores_of(ranks)
        expected = -torch.nn.functional.logsigmoid(sign * (scores[0] - scores[1]))
        assert ranking_loss(scores, torch.tensor(ranks), kind).item() == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", TIED)
def test_all_tied_is_exactly_zero_with_zero_gradient(kind: str, ranks: list[int]):
    scores = scores_of(ranks).requires_grad_()
    loss = ranking_loss(scores, torch.tensor(ranks), kind)
    loss.backward()
    assert loss.item() == 0 and scores.grad.tolist() == [0.0] * len(ranks)


@pytest.mark.parametrize("kind", KINDS)
def test_ties_are_not_pushed_apart(kind: str):
    scores = torch.tensor([0.3, 0.3, -0.2, 0.3], dtype=torch.float64, requires_grad=True)
    ranking_loss(scores, torch.tensor([1, 1, 2, 3]), kind).backward()
    assert scores.grad[0] == scores.grad[1] < 0 < scores.grad[3]


@pytest.mark.parametrize("kind", KINDS)
def test_permutations_and_shifts_change_nothing(kind: str):
    ranks = [2, 1, 3, 2]
    scores = scores_of(ranks)
    loss = ranking_loss(scores, torch.tensor(ranks), kind).item()
    for order in permutations(range(4)):
        moved = ranking_loss(scores[list(order)], torch.tensor(ranks)[list(order)], kind)
        assert moved.item() == pytest.approx(loss, abs=1e-9)
    assert ranking_loss(scores + 100, torch.tensor(ranks), kind).item() == pytest.approx(loss, abs=1e-9)
    assert ranking_loss(scores, 10 * torch.tensor(ranks), kind).item() == loss  # ranks are an order, not a distance


@pytest.mark.parametrize("kind", KINDS)
def test_large_scores_do_not_overflow(kind: str):
    scores = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = ranking_loss(scores, torch.tensor([1, 2]), kind)
    loss.backward()
    assert loss.item() == pytest.approx(2e4) and scores.grad.tolist() == [-1, 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", RANKINGS)
def test_the_gradient_is_that_of_the_paper(kind: str, ranks: list[int]):
    """Against central differences of the loop."""
    scores = scores_of(ranks).requires_grad_()
    ranking_loss(scores, torch.tensor(ranks), kind).backward()
    values, step = scores.tolist(), 1e-5
    for i in range(len(ranks)):
        up, down = ([x + (j == i) * sign * step for j, x in enumerate(values)] for sign in (1, -1))
        slope = (LOOPS[kind](up, ranks) - LOOPS[kind](down, ranks)) / (2 * step)
        assert scores.grad[i].item() == pytest.approx(slope, abs=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
@pytest.mark.parametrize("ranks", [[1, 2], [1, 1, 2], [1, 2, 2, 3]])
def test_huge_differences_are_finite_whichever_way_they_point(kind: str, size: float, ranks: list[int]):
    for direction in (1, -1):
        scores = (direction * size * torch.arange(len(ranks), dtype=torch.float32)).requires_grad_()
        loss = ranking_loss(scores, torch.tensor(ranks), kind)
        loss.backward()
        assert loss.isfinite() and loss >= 0 and scores.grad.isfinite().all()
        if direction == -1 and len(set(ranks)) == len(ranks):
            assert loss.item() == pytest.approx(0, abs=1e-6)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="pairs or plackett_luce"):
        ranking_loss(torch.zeros(2), torch.tensor([1, 2]), "pair")


def test_untied_pairs():
    assert set(zip(*untied_pairs([2, 1, 2, 3]), strict=True)) == {(1, 0), (1, 2), (0, 3), (1, 3), (2, 3)}
    assert untied_pairs([1, 1]) == ([], [])


# ---------------------------------------------------------------- through a model


def ranked(all_ranks: Sequence[Sequence[int]], seed: int = 0) -> list[RankedExample]:
    rng = np.random.default_rng(seed)
    return [
        RankedExample(tuple(rng.integers(0, VOCAB_SIZE, rng.integers(2, 12)) for _ in ranks), tuple(ranks))
        for ranks in all_ranks
    ]


def objective(kind: str) -> Ranking:
    return Ranking(RankingConfig(kind=RankingKind[kind]))


def step(model: nn.Module, kind: str, batches: Sequence[Batch]) -> tuple[dict[str, float], Tensor]:
    model.zero_grad()
    totals = StepTotals(batches)
    for batch in batches:
        totals.add(objective(kind).loss(ModelForward(model), batch)).backward()
    return totals.metrics(), torch.cat([p.grad.flatten() for p in model.parameters()])


def scores_alone(model: nn.Module, example: RankedExample) -> list[float]:
    rows = [torch.from_numpy(s)[None] for s in example.sequences]
    return [model(row, torch.arange(row.shape[1])[None])[0, -1].item() for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_over_rankings_that_are_not_all_tied(kind: str):
    model, examples = scalar_model(), ranked([*RANKINGS, *TIED])
    metrics, _ = step(model, kind, [objective(kind).prepare(examples)])
    scores = [scores_alone(model, e) for e in examples]
    losses = [LOOPS[kind](s, list(e.ranks)) for s, e in zip(scores, examples, strict=True) if len(set(e.ranks)) > 1]
    margins = [
        s[i] - s[j]
        for s, e in zip(scores, examples, strict=True)
        for i, a in enumerate(e.ranks)
        for j, b in enumerate(e.ranks)
        if a < b
    ]
    flat = [x for s in scores for x in s]
    assert len(losses) == len(RANKINGS)
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(np.mean([m > 0 for m in margins]))
    assert metrics["margin"] == pytest.approx(np.mean(margins), abs=1e-5)
    assert metrics["score"] == pytest.approx(np.mean(flat), abs=1e-5)
    assert metrics["num_tokens"] == sum(len(s) for e in examples for s in e.sequences)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [[1] * 7, [3, 4], [7, 0]])
def test_the_split_into_micro_batches_changes_nothing(kind: str, sizes: list[int]):
    model, examples = scalar_model(), ranked(RANKINGS)
    starts = np.cumsum([0, *sizes])
    parts = [examples[start : start + size] for start, size in zip(starts, sizes, strict=False)]
    whole, gradient = step(model, kind, [objective(kind).prepare(examples)])
    split, same = step(model, kind, [objective(kind).prepare(part) for part in parts])
    assert split == pytest.approx(whole, rel=1e-5, abs=1e-6)
    assert (gradient - same).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row_tokens", [12, 25, 1000])
def test_completions_that_share_rows_change_nothing(kind: str, row_tokens: int):
    model, examples = scalar_model(), ranked(RANKINGS)
    padded, gradient = step(model, kind, [objective(kind).prepare(examples)])
    batch = objective(kind).prepare(examples, Rows(row_tokens))
    assert batch["input_ids"].shape[1] <= row_tokens and len(batch["input_ids"]) < len(batch["ranks"])
    packed, same = step(model, kind, [batch])
    assert packed == pytest.approx(padded, rel=1e-5, abs=1e-6)
    assert (gradient - same).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_completions_that_begin_alike_share_that_and_change_nothing(kind: str):
    model, examples = scalar_model(), ranked(RANKINGS)
    for example in examples:
        for number, sequence in enumerate(example.sequences[1:]):
            beginning = min(2 + number, len(sequence) - 1, len(example.sequences[0]))
            sequence[:beginning] = example.sequences[0][:beginning]
    padded, gradient = step(model, kind, [objective(kind).prepare(examples)])
    assert attend_by_document(model)
    batch = objective(kind).prepare(examples, Rows(1000, branching=True))
    assert batch.num_tokens < sum(len(s) for e in examples for s in e.sequences)
    shared, same = step(model, kind, [batch])
    assert shared == pytest.approx(padded | {"num_tokens": float(batch.num_tokens)}, rel=1e-5, abs=1e-6)
    assert (gradient - same).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("all_ranks", [[], TIED])
def test_nothing_to_learn_from_gives_no_loss_and_a_backward_that_works(kind: str, all_ranks: list[list[int]]):
    metrics, gradient = step(scalar_model(), kind, [objective(kind).prepare(ranked(all_ranks))])
    assert metrics["loss"] == 0 and not gradient.any()


@pytest.mark.parametrize("kind", KINDS)
def test_nan_behind_a_rows_last_token_changes_nothing(kind: str):
    batch = objective(kind).prepare(ranked(RANKINGS))
    torch.manual_seed(0)
    clean = torch.randn(batch["input_ids"].shape)
    last = torch.arange(clean.shape[1])[None] == batch["lengths"][:, None] - 1
    dirty = torch.where(last, clean, float("nan"))
    results = []
    for output in (clean.requires_grad_(), dirty.requires_grad_()):
        sums = objective(kind).loss(lambda _, output=output: output, batch)
        sums.terms["rankings"].backward()
        results.append((sums.terms["rankings"].item(), output.grad))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])
    assert not results[0][1][~last].any()


# ---------------------------------------------------------------- margins


def with_ratings(all_ranks: Sequence[Sequence[int]]) -> list[RankedExample]:
    """A rating for each completion, one whole or half grade apart."""
    return [RankedExample(e.sequences, e.ranks, tuple(-r + 0.5 * (r > 2) for r in e.ranks)) for e in ranked(all_ranks)]


@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_margins_are_those_of_llama_2(margin: float):
    """Touvron et al. 2023, eq. 2, over every pair of a prompt: -log sigmoid(r_w - r_l - m)."""
    examples = with_ratings(RANKINGS)
    batch = Ranking(RankingConfig(margin=margin)).prepare(examples)
    torch.manual_seed(0)
    output = torch.randn(batch["input_ids"].shape, dtype=torch.float64, requires_grad=True)
    sums = Ranking(RankingConfig(margin=margin)).loss(lambda _: output, batch)
    scores, expected = output.detach().flatten()[batch["ends"]].tolist(), []
    start = 0
    for example in examples:
        losses = []
        for w, winner in enumerate(example.ranks):
            for x, loser in enumerate(example.ranks):
                if winner < loser:
                    m = margin * (example.ratings[w] - example.ratings[x])
                    losses.append(math.log(1 + math.exp(-(scores[start + w] - scores[start + x] - m))))
        expected.append(sum(losses) / len(losses))
        start += len(example.ranks)
    assert sums.terms["rankings"].item() == pytest.approx(sum(expected), abs=1e-9)
    plain = Ranking(RankingConfig()).loss(lambda _: output, batch)
    assert (sums.terms["rankings"].item() > plain.terms["rankings"].item() + 0.1) == (margin > 0)
    assert sums.metrics["accuracy"][0] == plain.metrics["accuracy"][0]  # of the scores themselves
    assert sums.metrics["margin"][0] == plain.metrics["margin"][0]


def test_a_margin_needs_ratings():
    objective = Ranking(RankingConfig(margin=1.0))
    with pytest.raises(DataError, match="without ratings") as caught:
        objective.prepare([*with_ratings([[1, 2]]), *ranked([[1, 2]])])
    assert "objective.margin=0" in str(caught.value)
    objective.prepare(ranked(TIED))  # which has no pair


def test_evidence_is_the_difference_of_each_pair():
    objective = Ranking(RankingConfig())
    batch = objective.prepare(ranked([[2, 1, 2], [1, 2]]))
    output = torch.arange(batch["input_ids"].numel()).double().reshape(batch["input_ids"].shape)
    scores = objective.scores(output, batch)
    assert len(scores) == 5
    assert sorted(objective.evidence(output, batch).tolist()) == sorted(
        [(scores[1] - scores[0]).item(), (scores[1] - scores[2]).item(), (scores[3] - scores[4]).item()]
    )
