"""A stage with `optim.ema_decay` exports the average, and what it notes about the model is of the average too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import llmscale.stages  # noqa: F401  registers what a config can name
from llmscale.config import build, load
from llmscale.data.splits import load_rankings
from llmscale.models.export import save_hf
from llmscale.models.loading import load_scalar_model
from tests.stages.runs import arguments, succeed
from tests.tiny import language_model, tokenizer


def test_scores_of_an_averaged_reward_model_have_mean_0_and_deviation_1(tmp_path: Path) -> None:
    start = language_model(vocab_size=len(tokenizer()))
    save_hf(start, tokenizer(), tmp_path / "start", [dict(start.named_parameters())])
    overrides = [f"model.path={tmp_path / 'start'}", "optim.ema_decay=0.9", "data.max_records=20", "optim.lr=0.01"]
    succeed(arguments("reward", tmp_path, *overrides), tmp_path / "log")

    run_dir = tmp_path / "demo" / "reward"
    config, model = load(run_dir / "config.yaml"), load_scalar_model(str(run_dir / "hf"))
    examples = load_rankings(config.data, tokenizer(), tmp_path / "cache").train
    batch = build(config.objective).prepare(list(examples))
    with torch.no_grad():
        scores = model(batch["input_ids"], batch["position_ids"]).flatten()[batch["ends"]]
    assert float(scores.mean()) == pytest.approx(0, abs=1e-4)
    assert float(scores.std(correction=0)) == pytest.approx(1, rel=1e-4)
