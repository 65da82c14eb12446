"""RLHF over Ray pools whose workers are killed and stopped while it trains: the command ends by itself, with the metrics and
weights of an undisturbed run in one process, and leaves no process behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llmscale.cluster.environment import set_ray_environment
from tests.stages.runs import DEADLINE_S, arguments, from_chain, num_lines, records, succeed
from tests.stages.test_lost_workers import assert_nothing_left, assert_undisturbed, wait_until
from tests.stages.test_on_ray import command

LONGER = ["training.num_steps=12", "training.save_every_steps=4", "training.eval_every_steps=6"]
POOLS = ["cluster=ray", "cluster.rollout.num_workers=2", "cluster.answer_timeout_s=5"]
UNHURRIED = "cluster.answer_timeout_s=30"  # where nobody hangs


@pytest.fixture(scope="module")
def in_one_process(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    succeed(arguments("rlhf", folder, *from_chain("rlhf", chain), *LONGER), folder / "log")
    return folder / "demo" / "rlhf"


class Disturbed:
    """The command, and what is done to its workers."""

    def __init__(self, argv: list[str], folder: Path):
        self.run_dir, self.log = folder / "demo" / "rlhf", folder / "log"
        self.process = command([a for a in argv if a != "cluster=local"], self.log)

    def until(self, condition: Callable[[], bool]) -> None:
        wait_until(condition, self.process, self.log)

    def until_step(self, step: int) -> None:
        """Has begun: the ones before it are logged."""
        self.until(lambda: bool(m := self.of("metrics")) and m[-1]["step"] >= step - 1)

    def of(self, name: str) -> list[dict[str, Any]]:
        file = self.run_dir / f"{name}.jsonl"
        return records(file) if num_lines(file) else []

    def pid(self, worker: str) -> int:
        """Of the process that is this worker now: its log has a line for each."""
        log = (self.run_dir / "attempts" / "1" / f"{worker}.log").read_text()
        return int(re.findall(r"^rank .* pid (\d+)$", log, re.MULTILINE)[-1])

    def signal(self, worker: str, how: int) -> None:
        os.kill(self.pid(worker), how)

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [e for e in self.of("events") if e["kind"] == kind]

    def finish(self) -> None:
        assert self.process.wait(DEADLINE_S) == 0, self.log.read_text()
        assert_nothing_left()


@contextmanager
def disturbed(chain: Path, folder: Path, *more: str) -> Iterator[Disturbed]:
    run = Disturbed(arguments("rlhf", folder, *from_chain("rlhf", chain), *LONGER, *POOLS, *more), folder)
    try:
        yield run
    finally:
        run.process.kill()
        run.process.wait()


@pytest.mark.slow  # minutes; the parts are in tests/cluster/test_healing.py
def test_lost_workers_are_replaced_and_lost_ranks_go_back(chain: Path, in_one_process: Path, tmp_path: Path) -> None:
    with disturbed(chain, tmp_path) as run:
        run.until_step(3)
        run.signal("rollout-0", signal.SIGKILL)
        run.until(lambda: len(run.events("worker_replaced")) == 1)
        run.signal("reward-0", signal.SIGKILL)
        run.signal("reference-0", signal.SIGKILL)
        run.signal("rollout-1", signal.SIGSTOP)
        run.until(lambda: len(run.events("worker_replaced")) == 4)
        run.until_step(7)  # beyond a checkpoint
        run.signal("policy-0", signal.SIGKILL)
        run.finish()
        assert_undisturbed(run.run_dir, in_one_process)
        lost = [(e["where"], e["cause"]) for e in run.events("worker_lost")]
        assert lost[0] == ("rollout 0", "died") and lost[-1] == ("policy 0", "died")
        assert sorted(lost[1:-1]) == [("reference 0", "died"), ("reward 0", "died"), ("rollout 1", "hung")]
        assert all(
            e["seconds"] < 120 for e in run.events("worker_replaced")
        )  # 9 alone, 35 three at a time, on a busy machine
        assert [e["step"] for e in run.events("resumed")] in ([4], [8])
        versions = [s["weight_versions"][-1] for s in run.of("samples")]
        assert versions == sorted(versions) and len(set(versions)) == 12


REWARD = """
import os, time
from pathlib import Path

here = Path(__file__).parent

def reward(prompt, completion, fields):
    poison = here / "poison"
    if not poison.exists():
        poison.write_text(prompt)
    if poison.read_text() == prompt:
        os.kill(os.getpid(), 9)
    while (here / "stall").exists():
        time.sleep(0.1)
    return -len(completion)
"""


@pytest.mark.slow  # the parts are in tests/cluster/test_healing.py and test_progress.py
def test_a_sample_that_kills_is_left_out_and_a_reward_that_never_comes_ends_the_run(
    chain: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(REWARD)
    own = ["reward=function", f"reward.path={tmp_path}/mine.py:reward", "rollout.unit_size=4", "data.validation=null"]
    own += [f"critic.path={chain}/demo/sft", "cluster.progress_timeout_s=10"]
    with disturbed(chain, tmp_path, *own) as run:
        run.until_step(2)
        (tmp_path / "stall").touch()
        assert run.process.wait(DEADLINE_S) == 1
        assert_nothing_left()
        first, *_ = run.of("metrics")
        assert first["step"] == 1 and first["reward/excluded"] == 4.0
        left_out = run.events("sample_excluded")
        assert [e["draw_id"] for e in left_out] in ([0, 1, 2, 3], [4, 5, 6, 7])  # whichever unit ended first
        assert all(e["why"].startswith("3 workers were lost over this unit of score: reward 0") for e in left_out)
        *_, warned, ended = run.events("stalled")  # a slow machine may have been warned of before
        assert "the driver is in score" in warned["why"] and "reward 0 (pid " in warned["why"]
        assert "is at score, for" in ended["why"] and "; this run ends; " in ended["why"]
        assert ended["why"] in run.log.read_text()


@pytest.mark.slow  # the parts are in tests/test_disk.py and tests/cluster/test_intake.py
def test_damaged_weights_and_a_full_disk_change_nothing(
    chain: Path, in_one_process: Path, tmp_path: Path, small_disk: Path
) -> None:
    """The run directory lies on a disk of its own, which is filled for seconds at a time. The seed: first it is filled, then
    a bit is flipped, both at once, for these runs are short."""
    subprocess.run(["mount", "-o", "remount,size=100m", small_disk], check=True)
    faults = [
        "chaos=faults",
        "chaos.seed=83",
        "chaos.every_s=1",
        "chaos.delay_s=10",  # a checkpoint falls into it, however slow the machine
        "chaos.corrupt=true",
        "chaos.fill=true",
    ]
    own = [f"run.dir={small_disk}", "training.save_every_steps=1", UNHURRIED]
    with disturbed(chain, tmp_path, *faults, *own) as run:
        run.run_dir = small_disk / "demo" / "rlhf"
        run.finish()
        assert_undisturbed(run.run_dir, in_one_process)
        came = Counter(e["action"] for e in run.events("chaos"))
        assert came["corrupt"] and came["fill"]
        damaged, full = run.events("weights_damaged"), run.events("disk_full")
        assert damaged and all(e["fetched_again"] == 1 for e in damaged) and len(damaged) <= came["corrupt"]
        assert full and not run.events("worker_lost") and not run.events("resumed")
        assert "no space is left on the disk" in run.log.read_text()


GATE = """
import time
from pathlib import Path

def reward(prompt, completion, fields):
    while (Path(__file__).parent / "closed").exists():
        time.sleep(0.1)
    return -len(completion)
"""


@pytest.mark.slow  # the parts are in tests/cluster/test_elastic.py
def test_workers_that_come_and_go_with_their_nodes_change_nothing(chain: Path, tmp_path: Path) -> None:
    """One rollout worker, two, one; the reward keeps the run from being over before a node has come."""
    set_ray_environment(own_cluster=True)  # before Ray is imported
    from ray.cluster_utils import Cluster

    (tmp_path / "mine.py").write_text(GATE)
    closed, seat = tmp_path / "closed", {"seat": 1.0}
    own = ["reward=function", f"reward.path={tmp_path}/mine.py:reward", f"critic.path={chain}/demo/sft"]
    succeed(arguments("rlhf", tmp_path / "one", *from_chain("rlhf", chain), *LONGER, *own), tmp_path / "one.log")
    loopback = {"node_ip_address": "127.0.0.1"}
    head = loopback | {"num_cpus": 8, "resources": seat, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    elastic = [
        UNHURRIED,
        f"cluster.address={nodes.address}",
        "cluster.rollout.num_workers=1",
        "cluster.rollout.max_workers=2",
    ]
    (tmp_path / "two").mkdir()
    try:
        with disturbed(chain, tmp_path / "two", *own, *elastic, "cluster.rollout.resources={seat: 1}") as run:
            run.until_step(3)
            closed.touch()
            node = nodes.add_node(num_cpus=2, resources=seat, **loopback)
            run.until(lambda: len(run.events("worker_joined")) == 2)
            closed.unlink()
            run.until_step(7)
            closed.touch()
            nodes.remove_node(node, allow_graceful=False)
            run.until(lambda: len(run.events("worker_left")) == 1)
            closed.unlink()
            assert run.process.wait(DEADLINE_S) == 0, run.log.read_text()
    finally:
        nodes.shutdown()
    assert_undisturbed(run.run_dir, tmp_path / "one" / "demo" / "rlhf")
    assert not run.events("worker_replaced") and not run.events("resumed")
    assert_nothing_left()


@pytest.mark.slow
def test_damaged_weights_that_cannot_be_fetched_again_take_the_run_back(
    chain: Path, in_one_process: Path, tmp_path: Path
) -> None:
    """What was broadcast is gone. The seed: one fault as soon as the workers are up, the next one after the end."""
    faults = ["chaos=faults", "chaos.seed=688", "chaos.every_s=300", "chaos.corrupt=true"]
    with disturbed(chain, tmp_path, *faults, "cluster.transport=broadcast") as run:
        run.finish()
        assert_undisturbed(run.run_dir, in_one_process)
        (damaged,) = run.events("weights_damaged")
        assert damaged["cause"] == "damaged" and "are not those published" in damaged["why"]
        versions = [s["weight_versions"][-1] for s in run.of("samples")]
        assert versions == sorted(versions) and len(set(versions)) == 12


CHAOS = ["chaos=all", "chaos.seed=11", "chaos.every_s=2", "chaos.delay_s=1", "cluster.max_restarts=20"]


@pytest.mark.slow  # chosen faults are above; these come when they like
def test_chaos_changes_nothing(chain: Path, tmp_path: Path) -> None:
    longer = "training.num_steps=60"
    quiet, folder = tmp_path / "quiet", tmp_path / "chaos"
    folder.mkdir()
    succeed(arguments("rlhf", quiet, *from_chain("rlhf", chain), *LONGER, longer), tmp_path / "quiet.log")
    with disturbed(chain, folder, *CHAOS, longer) as run:
        run.finish()
        assert_undisturbed(run.run_dir, quiet / "demo" / "rlhf")
        came = {(e["action"], e["where"].partition(" ")[0]) for e in run.events("chaos")}
        assert {("kill", "reference"), ("kill", "critic")} <= came
        assert run.events("worker_replaced") and run.events("resumed")
