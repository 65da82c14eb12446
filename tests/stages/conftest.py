from __future__ import annotations

from pathlib import Path

import pytest

from tests.stages.ranks import Ranks, ranks_arguments
from tests.stages.runs import arguments, succeed


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory in which the tiny pretrain, sft and reward stages of the demo are finished."""
    run_dir = tmp_path_factory.mktemp("chain")
    for stage in ("pretrain", "sft", "reward"):
        succeed(arguments(stage, run_dir), run_dir / f"{stage}.log")
    return run_dir


@pytest.fixture(scope="session")
def undisturbed(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of two ranks to which nothing happened. Its tests are TOGETHER in tests/conftest.py."""
    folder = tmp_path_factory.mktemp("undisturbed")
    ranks = Ranks(ranks_arguments(chain, folder), folder)
    assert ranks.wait() == [0, 0], ranks.said()
    return folder / "demo" / "sft"
