from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.hosts.commands import Drive, Join, documented, driver_log, exit_codes, tiny, wait_for
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
def join(hosts: Sequence[Host]) -> Join:
    """Starts Ray on hosts, each by its own command, and waits until all are up; node1 has the head."""
    commands = {name: command for (name,), command in documented("Ray")[1:4]}
    eager = {f"RAY_health_check_{name}": value for name, value in HEALTH.items()}

    def join(*joining: Host) -> None:
        logs = [host.folder / f"ray-{host.name}.log" for host in joining]
        for log in logs:
            log.unlink(missing_ok=True)
        started = [h.start(commands[h.name], log, **eager) for h, log in zip(joining, logs, strict=True)]
        for log in logs:
            wait_for(lambda log=log: "will now block" in log.read_text(), started, log)

    return join


@pytest.fixture(scope="module")
def drive(hosts: Sequence[Host], join: Join) -> Drive:
    """Starts a driver's command on node1, while Ray runs over all hosts."""
    token = documented("Ray")[0][1]
    first, folder = hosts[0], hosts[0].folder
    assert exit_codes([first.start(token, folder / "token.log")]) == [0]
    assert (folder / "ray-token").stat().st_mode & 0o077 == 0
    join(*hosts)

    def drive(command: str) -> subprocess.Popen:
        driver_log(hosts).unlink(missing_ok=True)
        return first.start(command, driver_log(hosts))

    return drive
