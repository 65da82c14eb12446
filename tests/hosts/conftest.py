from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.hosts.commands import Drive, documented, driver_log, exit_codes, tiny, wait_for
from tests.hosts.network import Host, lacking, network
from tests.stages.conftest import chain  # noqa: F401  a fixture

# A dead host is noticed after seconds, not after the minute of the defaults, and a slow one has time to answer.
HEALTH = {"initial_delay_ms": "1000", "period_ms": "1000", "timeout_ms": "10000", "failure_threshold": "3"}


@pytest.fixture(scope="session")
def namespaces() -> None:
    """Skips where hosts cannot be made."""
    if why := lacking():
        if os.environ.get("CI") == "true":  # there nobody would see that it is never run
            pytest.fail(why)
        pytest.skip(why)


@pytest.fixture(scope="module")
def hosts(
    request: pytest.FixtureRequest, namespaces: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sequence[Host]]:
    """Two hosts, or as many as `@pytest.mark.parametrize("hosts", [3], indirect=True)` says."""
    with network(getattr(request, "param", 2), tmp_path_factory.mktemp("hosts")) as made:
        yield made


@pytest.fixture(scope="session")
def one_host(namespaces: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of the documented pretraining on one host with two ranks, which nothing disturbed."""
    ((_, command),) = documented("torchrun")
    command = command.replace("--nnodes 2 --nproc-per-node 1", "--nnodes 1 --nproc-per-node 2")
    folder = tmp_path_factory.mktemp("one")
    with network(1, folder) as (host,):
        assert exit_codes([host.start(tiny(command), folder / "log")]) == [0], (folder / "log").read_text()
    return folder / "runs" / "hosts" / "pretrain"


@pytest.fixture(scope="module")
def drive(hosts: Sequence[Host]) -> Drive:
    """Starts a driver's command on node1, while Ray runs over all hosts."""
    by_name = {host.name: host for host in hosts}
    token, *nodes = documented("Ray")[:4]
    folder = hosts[0].folder
    assert exit_codes([by_name["node1"].start(token[1], folder / "token.log")]) == [0]
    assert (folder / "ray-token").stat().st_mode & 0o077 == 0
    eager = {f"RAY_health_check_{name}": value for name, value in HEALTH.items()}
    logs = [folder / f"ray-{name}.log" for (name,), _ in nodes]
    started = [by_name[name].start(command, log, **eager) for ((name,), command), log in zip(nodes, logs, strict=True)]
    for log in logs:
        wait_for(lambda log=log: "will now block" in log.read_text(), started, log)

    def drive(command: str) -> subprocess.Popen:
        driver_log(hosts).unlink(missing_ok=True)
        return by_name["node1"].start(command, driver_log(hosts))

    return drive
