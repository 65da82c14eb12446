"""What this user may not do is refused before a run. Disks are in tests/test_disk.py, links in tests/hosts/test_faults.py."""

from __future__ import annotations

import os

import pytest

from llmscale.cluster.faults import cannot_cut


def test_who_may_not_change_the_network_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        assert "CAP_NET_ADMIN" in (cannot_cut() or "")
        return
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        os._exit(0 if cannot_cut() == "this user lacks CAP_NET_ADMIN" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    monkeypatch.setenv("PATH", "/nowhere")
    assert cannot_cut() == "there is no ip and no tc (iproute2)"
