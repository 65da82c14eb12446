"""`launch=slurm` on a real Slurm of three nodes: as many nodes as one likes give the numbers of one process, whatever happens."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.hosts.slurm import Slurm, slurm, slurm_lacking
from tests.stages.runs import DEADLINE_S, TINY, num_lines, records
from tests.stages.test_on_ray import weight_difference

pytestmark = pytest.mark.hosts
CANARY = "canary-5f1c9e"
SEEN = """
import hashlib, os, pathlib
if "SLURM_STEP_ID" in os.environ:
    digest = hashlib.sha256(os.environ.get("CANARY", "").encode()).hexdigest()
    pathlib.Path(f"seen-{digest}").touch()
"""
QUIET = ["tracking.wandb=disabled", "data.max_records=200"]
PRETRAIN = ["experiment=demo", *[o for o in TINY["pretrain"] if not o.startswith(("training.", "data."))], *QUIET]
RLHF = ["experiment=demo", "reward=answer", *TINY["rlhf"], "tracking.wandb=disabled"]


@pytest.fixture(scope="module")
def cluster(namespaces: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if why := slurm_lacking():
        pytest.fail(why) if os.environ.get("CI") == "true" else pytest.skip(why)
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "seen.py").write_text(SEEN)
    secrets = folder / "secrets.env"
    secrets.write_text(f"CANARY={CANARY}\n")
    secrets.chmod(0o600)
    with slurm(3, folder) as made:
        yield made


def submit(cluster: Slurm, name: str, num_steps: int, *words: str, stage: str = "pretrain") -> Path:
    """Returns the run directory."""
    own = RLHF if stage == "rlhf" else PRETRAIN
    given = [*own, f"run.name={name}", f"training.num_steps={num_steps}", "launch=slurm", *words, "--json"]
    return Path(json.loads(cluster.run(line("llmscale submit", stage, *given)).splitlines()[-1])["run"])


def line(*words: str) -> str:
    return " ".join(f"'{word}'" if " " in word and "=" in word else word for word in words)


def one_process(cluster: Slurm, num_steps: int) -> Path:
    """The run directory of the same training in one process, which nothing disturbed."""
    name = f"one-{num_steps}"
    words = [*PRETRAIN, f"run.name={name}", f"training.num_steps={num_steps}", "engine=single", "cluster=local"]
    cluster.run(line("llmscale pretrain", *words))
    return cluster.folder.parent / "runs" / name / "pretrain"


def status(cluster: Slurm, run: Path) -> dict[str, Any]:
    return json.loads(cluster.run(f"llmscale status {run} --json"))


def wait_until(condition: Callable[[], Any], cluster: Slurm, run: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"{cluster.run(f'llmscale logs {run}')}\n{cluster.logs()}"
        time.sleep(0.5)


def until_ended(cluster: Slurm, run: Path) -> dict[str, Any]:
    """The status of a run of which nothing waits or runs any more."""
    wait_until(lambda: not cluster.run("squeue -h").strip(), cluster, run)
    return status(cluster, run)


def until_step(cluster: Slurm, run: Path, step: int) -> None:
    wait_until(lambda: num_lines(run / "metrics.jsonl") >= step, cluster, run)


def attempts(run: Path) -> list[dict[str, Any]]:
    files = sorted((run / "attempts").glob("*/attempt.json"), key=lambda f: int(f.parent.name))
    return [json.loads(file.read_text()) for file in files]


def left_on_nodes(cluster: Slurm) -> list[str]:
    return [text for node in cluster.nodes for text in cluster.processes_on(node, "llmscale")]


def assert_same_numbers(run: Path, reference: Path, num_steps: int) -> None:
    own, other = records(run / "metrics.jsonl"), records(reference / "metrics.jsonl")
    losses = [(m["step"], m["train/loss"]) for m in own if "train/loss" in m]
    assert [step for step, _ in losses] == list(range(1, num_steps + 1)), "each step once"
    assert [loss for _, loss in losses] == pytest.approx([m["train/loss"] for m in other if "train/loss" in m], abs=1e-4)
    assert weight_difference(run, reference) < 1e-3


def test_two_nodes_that_are_preempted_give_the_numbers_of_one_process(cluster: Slurm) -> None:
    """And lose no step, and tell nobody the secret that they are given."""
    num_steps = 150
    words = ["launch.nodes=2", "launch.secrets_file=secrets.env", "--plugin=seen"]
    run = submit(cluster, "two", num_steps, *words)
    until_step(cluster, run, 3)
    listed = [text for node in cluster.nodes for text in cluster.processes_on(node, "")]
    found = status(cluster, run)
    assert found["state"] == "running" and found["launch"] == "slurm" and found["job"].isdigit()
    cluster.run(f"scancel --batch --signal=USR1 {found['job']}")  # what --signal=B:USR1@120 does
    after = until_ended(cluster, run)
    assert after["state"] == "done" and after["id"] == found["id"] and after["job"] == found["job"]

    first, second = attempts(run)
    assert (first["exit_code"], second["exit_code"]) == (75, 0)
    assert 3 <= first["after"][0] == second["before"][0] < num_steps
    logs = [[f.name for f in sorted((run / "attempts" / n).glob("trainer-*"))] for n in ("1", "2")]
    assert logs == [[f"trainer-{node}.log" for node in attempt["nodes"]] for attempt in (first, second)]
    assert [len(names) for names in logs] == [2, 2]
    assert_same_numbers(run, one_process(cluster, num_steps), num_steps)

    assert len(list(cluster.folder.parent.glob("seen-*"))) == 1
    assert not any(CANARY in text for text in listed) and any("llmscale pretrain" in text for text in listed)
    held = [f for f in run.rglob("*") if f.is_file() and CANARY.encode() in f.read_bytes()]
    assert not held


@pytest.mark.parametrize(
    ("words", "exit_code", "says"),
    [
        ("launch.partition=nowhere", 3, "launch: Slurm refuses the job: invalid partition specified: nowhere"),
        ("launch.cpus_per_node=64", 3, "Requested node configuration is not available"),
        ("run.dir=/proc", 2, "the run directory cannot be used"),
        (f"run.name={'n' * 220}", 2, "run.name: 2"),
        ("run.name=a:b", 2, "run.name: 'a:b"),
        ("run.name=two training.num_steps=2", 2, "training.num_steps: 150 -> 2"),
    ],
)
def test_what_cannot_run_is_refused_at_once(cluster: Slurm, words: str, exit_code: int, says: str) -> None:
    named = words if "run.name" in words else f"run.name=refused {words}"
    more = "" if "run.name=two" not in words else "launch.nodes=2 --plugin=seen"
    printed = cluster.run(f"llmscale submit pretrain {line(*PRETRAIN)} {named} launch=slurm {more}", exit_code)
    assert says in printed and "Traceback" not in printed
    assert not cluster.run("squeue -h").strip()


def test_where_there_is_no_slurm_one_line_says_so(cluster: Slurm) -> None:
    command = f"llmscale submit pretrain {line(*PRETRAIN)} run.name=none launch=slurm"
    printed = cluster.run(f"PATH={Path(os.sys.executable).parent} {command}", exit_code=3)
    assert "launch: there is no sbatch here" in printed


def test_a_job_that_fails_says_why(cluster: Slurm) -> None:
    """One on a node that is not well, one whose data is broken."""
    folder = cluster.folder.parent
    (folder / "broken.txt").write_bytes(b"\xff\xfe\xff")
    run = submit(cluster, "broken", 2, "data.train=broken.txt", "data.validation=null")
    found = until_ended(cluster, run)
    assert (found["state"], found["exit_code"]) == ("failed", 2), found
    assert "error: " in found["traceback"] and "broken.txt" in found["traceback"]
    assert "trainer-node" in found["traceback"]
    assert "broken.txt" in cluster.run(f"llmscale status {run}")
