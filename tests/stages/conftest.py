from __future__ import annotations

from pathlib import Path

import pytest

from tests.stages.runs import arguments, succeed


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory in which the tiny pretrain, sft and reward stages of the demo are finished."""
    run_dir = tmp_path_factory.mktemp("chain")
    for stage in ("pretrain", "sft", "reward"):
        succeed(arguments(stage, run_dir), run_dir / f"{stage}.log")
    return run_dir
