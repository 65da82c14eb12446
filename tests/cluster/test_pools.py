"""The same contract on both backends: a local pool, and real Ray actors."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import wait
from functools import partial
from operator import length_hint
from pathlib import Path

import pytest

from llmscale.cluster.config import Backend, ClusterConfig, PoolConfig
from llmscale.cluster.pool import WorkerPool, opened_pools
from llmscale.errors import DataError, LlmscaleError, WorkerError


class Adder:
    """A role of these tests."""

    def __init__(self, amount: int):
        self.amount = amount

    def rank(self) -> int:
        return int(os.environ.get("RANK", "0"))

    def add_each(self, numbers: list[int]) -> list[int]:
        return [n + self.amount for n in numbers]

    def add(self, number: int) -> int:
        time.sleep(0.02 * (number % 3))  # units end out of order
        return number + self.amount

    def refuse(self) -> None:
        raise DataError("malformed", where="file.jsonl:3", fix="Mend it.")

    def break_on(self, rank: int) -> int:
        if self.rank() == rank:
            raise ZeroDivisionError("no")
        time.sleep(30)  # as a peer that waits in a collective would
        return 0

    def die(self) -> None:
        os._exit(1)


@pytest.fixture(scope="module")
def ray_pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, WorkerPool]]:
    half = PoolConfig(1, 0.5)
    cluster = ClusterConfig(backend=Backend.ray, reference=PoolConfig(2, 0.5), reward=half, max_restarts=0)
    roles = {"reference": partial(Adder, 10), "reward": partial(Adder, 100)}
    with opened_pools(cluster, roles, tmp_path_factory.mktemp("logs")) as pools:
        yield pools


@pytest.fixture
def local_pools(tmp_path: Path) -> Iterator[Mapping[str, WorkerPool]]:
    with opened_pools(ClusterConfig(), {"reference": partial(Adder, 10), "reward": partial(Adder, 100)}, tmp_path) as p:
        yield p


@pytest.mark.parametrize("backend", ["local_pools", "ray_pools"])
def test_calls_give_results_in_order(backend: str, request: pytest.FixtureRequest) -> None:
    pools: Mapping[str, WorkerPool] = request.getfixturevalue(backend)
    pool = pools["reference"]
    assert pool.call(Adder.rank).wait() == list(range(pool.num_workers))
    assert pool.map(Adder.add_each, [1, 2, 3, 4, 5]).wait() == [11, 12, 13, 14, 15]
    assert pool.map(Adder.add_each, [1]).wait() == [11]
    assert pool.map(Adder.add_each, []).wait() == []
    assert pool.units(Adder.add, range(12)).wait() == [n + 10 for n in range(12)]
    assert pools["reward"].units(Adder.add, []).wait() == []
    assert pools["reward"].call(Adder.add, 1).wait() == [101]


@pytest.mark.parametrize("backend", ["local_pools", "ray_pools"])
def test_a_stream_is_in_order_and_takes_no_more_than_it_needs(backend: str, request: pytest.FixtureRequest) -> None:
    pool: WorkerPool = request.getfixturevalue(backend)["reference"]
    units = iter(range(60))
    for turn, result in enumerate(pool.stream(Adder.add, units)):
        assert result == turn + 10
        taken = 60 - length_hint(units)
        assert turn < taken <= turn + pool.ahead * pool.num_workers
    assert turn == 59
    assert list(pool.stream(Adder.add, [])) == []
    with pytest.raises(WorkerError, match="TypeError") if backend == "ray_pools" else pytest.raises(TypeError):
        list(pool.stream(Adder.add, [1, 2, "three", 4]))
    assert list(pool.stream(Adder.add, [1])) == [11], "a stream that failed leaves workers that work"


@pytest.mark.parametrize("backend", ["local_pools", "ray_pools"])
def test_units_go_on_while_the_driver_does_something_else(backend: str, request: pytest.FixtureRequest) -> None:
    pools: Mapping[str, WorkerPool] = request.getfixturevalue(backend)
    tasks = [pools["reference"].submit(Adder.add, n) for n in range(12)]
    assert not wait(tasks, timeout=20).not_done, "although nobody has asked for a result"
    made = [pools["reward"].submit(Adder.add, task) for task in tasks]  # from worker to worker
    assert [task.result() for task in made] == [n + 110 for n in range(12)]


@pytest.mark.parametrize("backend", ["local_pools", "ray_pools"])
def test_an_error_of_ours_arrives_as_it_was_raised(backend: str, request: pytest.FixtureRequest) -> None:
    with pytest.raises(DataError) as caught:
        request.getfixturevalue(backend)["reward"].call(Adder.refuse).wait()
    assert (caught.value.where, caught.value.fix) == ("file.jsonl:3", "Mend it.")


def test_any_other_error_names_role_rank_and_log_without_waiting_for_peers(ray_pools: Mapping[str, WorkerPool]) -> None:
    started = time.monotonic()
    with pytest.raises(WorkerError, match="ZeroDivisionError: no") as caught:
        ray_pools["reference"].call(Adder.break_on, 1).wait()
    assert time.monotonic() - started < 10
    assert caught.value.where == "reference 1" and "reference-1.log" in str(caught.value.fix)


def test_a_dead_worker_is_named(tmp_path: Path, ray_pools: Mapping[str, WorkerPool]) -> None:
    with pytest.raises(WorkerError, match="died") as caught:
        ray_pools["reward"].call(Adder.die).wait()
    assert caught.value.where == "reward 0"


def test_errors_survive_pickling() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(DataError("what", where="here", fix="this")))
    assert isinstance(error, DataError) and isinstance(error, LlmscaleError)
    assert str(error) == "here: what\n  this"
