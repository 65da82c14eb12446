"""A Ray cluster that cannot be joined."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from tests.stages.runs import arguments, run


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "no-such-host:6379", "127.0.0.1"])
def test_an_address_at_which_there_is_no_ray_is_refused_at_once(address: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # and does not listen
        address = address.format(port=probe.getsockname()[1])
        started = time.monotonic()
        # In a process of its own: Ray reads its environment once, and other tests start it otherwise.
        code = run(arguments("pretrain", tmp_path, f"cluster.address={address}"), tmp_path / "log")
    printed = (tmp_path / "log").read_text()
    assert code == 3 and time.monotonic() - started < 60
    assert f"error: cluster.address: cannot connect to Ray at {address}" in printed and "ray start" in printed
