"""The commands of docs/hosts.md, and running them."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.hosts.network import Host
from tests.stages.runs import DEADLINE_S, TINY, records
from tests.stages.test_on_ray import weight_difference

Drive = Callable[[str], subprocess.Popen]  # starts a driver's command on node1, where Ray runs over all hosts
Join = Callable[..., None]  # starts Ray on these hosts
NUM_STEPS = 40
SHORT = ["training.save_every_steps=10", "training.eval_every_steps=20", "tracking.wandb=disabled"]


def documented(section: str) -> list[tuple[list[str], str]]:
    """(hosts, command) of each block in a section, in order."""
    _, _, text = (ROOT / "docs" / "hosts.md").read_text().partition(f"\n## {section}\n")
    blocks = re.findall(r"^```sh\n# (.*?)\n(.*?)^```", text.partition("\n## ")[0], re.DOTALL | re.MULTILINE)
    return [(hosts.split(" and "), command.strip().replace("\n", " && ")) for hosts, command in blocks]


def tiny(command: str, *overrides: str) -> str:
    """A documented pretraining, made short."""
    return " ".join([command, *TINY["pretrain"], f"training.num_steps={NUM_STEPS}", *SHORT, *overrides])


def wait_for(condition: Callable[[], bool], processes: list[subprocess.Popen], log: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert all(process.poll() is None for process in processes), f"ended too early: {log.read_text()}"
        assert time.monotonic() < deadline, f"waited for too long: {log.read_text()}"
        time.sleep(0.02)


def exit_codes(processes: list[subprocess.Popen]) -> list[int]:
    deadline = time.monotonic() + DEADLINE_S
    return [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]


def driver_log(hosts: Sequence[Host]) -> Path:
    return hosts[0].folder / "driver.log"


def drive_to_end(drive: Drive, hosts: Sequence[Host], command: str, exit_code: int = 0) -> str:
    """What the driver printed."""
    assert exit_codes([drive(command)]) == [exit_code], driver_log(hosts).read_text()
    return driver_log(hosts).read_text()


def hosts_of(run: Path, worker: str) -> list[str]:
    """Where it has been, as its log says."""
    return re.findall(r"^rank \d of \d on (\S+) ", (run / "attempts/1" / f"{worker}.log").read_text(), re.MULTILINE)


def assert_same_numbers(run: Path, other: Path) -> None:
    pairs = list(zip(records(run / "metrics.jsonl"), records(other / "metrics.jsonl"), strict=True))
    assert [own["step"] for own, _ in pairs] == list(range(1, NUM_STEPS + 1))
    for own, reference in pairs:
        for name in reference.keys() & {"train/loss", "eval/loss"}:
            assert own[name] == pytest.approx(reference[name], abs=1e-5)
        assert own["train/grad_norm"] == pytest.approx(reference["train/grad_norm"], rel=1e-4)
    assert weight_difference(run, other) < 1e-5
