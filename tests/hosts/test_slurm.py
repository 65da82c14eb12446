"""`launch=slurm` on a real Slurm of three nodes: several nodes give the numbers of one process, whatever happens to them."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
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
COMPARED_STEPS = 150
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
    return Path(json.loads(cluster.run(shlex.join(["llmscale", "submit", stage, *given])).splitlines()[-1])["run"])


def one_process(cluster: Slurm, num_steps: int) -> Path:
    """The run directory of the same training in one process, which nothing disturbed."""
    name = f"one-{num_steps}"
    words = [*PRETRAIN, f"run.name={name}", f"training.num_steps={num_steps}", "engine=single", "cluster=local"]
    cluster.run(shlex.join(["llmscale", "pretrain", *words]))
    return cluster.folder.parent / "runs" / name / "pretrain"


def status(cluster: Slurm, run: Path) -> dict[str, Any]:
    return json.loads(cluster.run(f"llmscale status {run} --json"))


def wait_until(condition: Callable[[], Any], cluster: Slurm, run: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"{cluster.run(f'llmscale logs {run}')}\n{cluster.logs()}"
        time.sleep(0.2)


def until_ended(cluster: Slurm, run: Path) -> dict[str, Any]:
    """The status of a run of which nothing waits or runs any more."""
    wait_until(lambda: not cluster.run("squeue -h").strip(), cluster, run)
    return status(cluster, run)


def until_step(cluster: Slurm, run: Path, step: int) -> None:
    wait_until(lambda: num_lines(run / "metrics.jsonl") >= step, cluster, run)


def attempts(run: Path) -> list[dict[str, Any]]:
    files = sorted((run / "attempts").glob("*/attempt.json"), key=lambda f: int(f.parent.name))
    return [json.loads(file.read_text()) for file in files]


def preempt(cluster: Slurm, run: Path) -> None:
    """What Slurm does itself some time before a job's end, as the script asks it to."""
    cluster.run(f"scancel --batch --signal=USR1 {attempts(run)[-1]['job']}")


def left_on_nodes(cluster: Slurm) -> list[str]:
    return [text for node in cluster.nodes for text in cluster.processes_on(node, "llmscale")]


def assert_same_numbers(run: Path, reference: Path, num_steps: int) -> None:
    """Every step once, and the losses of one process as long as rounding has not driven the two apart."""
    own, other = (
        [(m["step"], m["train/loss"]) for m in records(d / "metrics.jsonl") if "train/loss" in m]
        for d in (run, reference)
    )
    assert [step for step, _ in own] == [step for step, _ in other] == list(range(1, num_steps + 1))
    near = slice(COMPARED_STEPS)
    assert [loss for _, loss in own[near]] == pytest.approx([loss for _, loss in other[near]], abs=1e-4)
    if num_steps <= COMPARED_STEPS:
        assert weight_difference(run, reference) < 1e-3


@pytest.mark.slow
def test_two_nodes_that_are_preempted_give_the_numbers_of_one_process(cluster: Slurm) -> None:
    """And lose no step, and tell nobody the secret that they are given."""
    num_steps = 400
    words = ["launch.nodes=2", "launch.secrets_file=secrets.env", "--plugin=seen"]
    run = submit(cluster, "two", num_steps, *words)
    until_step(cluster, run, 3)
    listed = [text for node in cluster.nodes for text in cluster.processes_on(node, "")]
    preempt(cluster, run)
    found = status(cluster, run)
    assert found["state"] in ("running", "queued") and found["launch"] == "slurm" and found["job"].isdigit()
    after = until_ended(cluster, run)
    assert after["state"] == "done" and after["id"] == found["id"] and after["job"] == found["job"]

    first, second = attempts(run)
    assert (first["exit_code"], second["exit_code"]) == (75, 0)
    assert 3 <= first["after"][0] == second["before"][0] < num_steps
    logs = [[f.name for f in sorted((run / "attempts" / n).glob("trainer-*"))] for n in ("1", "2")]
    assert logs == [[f"trainer-{node}.log" for node in attempt["nodes"]] for attempt in (first, second)]
    assert [len(names) for names in logs] == [2, 2]
    assert_same_numbers(run, one_process(cluster, num_steps), num_steps)

    command = f"llmscale submit pretrain {shlex.join(PRETRAIN)} run.name=two training.num_steps=2 --plugin=seen"
    assert "training.num_steps: 400 -> 2" in cluster.run(f"{command} launch=slurm", exit_code=2)

    assert len(list(cluster.folder.parent.glob("seen-*"))) == 1
    assert not any(CANARY in text for text in listed) and any("llmscale pretrain" in text for text in listed)
    held = [f for f in run.rglob("*") if f.is_file() and CANARY.encode() in f.read_bytes()]
    assert not held


@pytest.mark.parametrize(
    ("words", "exit_code", "says"),
    [
        ("launch.partition=nowhere", 3, "launch: Slurm refuses the job: invalid partition specified: nowhere"),
        ("launch.cpus_per_node=64", 3, "will ever have what the job asks for (PartitionConfig)"),
        ("run.dir=/proc", 2, "the run directory cannot be used"),
        (f"run.name={'n' * 220}", 2, "run.name: 2"),
        ("run.name=a:b", 2, "run.name: 'a:b"),
    ],
)
def test_what_cannot_run_is_refused_at_once(cluster: Slurm, words: str, exit_code: int, says: str) -> None:
    named = words if "run.name" in words else f"run.name=refused {words}"
    printed = cluster.run(f"llmscale submit pretrain {shlex.join(PRETRAIN)} {named} launch=slurm", exit_code)
    assert says in printed and "Traceback" not in printed
    assert not cluster.run("squeue -h").strip()


def test_where_there_is_no_slurm_one_line_says_so(cluster: Slurm) -> None:
    command = f"llmscale submit pretrain {shlex.join(PRETRAIN)} run.name=none launch=slurm"
    printed = cluster.run(f"PATH={Path(sys.executable).parent} {command}", exit_code=3)
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


@pytest.mark.slow
def test_the_commands_of_the_readme(cluster: Slurm) -> None:
    """The laptop's command, and the same with `launch=slurm`."""
    (block,) = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    commands = block.splitlines()
    assert any("launch=slurm" in command for command in commands)
    printed = {command: cluster.run(command) for command in commands}
    assert "cluster/pretrain  done" in printed["llmscale runs"]
    runs = cluster.folder.parent / "runs"
    assert_same_numbers(runs / "cluster" / "pretrain", runs / "laptop" / "pretrain", 100)


@pytest.mark.slow
def test_a_node_that_loses_its_power_costs_nothing_but_time(cluster: Slurm) -> None:
    num_steps = 400
    run = submit(cluster, "power", num_steps, "launch.nodes=2", "training.save_every_steps=20")
    until_step(cluster, run, 25)
    lost = next(node for node in cluster.nodes if node.name == attempts(run)[0]["nodes"][1])
    lost.lose_power()
    wait_until(lambda: len(attempts(run)) == 2, cluster, run)
    found = until_ended(cluster, run)
    lost.boot()
    cluster.serve(lost)
    wait_until(lambda: cluster.run("sinfo -h -N -o %T").split().count("idle") == 3, cluster, run)
    assert found["state"] == "done", found
    first, second = attempts(run)
    assert first.get("exit_code") not in (0, 75), "its node died before it could say anything, or its script saw that"
    assert second["before"][0] >= 20 and lost.name not in second["nodes"]
    assert_same_numbers(run, one_process(cluster, num_steps), num_steps)


@pytest.mark.slow
def test_two_runs_side_by_side_are_cancelled_each_in_its_way(cluster: Slurm) -> None:
    gentle, hard = (submit(cluster, name, 100_000, "launch.nodes=2") for name in ("gentle", "hard"))
    for run in (gentle, hard):
        until_step(cluster, run, 5)
    cluster.run(f"llmscale cancel {hard} --now")
    cluster.run(f"llmscale cancel {gentle}")
    assert until_ended(cluster, gentle)["reason"] == "saved"
    (attempt,) = attempts(gentle)
    assert attempt["exit_code"] == 75 and attempt["after"][0] >= 5 and not attempt["again"]
    assert {status(cluster, run)["state"] for run in (gentle, hard)} == {"cancelled"}
    wait_until(lambda: not left_on_nodes(cluster), cluster, hard)

    cluster.run(f"llmscale resume {gentle}")
    wait_until(lambda: len(attempts(gentle)) == 2, cluster, gentle)
    assert attempts(gentle)[1]["before"] == attempt["after"]
    cluster.run(f"llmscale cancel {gentle} --now")
    until_ended(cluster, gentle)


@pytest.mark.slow
def test_a_sweep_is_one_array_whose_jobs_are_runs_of_their_own(cluster: Slurm) -> None:
    words = [*PRETRAIN, "run.name=grid", "run.seed=0,1", "training.num_steps=150", "launch=slurm", "-m", "--json"]
    command = shlex.join(["llmscale", "submit", "pretrain", *words])
    submitted = json.loads(cluster.run(command).splitlines()[-1])
    arrays, numbers = zip(*(place["job"].split("_") for place in submitted), strict=True)
    assert len(set(arrays)) == 1 and numbers == ("0", "1")
    runs = [Path(place["run"]) for place in submitted]
    until_step(cluster, runs[1], 3)
    preempt(cluster, runs[1])  # Slurm gives the last task the number of the whole array
    for number, run in enumerate(runs):
        found = until_ended(cluster, run)
        assert (found["state"], found["step"], found["attempt"]) == ("done", 150, 1 + number)
        assert "wandb_group: grid" in (run / "config.yaml").read_text()
    first, second = (records(run / "metrics.jsonl")[0]["train/loss"] for run in runs)
    assert first != second
    assert [place["state"] for place in json.loads(cluster.run(command).splitlines()[-1])] == ["done", "done"]
    table = cluster.run(
        shlex.join(["llmscale", "pretrain", *(word for word in words if word not in ("launch=slurm", "--json"))])
    )
    assert "(finished before)" in table and "sweep.json" in table


@pytest.mark.slow
def test_a_node_that_is_not_well_is_named(cluster: Slurm) -> None:
    """Its file system is not that of the others."""
    run_dir = cluster.folder.parent / "elsewhere"
    run_dir.mkdir()
    node = cluster.nodes[1]
    hidden = subprocess.run(
        ["nsenter", f"--target={node.first}", "--mount", "mount", "-t", "tmpfs", "none", str(run_dir)]
    )
    assert hidden.returncode == 0
    run = submit(cluster, "ill", 2, "launch.nodes=2", "launch.extra=['--nodelist=node1,node2']", f"run.dir={run_dir}")
    found = until_ended(cluster, run)
    assert (found["state"], found["exit_code"], found["reason"]) == ("failed", 64, "unhealthy: node2")
    said = (run / "launch" / "job.log").read_text()
    assert "unhealthy: node2" in said


@pytest.mark.slow
def test_roles_of_rlhf_have_nodes_of_their_own(cluster: Slurm) -> None:
    model = submit(cluster, "policy", 20)
    until_ended(cluster, model)
    nodes = "launch.role_nodes={policy: 1, critic: 1, rollout: 1}"
    run = submit(cluster, "roles", 3, nodes, f"model.path={model}", stage="rlhf")
    found = until_ended(cluster, run)
    assert found["state"] == "done", cluster.run(f"llmscale logs {run}")
    (attempt,) = attempts(run)
    first = {
        role: (run / f"attempts/1/{role}.log").read_text()
        for role in ("policy-0", "critic-0", "rollout-0", "rollout-1")
    }
    places = {role: next(node for node in attempt["nodes"] if f" on {node} " in text) for role, text in first.items()}
    assert [places[role] for role in first] == [*attempt["nodes"], attempt["nodes"][2]]
    assert not (run / "launch" / "ray-token").exists()
    wait_until(lambda: not left_on_nodes(cluster) and not any_ray(cluster), cluster, run)


def any_ray(cluster: Slurm) -> bool:
    return any(cluster.processes_on(node, "raylet") for node in cluster.nodes)


@pytest.mark.slow
def test_rlhf_that_is_preempted_goes_on_where_it_was(cluster: Slurm) -> None:
    model = submit(cluster, "policy", 20)
    until_ended(cluster, model)
    run = submit(cluster, "stopped", 20, "launch.nodes=2", f"model.path={model}", stage="rlhf")
    wait_until(lambda: num_lines(run / "metrics.jsonl") >= 3, cluster, run)
    preempt(cluster, run)
    assert until_ended(cluster, run)["state"] == "done"
    first, second = attempts(run)
    assert first["exit_code"] == 75 and first["after"] == second["before"]
    steps = [m["step"] for m in records(run / "metrics.jsonl") if "reward/mean" in m and m["step"]]
    assert steps == list(range(1, 21))
