"""What is DeepSpeed's own: its JSON, checkpoints of another size, and that stage 3 really shards."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import _get_build_directory

from llmscale.config import check
from llmscale.engine.config import OWNED, DeepSpeedConfig, Offload, Precision
from llmscale.errors import ConfigError
from llmscale.optim.config import OptimConfig
from tests.engine.conftest import ROOT, Results


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


def test_a_build_that_was_killed_stops_nobody(tmp_path: Path):
    """What torch leaves behind when it is killed while it compiles."""
    from llmscale.engine.deepspeed import build_communication

    build_communication()
    folder = tmp_path / "deepspeed_shm_comm"
    shutil.copytree(_get_build_directory(folder.name, verbose=False), folder, symlinks=True)
    (folder / "lock").touch()
    code = "from llmscale.engine.deepspeed import build_communication; build_communication()"
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(folder.parent)}
    subprocess.run([sys.executable, "-c", code], env=environment, timeout=100, check=True, cwd=ROOT)
    assert not (folder / "lock").exists() and (folder / "deepspeed_shm_comm.so").stat().st_size > 0


def test_runs_of_one_process_share_no_memory(one_process: Path):
    """DeepSpeed names it by the address and port of the group, and a group of one has neither."""
    from llmscale.engine import deepspeed as module

    names: list[str] = []
    environment = dict(os.environ)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("MASTER_PORT", raising=False)
            patch.setattr(module, "_forget_shared_buffer", lambda: names.append(os.environ["MASTER_PORT"]))
            module._join_group(torch.device("cpu"))
            assert names == [f"process-{os.getpid()}"] and "MASTER_PORT" not in os.environ
    finally:
        os.environ.clear()
        os.environ.update(environment)


@pytest.mark.parametrize("name", ["offload_optimizer", "offload_parameters"])
def test_swapping_to_nvme_is_refused_with_the_reason(name: str):
    with pytest.raises(ConfigError, match="no checkpoint of ours") as caught:
        check(DeepSpeedConfig(zero_stage=3, **{name: Offload.nvme}))
    assert caught.value.where == name


@pytest.mark.parametrize("stage", [0, 4])
def test_other_stages_are_refused(stage: int):
    with pytest.raises(ConfigError, match="must be 1, 2 or 3"):
        check(DeepSpeedConfig(zero_stage=stage))
