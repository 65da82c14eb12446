"""`launch=slurm` on a real Slurm of three nodes: the README's and docs/slurm.md's commands, made short."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.slurm import Slurm, slurm, slurm_lacking
from tests.stages.runs import DEADLINE_S, TINY, records, without_times
from tests.stages.test_on_ray import weight_difference

pytestmark = pytest.mark.hosts
QUIET = ["tracking.wandb=disabled", "data.max_records=200"]
PRETRAIN = ["experiment=demo", *[o for o in TINY["pretrain"] if "num_steps" not in o], *QUIET]
NUM_STEPS = 60


@pytest.fixture(scope="module")
def cluster(namespaces: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if why := slurm_lacking():
        pytest.fail(why) if os.environ.get("CI") == "true" else pytest.skip(why)
    with slurm(3, tmp_path_factory.mktemp("slurm")) as made:
        yield made


def submit(cluster: Slurm, name: str, *overrides: str, stage: str = "pretrain", num_steps: int = NUM_STEPS) -> Path:
    """Returns the run directory."""
    words = [*PRETRAIN, f"run.name={name}", f"training.num_steps={num_steps}", "launch=slurm", *overrides]
    printed = cluster.run(f"llmscale submit {stage} {' '.join(words)} --json")
    return Path(json.loads(printed.splitlines()[-1])["run"])


def status(cluster: Slurm, run: Path) -> dict[str, Any]:
    return json.loads(cluster.run(f"llmscale status {run} --json"))


def wait_for(condition: Callable[[], Any], cluster: Slurm, run: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"{cluster.run(f'llmscale status {run}; llmscale logs {run}')}{cluster.logs()}"
        time.sleep(0.1)


def ended(cluster: Slurm, run: Path) -> dict[str, Any]:
    """The status of a run when nothing of it waits or runs any more."""
    wait_for(lambda: not cluster.run("squeue -h").strip(), cluster, run)
    return status(cluster, run)


def attempts(run: Path) -> list[dict[str, Any]]:
    files = sorted((run / "attempts").glob("*/attempt.json"), key=lambda f: int(f.parent.name))
    return [json.loads(file.read_text()) for file in files]


def test_two_nodes_give_the_numbers_of_one_process(cluster: Slurm) -> None:
    run = submit(cluster, "two", "launch.nodes=2")
    found = ended(cluster, run)
    assert found["state"] == "done", cluster.run(f"llmscale logs {run}")
    (attempt,) = attempts(run)
    assert attempt["exit_code"] == 0 and len(set(attempt["nodes"])) == 2
    assert sorted(f.name for f in (run / "attempts/1").glob("trainer-*")) == [f"trainer-{n}.log" for n in attempt["nodes"]]

    words = [*PRETRAIN, "run.name=one", f"training.num_steps={NUM_STEPS}", "engine=single", "cluster=local"]
    cluster.run(f"llmscale pretrain {' '.join(words)}")
    one = run.parent.parent / "one" / "pretrain"
    for ours, reference in zip(records(run / "metrics.jsonl"), records(one / "metrics.jsonl"), strict=True):
        assert ours["train/loss"] == pytest.approx(reference["train/loss"], abs=1e-4)
    assert weight_difference(run, one) < 1e-3
