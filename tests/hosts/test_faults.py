"""The demo's task over three hosts while workers are killed and stopped, a host is cut off and comes back, weights are damaged,
a raylet and the driver are killed: at every bound on staleness it ends, and its account of draws adds up."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from llmscale.stages.inspection import inspect
from tests.hosts.commands import Drive, Join, documented, driver_log, exit_codes, wait_for
from tests.hosts.network import Host
from tests.stages.runs import TINY, arguments, num_lines, records, succeed
from tests.stages.test_lost_workers import assert_undisturbed

pytestmark = [pytest.mark.hosts, pytest.mark.parametrize("hosts", [3], indirect=True)]

STEPS, PROMPTS = 120, 16  # long enough for all of it also on a fast machine
LONG = [*TINY["rlhf"], f"training.num_steps={STEPS}", "training.save_every_steps=5", "training.eval_every_steps=30"]
# These come first, a few seconds apart: a bit is flipped, a reward and a rollout worker die, another hangs, a host is cut off.
CHAOS = "chaos=faults chaos.seed=2517 chaos.every_s=4 chaos.delay_s=8 chaos.corrupt=true"
CHAOS += " chaos.kill=[rollout,reward] chaos.stop=[rollout] chaos.cut=[rollout]"
FIRST = {("corrupt", "rollout"), ("kill", "reward"), ("kill", "rollout"), ("stop", "rollout"), ("cut", "rollout")}
PATIENT = "cluster.answer_timeout_s=5 cluster.max_restarts=50"


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    file = run / "events.jsonl"
    return [e for e in records(file) if e["kind"] == kind] if num_lines(file) else []


def test_a_host_is_cut_off_and_comes_back_by_itself(hosts: Sequence[Host], tmp_path: Path) -> None:
    """From outside nothing is refused; inside, only the others are gone."""
    first, second, *_ = hosts
    server = second.start("exec python -m http.server 8000", tmp_path / "server")
    get = f"python -c \"import urllib.request as r; r.urlopen('http://{second.address}:8000', timeout=2)\""
    logs = count()

    def answers(host: Host) -> bool:
        return exit_codes([host.start(get, tmp_path / f"get-{next(logs)}")]) == [0]

    try:
        wait_for(lambda: answers(first), [server], tmp_path / "server")
        cut = f"python -c \"from llmscale.cluster.faults import cut; cut('{second.address}', 10)\""
        assert exit_codes([second.start(cut, tmp_path / "cut")]) == [0], (tmp_path / "cut").read_text()
        assert not answers(first) and answers(second)
        assert "timed out" in (tmp_path / f"get-{next(logs) - 2}").read_text()
        wait_for(lambda: answers(first), [server], tmp_path / "server")
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.mark.slow
@pytest.mark.parametrize("bound", [0, 1, 4])
def test_the_demo_ends_whatever_happens(
    bound: int, drive: Drive, join: Join, hosts: Sequence[Host], chain: Path, tmp_path: Path
) -> None:
    paths = [f"model.path={chain}/demo/sft", f"reward.path={chain}/demo/reward"]
    own = [*LONG, *paths, "tracking.wandb=disabled", "engine=single", f"training.max_staleness={bound}"]
    command = documented("Ray")[5][1].replace("run.name=hosts", f"run.name=bound-{bound}")
    command = command.replace("cluster.rollout.num_workers=2", "cluster.rollout.num_workers=3")
    command = command.replace("cluster.rollout.resources='{rollout: 1}'", "cluster.rollout.placement=spread")
    command = " ".join([command, *own, PATIENT])
    run = hosts[0].folder / "runs" / f"bound-{bound}" / "rlhf"
    third = next(host for host in hosts if host.name == "node3")

    process = drive(f"{command} {CHAOS}")
    wait_for(lambda: len(events(run, "chaos")) >= len(FIRST) + 1, [process], driver_log(hosts))
    killed_s = time.time()
    assert exit_codes([third.start("pkill -KILL -x raylet", tmp_path / "raylet.log")]) == [0]
    wait_for(lambda: any(e["time_s"] > killed_s for e in events(run, "worker_lost")), [process], driver_log(hosts))
    join(third)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert exit_codes([drive(command)]) == [0], driver_log(hosts).read_text()

    came = Counter((e["action"], e["where"].partition(" ")[0]) for e in events(run, "chaos"))
    assert came.keys() >= FIRST and not events(run, "chaos_failed")
    found = inspect(run)
    draws = found["draws"]
    assert draws["wrong"] == [] and draws["ended"] == draws["trained"] + draws["dropped"] == STEPS * PROMPTS
    assert found["attempts"] == 2 and max(int(age) for age in draws["staleness"]) <= bound
    versions = [s["weight_versions"][-1] for s in records(run / "samples.jsonl")]
    assert len(versions) == STEPS * PROMPTS and len(set(versions)) > STEPS // (bound + 1) - 2
    if bound == 0:
        succeed(arguments("rlhf", tmp_path, *own), tmp_path / "log")
        assert_undisturbed(run, tmp_path / "demo" / "rlhf")
