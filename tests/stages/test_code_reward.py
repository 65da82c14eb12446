"""RLHF with a reward for code, from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stages.runs import records, run, succeed

TINY = ["model.hidden_size=32", "model.intermediate_size=64", "model.num_layers=1"]
LESS = ["optim.lr=1e-4", "training.num_steps=2", "training.prompts_per_step=8", "algorithm.global_batch_size=8"]
LESS += ["rollout.unit_size=4", "data.validation='task:functions/test?size=8'"]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("code")
    for stage, own in (("pretrain", TINY), ("sft", [])):
        common = ["experiment=code", f"run.dir={run_dir}", "tracking.wandb=disabled", "data.max_records=200"]
        succeed([stage, *common, "training.num_steps=2", *own], run_dir / f"{stage}.log")
    return run_dir


def arguments(chain: Path, run_dir: Path, *overrides: str) -> list[str]:
    common = ["experiment=code", f"run.dir={run_dir}", "tracking.wandb=disabled"]
    return ["rlhf", *common, f"model.path={chain}/code/sft", *LESS, *overrides]


def test_two_steps(chain: Path, tmp_path: Path):
    succeed(arguments(chain, tmp_path, "reward.partial=true"), tmp_path / "log")
    samples = records(tmp_path / "code/rlhf/samples.jsonl")
    assert len(samples) == 2 * 8 and all(0 <= s["reward"] <= 1 for s in samples)


def test_records_without_the_column_are_refused_before_sampling(chain: Path, tmp_path: Path):
    assert run(arguments(chain, tmp_path, "reward.column=checks"), tmp_path / "log") == 2
    assert "reward=code needs the column 'checks'" in (tmp_path / "log").read_text()


def test_a_limit_that_is_none_is_refused(chain: Path, tmp_path: Path):
    assert run(arguments(chain, tmp_path, "reward.files_bytes=0"), tmp_path / "log") == 2
    assert "reward.files_bytes" in (tmp_path / "log").read_text()
