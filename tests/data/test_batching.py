"""A step's examples as micro-batches of every rank."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from llmscale.batch import Branch, branches_of
from llmscale.data.batching import Prefetcher, TokenBudget


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(10))
def test_every_example_once_and_every_rank_as_many_parts_of_like_size(world_size: int, seed: int, packed: bool):
    rng = np.random.default_rng(seed)
    lengths = rng.lognormal(4, 0.8, size=rng.integers(1, 80)).astype(int).clip(1, 256)
    budget = TokenBudget(tokens=512, packed=packed)
    ranks = [budget.parts(lengths, rank, world_size) for rank in range(world_size)]
    assert sorted(i for parts in ranks for part in parts for i in part) == list(range(len(lengths)))
    assert len({len(parts) for parts in ranks}) == 1
    loads = [[int(lengths[part].sum()) for part in parts] for parts in ranks]
    assert max(map(max, loads)) <= 512
    if packed:
        assert max(map(sum, loads)) - min(map(sum, loads)) <= lengths.max() * len(loads[0])


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("seed", range(10))
def test_samples_of_a_prompt_stay_together_as_far_as_they_fit(world_size: int, seed: int):
    rng = np.random.default_rng(seed)
    prompts = rng.integers(20, 100, size=8)
    lengths = [int(prompt + rng.integers(1, 64)) for prompt in prompts for _ in range(8)]
    branches = [Branch(i - i % 8, int(prompts[i // 8]) - 1) if i % 8 else None for i in range(64)]
    budget = TokenBudget(tokens=400, packed=True, branching=True)
    ranks = [budget.parts(lengths, rank, world_size, branches) for rank in range(world_size)]
    assert sorted(i for parts in ranks for part in parts for i in part) == list(range(64))
    computed = 0
    for part in (part for parts in ranks for part in parts):
        own = [branches_of([np.arange(lengths[i]) for i in part], [i // 8 for i in part], [lengths[i] for i in part])]
        shared = [min(b.shared, int(prompts[i // 8]) - 1) if b else 0 for i, b in zip(part, own[0], strict=True)]
        assert sum(lengths[i] for i in part) - sum(shared) <= 400
        computed += sum(lengths[i] for i in part) - sum(shared)
    apart = sum(len(p) for p in [TokenBudget(400, packed=True).parts(lengths)])
    assert computed <= sum(lengths) - sum(int(p) - 1 for p in prompts) * 5 and apart > sum(map(len, ranks))


def test_an_example_beyond_the_budget_has_a_part_of_its_own():
    assert TokenBudget(4, packed=True).parts([9, 2, 2]) == [[0], [1, 2]]


@pytest.mark.parametrize("packed", [True, False])
def test_nothing_gives_every_rank_an_empty_part(packed: bool):
    assert [TokenBudget(4, packed).parts([], rank, 2) for rank in range(2)] == [[[]], [[]]]


def test_the_next_step_is_made_meanwhile():
    made, second = [], threading.Event()

    def make(step: int) -> int:
        made.append(step)
        if step == 1:
            second.set()
        return step * 10

    prefetched = Prefetcher(make, num_steps=3)
    assert prefetched(0) == 0
    assert second.wait(30)
    assert [prefetched(step) for step in (1, 2)] == [10, 20]
    assert made == [0, 1, 2]
    assert prefetched(0) == 0  # rolled back
    prefetched.close()


def test_what_fails_in_advance_is_raised_when_its_turn_comes():
    def make(step: int) -> int:
        if step == 1:
            raise ValueError("step 1")
        return step

    prefetched = Prefetcher(make, num_steps=3)
    assert prefetched(0) == 0
    with pytest.raises(ValueError, match="step 1"):
        prefetched(1)
    prefetched.close()
