"""torchrun over two hosts, as docs/hosts.md says: the numbers of one host, also when one of them loses its power."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.hosts.commands import assert_same_numbers, documented, exit_codes, tiny, wait_for
from tests.hosts.network import Host
from tests.stages.runs import records

pytestmark = pytest.mark.hosts
COLLECTIVE_TIMEOUT_S = 30


def on_each(hosts: Sequence[Host], command: str) -> list[subprocess.Popen]:
    return [host.start(command, host.folder / f"{host.name}.log") for host in hosts]


@pytest.mark.slow
def test_a_host_dies_and_the_same_command_gives_the_numbers_of_one_host(hosts: Sequence[Host], one_host: Path) -> None:
    ((named, command),) = documented("torchrun")
    assert named == [host.name for host in hosts]
    command = tiny(command, f"cluster.collective_timeout_s={COLLECTIVE_TIMEOUT_S}")
    run = hosts[0].folder / "runs" / "hosts" / "pretrain"
    logs = [host.folder / f"{host.name}.log" for host in hosts]

    processes = on_each(hosts, command)
    wait_for((run / "checkpoints" / "step-000010").exists, processes, logs[0])
    hosts[1].lose_power()
    started = time.monotonic()
    assert exit_codes(processes)[0] == 1
    assert time.monotonic() - started < COLLECTIVE_TIMEOUT_S + 60
    assert "error: trainer 0: lost contact with the other ranks" in logs[0].read_text()
    assert not (run / "result.json").exists()

    hosts[1].boot()
    assert exit_codes(on_each(hosts, command)) == [0, 0], [log.read_text() for log in logs]
    kinds = [(e["kind"], e.get("step")) for e in records(run / "events.jsonl")]
    assert ("resumed", 10) in kinds
    assert_same_numbers(run, one_host)

    written = (run / "metrics.jsonl").read_bytes()
    shown = logs[0].read_text().count("validation loss")
    assert exit_codes(on_each(hosts, command)) == [0, 0], [log.read_text() for log in logs]
    assert logs[0].read_text().count("validation loss") == shown + 1
    assert (run / "metrics.jsonl").read_bytes() == written
