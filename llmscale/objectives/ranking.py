"""Reward modelling from K ranked completions of one prompt.

`pairs`: L = -1/|P| sum_{(w,l) in P} log sigmoid(r_w - r_l), P the pairs that are not tied (Ouyang et al. 2022, eq. 1,
where |P| = C(K, 2)). All pairs of a prompt are one element, so that a prompt with many completions weighs as much as
one with few, and they share one step: as separate examples each completion would be seen K-1 times and over-fitted.
`plackett_luce`: L = -sum_i log(exp r_i / sum_{j ranked i or lower} exp r_j) (Plackett 1975); a tied completion counts
among those that are not better (as Breslow 1974 has it), so that ties push nothing apart. The last rank adds nothing.

Graded ratings set margins: L = -log sigmoid(r_w - r_l - m (g_w - g_l)) with ratings g (Touvron et al. 2023, Llama 2, eq. 2,
whose m(r) is the grade of a pair). It is the same loss of the scores r - m g.

Normalised by the number of rankings that are not all tied. Legend: K completions, P pairs, B rows (all completions).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from llmscale.batch import APART, Batch, Layout, RankedExample, Rows, branches_of
from llmscale.errors import DataError
from llmscale.functional import masked_sum
from llmscale.objectives.config import RankingConfig
from llmscale.protocols import Forward, LossSums


def ranking_loss(scores: Tensor, ranks: Tensor, kind: str) -> Tensor:
    """The loss of one ranking, a scalar; exactly zero when all are tied.

    scores: [K] rewards; ranks: [K], 1 = best, equal numbers = tied; kind: "pairs" or "plackett_luce".
    """
    if kind not in ("pairs", "plackett_luce"):
        raise ValueError(f"unknown ranking loss {kind!r}: pairs or plackett_luce")
    winner, loser = untied_pairs(ranks.tolist())
    if not winner:
        return masked_sum(scores, torch.zeros_like(scores))
    if kind == "pairs":
        return torch.nn.functional.softplus(scores[loser] - scores[winner]).mean()
    not_better = ranks.unsqueeze(0) >= ranks.unsqueeze(1)  # [K, K]: j is ranked as i or lower
    tied_last = ranks == ranks.max()
    totals = torch.where(not_better, scores.unsqueeze(0), float("-inf")).logsumexp(-1)
    return torch.where(tied_last, torch.zeros_like(scores), totals - scores).sum()


def untied_pairs(ranks: Sequence[int]) -> tuple[list[int], list[int]]:
    """Indexes of the better and of the worse completion of each pair that is not tied."""
    ordered = [(i, j) if ranks[i] < ranks[j] else (j, i) for i, j in combinations(range(len(ranks)), 2)]
    pairs = [(w, loser) for w, loser in ordered if ranks[w] != ranks[loser]]
    return [w for w, _ in pairs], [loser for _, loser in pairs]


class Ranking:
    """Term `rankings`; metrics: `accuracy` over pairs, `margin` (mean r_w - r_l), `score` over completions."""

    def __init__(self, config: RankingConfig):
        self.config = config

    def prepare(self, examples: Sequence[RankedExample], rows: Rows = APART) -> Batch:
        sequences: list[np.ndarray] = []
        ranks: list[int] = []
        group: list[int] = []
        winners: list[int] = []
        losers: list[int] = []
        ratings: list[float] = []
        for index, example in enumerate(examples):
            better, worse = untied_pairs(example.ranks)
            winners += [len(sequences) + i for i in better]
            losers += [len(sequences) + i for i in worse]
            sequences += list(example.sequences)
            ranks += list(example.ranks)
            group += [index] * len(example.ranks)
            ratings += self.ratings(example)
        lengths = [len(s) for s in sequences]
        layout = Layout(lengths, rows, branches_of(sequences, group, [n - 1 for n in lengths]))
        tensors = layout.tensors(sequences) | {"ends": layout.ends}
        tensors |= {"ranks": torch.tensor(ranks).long(), "group": torch.tensor(group).long()}
        tensors |= {"winners": torch.tensor(winners).long(), "losers": torch.tensor(losers).long()}
        tensors |= {"ratings": torch.tensor(ratings, dtype=torch.float64)}
        untied = sum(len(set(e.ranks)) > 1 for e in examples)
        return Batch(
            tensors, {"rankings": float(untied), "pairs": float(len(winners)), "completions": float(len(sequences))}
        )

    def loss(self, forward: Forward, batch: Batch) -> LossSums:
        output = forward(batch)
        scores = self.scores(output, batch)
        led = scores - self.config.margin * batch["ratings"].to(scores.dtype)  # what is left once each leads enough
        # Zero, but with a path to the weights: a rank without examples must take part in the backward.
        total = masked_sum(output, torch.zeros_like(output))
        for index in batch["group"].unique():
            own = (batch["group"] == index).nonzero().squeeze(-1)
            total = total + ranking_loss(led[own], batch["ranks"][own], self.config.kind.name)
        scores, margins = scores.detach(), self.evidence(output.detach(), batch)
        metrics = {
            "accuracy": ((margins > 0).float().sum(), "pairs"),
            "margin": (margins.sum(), "pairs"),
            "score": (scores.sum(), "completions"),
        }
        return LossSums({"rankings": total}, metrics)

    def scores(self, output: Tensor, batch: Batch) -> Tensor:
        """The reward of each completion."""
        return output.flatten()[batch["ends"]]

    def evidence(self, output: Tensor, batch: Batch) -> Tensor:
        """r_w - r_l of each pair: the log-odds that the model gives to what people said."""
        scores = self.scores(output, batch)
        return scores[batch["winners"]] - scores[batch["losers"]]

    def ratings(self, example: RankedExample) -> Sequence[float]:
        """Of its completions; zeros where margins do not matter.

        Raises: DataError where they do and it has none.
        """
        if example.ratings is None and self.config.margin > 0 and len(set(example.ranks)) > 1:
            fix = "Give `margin` to chosen and rejected or `ratings` to completions, or set objective.margin=0."
            raise DataError("there is a ranking without ratings, which margins follow from", where="data", fix=fix)
        return example.ratings or [0.0] * len(example.ranks)
