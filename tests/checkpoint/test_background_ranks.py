"""Two gloo ranks that train while they save: the collectives of the one never answer those of the other."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmscale.checkpoint.manifest import MANIFEST

ROOT = Path(__file__).parents[2]
DEADLINE_S = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def said(folder: Path) -> list[dict[str, Any]]:
    """What each rank said of each scenario."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.checkpoint.ranks", str(folder)],
            cwd=ROOT,
            env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [rank.communicate(timeout=DEADLINE_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0], printed
    return [json.loads(out) for out, _ in printed]


def test_training_and_saving_do_not_mix(said: list[dict[str, Any]], folder: Path):
    assert [s["both"] for s in said] == [[450, 300, 150, 0]] * 2
    assert {path.name for path in (folder / "both" / "step-000450").iterdir()} == {"rank0", "rank1", MANIFEST}


def test_when_one_rank_fails_both_are_told_at_the_next_save_and_go_on(said: list[dict[str, Any]]):
    of_rank_0, of_rank_1 = (s["failing"] for s in said)
    assert "its part was not written by rank 1" in of_rank_0["told"]
    assert "No space left on device" in of_rank_1["told"]
    assert of_rank_0["steps"] == of_rank_1["steps"] == [30]


def test_the_barrier_has_its_own_time_limit_and_names_who_is_missing(said: list[dict[str, Any]]):
    assert "Rank 1" in said[0]["absent"] and "1000" in said[0]["absent"]
