from __future__ import annotations

import pytest

from llmscale.data.loader import SampleOrder, micro_batches, shard
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


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("size", [8, 7, 3])
def test_shards_cover_the_same_global_batch(world_size, size):
    batch = SampleOrder(100, 0).batch(3, size)
    parts = [shard(batch, rank, world_size) for rank in range(world_size)]
    assert sorted(i for part in parts for i in part) == sorted(batch)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_micro_batches_keep_order_and_everything():
    assert micro_batches([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]
    assert micro_batches([], 2) == []


def test_nothing_to_draw_from_is_refused():
    with pytest.raises(DataError, match="no examples"):
        SampleOrder(0, 0)
