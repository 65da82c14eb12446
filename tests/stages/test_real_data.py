"""The pipeline on real text: plays and web pages, instructions, preferences, grade-school mathematics."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.stages.runs import records, succeed


@pytest.mark.realdata
@pytest.mark.slow  # the other tests of realdata have its files in shorter runs
def test_the_pipeline_runs_on_real_data(shared_data: Path, tmp_path: Path) -> None:
    sources = {
        "pretrain": shared_data / "pretrain",
        "sft": shared_data / "instruct" / "alpaca_en_demo.json",
        "reward": shared_data / "preference" / "dpo_en_demo.json",
        "rlhf": shared_data / "math" / "gsm8k_train.jsonl",
        "collect": shared_data / "math" / "gsm8k_train.jsonl",
    }
    argv = [
        "pipeline",
        "experiment=real",
        f"stages=[{','.join(sources)}]",
        f"run.dir={tmp_path}",
        "tracking.wandb=disabled",
    ]
    argv += [f"{stage}.data.train={source}" for stage, source in sources.items()]
    printed = succeed([*argv, "rlhf.training.num_steps=4", "reward.training.num_steps=16"], tmp_path / "log")

    losses = [m["train/loss"] for m in records(tmp_path / "real" / "pretrain" / "metrics.jsonl")]
    assert losses[0] == pytest.approx(math.log(2048), rel=0.05)  # uniform over the vocabulary
    assert losses[-1] < losses[0] - 1
    sft = records(tmp_path / "real" / "sft" / "metrics.jsonl")
    assert sft[-1]["train/loss"] < sft[0]["train/loss"]
    last = records(tmp_path / "real" / "rlhf" / "metrics.jsonl")[-1]
    assert last["rollout/logprob_diff"] < 1e-4 and math.isfinite(last["reward/mean"])
    assert "held-out pairwise accuracy" in printed
    answers = [s["completion"] for s in records(tmp_path / "real" / "rlhf" / "samples.jsonl")]
    assert len(answers) == 4 * 8
    rankings = records(tmp_path / "real" / "collect" / "rankings.jsonl")
    assert len(rankings) > 16 and all(len(set(r["completions"])) == len(r["ranks"]) for r in rankings)
