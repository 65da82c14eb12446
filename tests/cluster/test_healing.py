"""Workers that are killed, stopped or poisoned, in real Ray actors: others take their place with the state that they had,
and no result differs."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from llmscale.cluster.config import Backend, ClusterConfig, PoolConfig
from llmscale.cluster.pool import WorkerPool, opened_pools
from llmscale.errors import DataError, WorkerError, WorkerLostError

LIMIT_S = 5.0
MANY = 60  # versions that a unit writes, three seconds


class Keeper:
    """A role with state that units count on, as the weights of a rollout engine."""

    def __init__(self) -> None:
        self.version = self.announced = 0

    def hold(self, version: int) -> None:
        if version <= self.version:
            raise DataError(f"{version} offered where {self.version} is held")
        self.version = version

    def announce(self, version: int) -> None:
        self.announced = version

    def write(self, begun: list[int]) -> list[int]:
        """Many versions, one after another, unless a newer one is announced."""
        while len(begun) < MANY and self.announced <= self.version:
            time.sleep(0.05)
            begun = [*begun, self.version]
        return begun

    def add(self, unit: tuple[int, int]) -> tuple[int, int]:
        number, version = unit
        if version != self.version:
            raise DataError(f"{version} asked for where {self.version} is held")
        time.sleep(0.05)
        return number + 100, version

    def double(self, numbers: list[int]) -> list[int]:
        time.sleep(0.5)
        return [2 * n for n in numbers]

    def divide(self, number: int) -> float:
        if number == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return 1 / number

    def pid(self) -> int:
        return os.getpid()


Events = list[dict[str, Any]]


@pytest.fixture(scope="module")
def healing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Mapping[str, WorkerPool], Events]]:
    two = PoolConfig(2, 0.5)
    cluster = ClusterConfig(backend=Backend.ray, rollout=two, policy=two, answer_timeout_s=LIMIT_S, max_restarts=2)
    events: Events = []
    roles = dict.fromkeys(("rollout", "reward", "policy"), Keeper)
    event = lambda kind, **details: events.append({"kind": kind, **details})  # noqa: E731
    with opened_pools(cluster, roles, tmp_path_factory.mktemp("logs"), event) as pools:
        yield pools, events


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_workers_lost_at_work_or_between_are_replaced_with_what_they_held(
    healing: tuple[Mapping[str, WorkerPool], Events], how: int
) -> None:
    pools, events = healing
    pool, version = pools["rollout"], 1 if how == signal.SIGKILL else 3
    events.clear()
    pool.install(Keeper.hold, version).wait()
    pids = pool.call(Keeper.pid).wait()
    units = pool.units(Keeper.add, [(n, version) for n in range(80)])
    time.sleep(0.3)
    os.kill(pids[0], how)
    assert units.wait() == [(n + 100, version) for n in range(80)]
    fresh = pool.call(Keeper.pid).wait()
    assert fresh[0] != pids[0] and fresh[1] == pids[1]
    os.kill(fresh[1], how)  # between two calls, and all that are left
    os.kill(fresh[0], how)
    assert pool.map(Keeper.double, [1, 2, 3]).wait() == [2, 4, 6]
    pool.install(Keeper.hold, version + 1).wait()
    units = pool.units(Keeper.add, [(n, version + 1) for n in range(4)])
    assert units.wait() == [(n + 100, version + 1) for n in range(4)]
    cause = "died" if how == signal.SIGKILL else "hung"
    lost = [e for e in events if e["kind"] == "worker_lost"]
    assert sorted(e["where"] for e in lost) == ["rollout 0", "rollout 0", "rollout 1"]
    assert {e["cause"] for e in lost} == {cause}
    replaced = [e for e in events if e["kind"] == "worker_replaced"]
    assert len(replaced) == 3 and all(e["seconds"] < 120 for e in replaced)  # about 3 where nothing else runs


def test_units_are_broken_off_for_new_state_and_go_on_with_it(
    healing: tuple[Mapping[str, WorkerPool], Events],
) -> None:
    pool = healing[0]["rollout"]
    pool.install(Keeper.hold, 10).wait()
    rest = lambda begun, written: written if len(written) < MANY else None  # noqa: E731
    units = [pool.submit(Keeper.write, [n], rest=rest) for n in range(3)]
    while not all(d.method == "write" for d in pool.doing()):
        time.sleep(0.01)
    time.sleep(0.3)
    taken = pool.install(Keeper.hold, 11)
    pool.aside(Keeper.announce, 11)
    taken.wait()
    assert not any(unit.done() for unit in units), "nobody has waited for their end"
    pool.aside(Keeper.announce, 11)  # late, it changes nothing
    first, second, third = [unit.result() for unit in units]
    for n, written in enumerate([first, second]):
        assert written == [n, *sorted(written[1:])] and len(written) == MANY and set(written[1:]) == {10, 11}
    assert third == [2, *[11] * (MANY - 1)], "the units that were broken off went on before it began"


def test_what_is_broken_off_for_state_that_nobody_takes_up_is_told_why(
    healing: tuple[Mapping[str, WorkerPool], Events],
) -> None:
    """Else it would be broken off again and again."""
    pool = healing[0]["rollout"]
    rest = lambda begun, written: written if len(written) < MANY else None  # noqa: E731
    nearly = [0] * (MANY - 2)
    pool.install(Keeper.hold, 20).wait()
    with pytest.raises(DataError, match="20 offered where 20 is held"):
        pool.install(Keeper.hold, 20).wait()
    pool.aside(Keeper.announce, 21)
    with pytest.raises(DataError, match="20 offered where 20 is held"):
        while pool.submit(Keeper.write, nearly, rest=rest).result():  # the announcement is on its way
            continue
    pool.install(Keeper.hold, 21).wait()
    assert pool.submit(Keeper.write, nearly, rest=rest).result() == [*nearly, 21, 21]


def test_a_unit_that_kills_three_workers_is_set_aside(healing: tuple[Mapping[str, WorkerPool], Events]) -> None:
    pools, events = healing
    events.clear()
    found = pools["reward"].units(Keeper.divide, [1, 13, 2], instead=lambda unit, why: (unit, why)).wait()
    assert found[::2] == [1.0, 0.5] and found[1][0] == 13
    assert found[1][1].startswith("3 workers were lost over this unit of divide: reward 0 (died)")
    lost = [e["restarts_left"] for e in events if e["kind"] == "worker_lost"]
    assert lost == [2, 1, 0], "which are given back: see the next test but one"


def test_what_cannot_be_sent_is_an_error_of_the_call_alone(healing: tuple[Mapping[str, WorkerPool], Events]) -> None:
    pool = healing[0]["rollout"]
    with pytest.raises(TypeError, match="pickle"):
        pool.submit(Keeper.divide, threading.Lock()).result()
    assert pool.submit(Keeper.divide, 2).result() == 0.5


def test_what_a_role_raises_is_not_tried_again(healing: tuple[Mapping[str, WorkerPool], Events]) -> None:
    pools, events = healing
    pools["reward"].call(Keeper.pid).wait()  # all are up again
    events.clear()
    with pytest.raises(WorkerError, match="ZeroDivisionError"):
        pools["reward"].units(Keeper.divide, [1, 0]).wait()
    assert events == []


def test_a_worker_that_is_lost_again_and_again_stops_the_pool(healing: tuple[Mapping[str, WorkerPool], Events]) -> None:
    pool = healing[0]["reward"]
    with pytest.raises(WorkerError, match=r"this worker died, after 2 restarts within an hour \(died\)") as caught:
        for _ in range(4):
            os.kill(pool.call(Keeper.pid).wait()[0], signal.SIGKILL)
    assert type(caught.value) is WorkerError and "cluster.max_restarts" in str(caught.value.fix)


def test_ranks_that_work_together_are_lost_together(healing: tuple[Mapping[str, WorkerPool], Events]) -> None:
    pool = healing[0]["policy"]
    os.kill(pool.call(Keeper.pid).wait()[1], signal.SIGSTOP)
    for _ in range(2):  # no call waits for ever
        with pytest.raises(WorkerLostError, match="has not answered for 5 s") as caught:
            pool.map(Keeper.double, [1, 2]).wait()
        assert caught.value.where == "policy 1"
