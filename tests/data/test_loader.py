from __future__ import annotations

import time

import pytest

from llmscale.data.batching import TokenBudget
from llmscale.data.config import DataConfig
from llmscale.data.loader import SampleOrder, micro_batches
from llmscale.data.mixing import MixedOrder, Mixture
from llmscale.errors import DataError


def stream(order: SampleOrder, size: int, steps: range) -> list[int]:
    return [i for step in steps for i in order.batch(step, size)]


@pytest.mark.parametrize("size", [1, 3, 10, 25])
def test_every_epoch_is_a_permutation(size):
    drawn = stream(SampleOrder(10, seed=3), size, range(60))
    epochs = [drawn[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_order_does_not_depend_on_the_batch_size():
    assert stream(SampleOrder(7, 0), 2, range(21)) == stream(SampleOrder(7, 0), 14, range(3))


def test_any_step_can_be_asked_for_first():
    order = SampleOrder(11, 5)
    straight = [order.batch(step, 4) for step in range(20)]
    assert [SampleOrder(11, 5).batch(step, 4) for step in range(20)] == straight
    assert [order.batch(step, 4) for step in reversed(range(20))] == straight[::-1]


def test_seeds_give_other_orders():
    assert len({tuple(SampleOrder(20, seed).batch(0, 20)) for seed in (-1, 0, 1, 2**40)}) == 4


def shares(batch: list[int], world_size: int, packed: bool = True) -> list[list[list[int]]]:
    """The micro-batches of each rank: sample i has 1 + i % 9 tokens."""
    budget = TokenBudget(20, packed)
    ranks = [budget.parts([1 + i % 9 for i in batch], rank, world_size) for rank in range(world_size)]
    return [[[batch[i] for i in part] for part in parts] for parts in ranks]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("size", [8, 7, 3])
def test_ranks_share_out_the_same_global_batch(world_size, size, packed):
    batch = SampleOrder(100, 0).batch(3, size)
    ranks = shares(batch, world_size, packed)
    assert sorted(i for parts in ranks for part in parts for i in part) == sorted(batch)
    assert len({len(parts) for parts in ranks}) == 1


# ---------------------------------------------------------------- the position in the data is the step number

SIZES = {"web": 300, "books": 40}
MIXTURE = Mixture.of(SIZES, DataConfig(mixture={name: "f" for name in SIZES}, mixture_temperature=2.0))
ORDERS = {"one source": lambda: SampleOrder(340, 3), "a mixture": lambda: MixedOrder(MIXTURE, 3)}


def seen(order, steps: range, world_size: int, size: int = 24) -> list[int]:
    """What the ranks of one attempt take from the data in each step, together."""
    return [
        index
        for step in steps
        for index in sorted(i for parts in shares(order.batch(step, size), world_size) for part in parts for i in part)
    ]


@pytest.mark.parametrize("new_order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("stop", [1, 7, 199])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2), (4, 2), (2, 3)])
def test_a_continued_run_sees_what_remains_in_the_same_global_order(new_order, stop, before, after):
    uninterrupted = seen(new_order(), range(250), world_size=1)
    continued = seen(new_order(), range(stop), before) + seen(new_order(), range(stop, 250), after)
    assert continued == uninterrupted
    assert len(set(uninterrupted)) == 340


def test_the_order_of_a_seed_stays_as_it_is():
    """Written down, so that no version continues a run of an earlier one with other samples."""
    assert SampleOrder(10, 3).batch(1, 8) == [0, 3, 9, 7, 1, 3, 0, 2]
    assert MixedOrder(MIXTURE, 3).batch(1, 8) == [296, 241, 221, 257, 250, 264, 81, 171]


def test_drawing_a_batch_takes_microseconds():
    order = SampleOrder(100_000, 0)
    order.batch(0, 1)
    started = time.process_time()
    for step in range(200):
        order.batch(step, 256)
    assert (time.process_time() - started) / 200 < 500e-6, "it takes 20 on an idle machine"


def test_micro_batches_keep_order_and_everything():
    assert micro_batches([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]
    assert micro_batches([], 2) == []


def test_nothing_to_draw_from_is_refused():
    with pytest.raises(DataError, match="no examples"):
        SampleOrder(0, 0)
