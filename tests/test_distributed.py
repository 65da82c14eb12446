"""How ranks find each other, and how long they wait for each other."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from llmscale import distributed
from llmscale.distributed import World
from tests.conftest import ROOT

GROUPS = """
from datetime import timedelta

import torch
import torch.distributed as dist

from llmscale import distributed


def limit(group):
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=7))
patient = dist.new_group(timeout=timedelta(seconds=99))
with distributed.limited_groups():
    library = dist.new_group()
    print(limit(library) > 7)
print(limit(library), limit(patient))
"""


def test_groups_of_a_library_wait_no_longer_than_ours() -> None:
    """In a process of its own: one process has one default group."""
    done = subprocess.run([sys.executable, "-c", GROUPS], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "7.0", "99.0"], done.stderr


LEAVING = """
import atexit, sys
import torch.distributed as dist
from llmscale import distributed

atexit.register(lambda: print(dist.is_initialized()))  # the last to run
distributed.join(60)
distributed.new_barrier(60)()
print(dist.is_initialized())
sys.exit(3)
"""


def test_ranks_leave_their_groups_before_the_interpreter_ends() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LEAVING],
            env=os.environ | place | {"RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    assert [(rank.communicate()[0].split(), rank.returncode) for rank in ranks] == [(["True", "False"], 3)] * 2


@pytest.mark.parametrize(
    ("size", "environment"),
    [
        (1, {"MASTER_ADDR": "10.0.0.1"}),
        (2, {"MASTER_ADDR": "127.0.0.1"}),
        (2, {"MASTER_ADDR": "10.0.0.1", "LOCAL_WORLD_SIZE": "2"}),
    ],
)
def test_ranks_of_one_host_speak_over_loopback(
    size: int, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MASTER_ADDR", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed._interface(World(0, size, 0)) == "lo"


def test_ranks_of_several_hosts_speak_over_an_interface_that_others_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the master's name leads to loopback, as a host's own name does on Debian."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    own = distributed.address_towards(distributed.ANYWHERE)
    if own is None:
        pytest.skip("needs a default route")
    for master in (own, "127.0.1.1"):
        monkeypatch.setenv("MASTER_ADDR", master)
        name = distributed._interface(World(0, 2, 0))
        assert name in [name for _, name in socket.if_nameindex()] and name != "lo"
