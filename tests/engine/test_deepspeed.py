"""What is DeepSpeed's own: its JSON, checkpoints of another size, and that stage 3 really shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmscale.config import check
from llmscale.engine.config import OWNED, DeepSpeedConfig, Precision
from llmscale.errors import ConfigError
from llmscale.optim.config import OptimConfig
from tests.engine.conftest import Results


def test_stage_3_shards_the_weights(two_ranks: Path):
    for rank in range(2):
        held = Results(two_ranks / "zero3x2").numbers("sharding", rank)
        assert held["own"] == pytest.approx(held["total"] / 2, rel=0.01)


def test_the_reference_engine_refuses_several_ranks(two_ranks: Path):
    for rank in range(2):
        told = Results(two_ranks / "zero3x2").numbers("single", rank)
        assert "engine=single" in told and "Use engine=deepspeed" in told


def test_overrides_are_merged_under_what_is_typed():
    from llmscale.engine.deepspeed import deepspeed_json

    overrides = {"zero_optimization": {"reduce_bucket_size": 123}, "wall_clock_breakdown": True}
    config = DeepSpeedConfig(zero_stage=1, overrides=overrides, precision=Precision.bf16)
    merged = deepspeed_json(config, OptimConfig(grad_clip=0.7), num_parameters=1000)
    assert merged["zero_optimization"] == {"reduce_bucket_size": 123, "stage": 1}
    assert merged["wall_clock_breakdown"] is True and merged["bf16"] == {"enabled": True}
    assert merged["gradient_clipping"] == 0.7
    assert overrides == {"zero_optimization": {"reduce_bucket_size": 123}, "wall_clock_breakdown": True}


@pytest.mark.parametrize("path", OWNED)
def test_an_override_of_a_typed_value_is_refused(path: str):
    node: object = 1
    for key in reversed(path.split(".")):
        node = {key: node}
    with pytest.raises(ConfigError, match="belongs to the typed config") as caught:
        check(DeepSpeedConfig(overrides=node))
    assert caught.value.where == f"overrides.{path}" and OWNED[path] in str(caught.value.fix)


@pytest.mark.parametrize("stage", [0, 4])
def test_other_stages_are_refused(stage: int):
    with pytest.raises(ConfigError, match="must be 1, 2 or 3"):
        check(DeepSpeedConfig(zero_stage=stage))
