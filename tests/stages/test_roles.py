"""What workers compute, where it is not the model's own."""

from __future__ import annotations

from llmscale.engine.accounting import empty_rows
from llmscale.engine.config import SingleConfig
from llmscale.engine.frozen import FrozenEngine
from llmscale.stages.roles import logprobs_at
from tests.tiny import language_model


def test_a_rank_without_trajectories_takes_part():
    """Another one has more micro-batches: this one goes through as many, with nothing to score."""
    (output,) = FrozenEngine(SingleConfig(), language_model()).forward([empty_rows()], logprobs_at(0.7))
    assert output["out"].tolist() == [[0.0]]
