from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.hosts.commands import documented, exit_codes, tiny
from tests.hosts.network import Host, lacking, network
from tests.stages.conftest import chain  # noqa: F401  a fixture


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
