"""How much the completions of a step repeat each other: distinct-n (Li et al. 2016, "A Diversity-Promoting Objective Function
for Neural Conversation Models", section 5.3). Rules narrow what a policy says; this shows it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmscale.batch import Trajectory


def distinct(completions: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams of tokens over all n-grams, 0..1; 0 where no completion has n tokens."""
    grams = [tuple(tokens[i : i + n]) for tokens in completions for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def diversity_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """distinct-1 and distinct-2 of what the policy produced; no n-gram reaches over a turn that is not its own."""
    runs = [run for t in trajectories for run in _runs(t.token_ids, t.loss_mask)]
    return {f"diversity/distinct_{n}": distinct(runs, n) for n in (1, 2)}


def _runs(token_ids: np.ndarray, mask: np.ndarray) -> list[list[int]]:
    """The stretches of tokens that the mask selects."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    return [token_ids[start:end].tolist() for start, end in edges.reshape(-1, 2)]
