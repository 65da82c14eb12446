"""One of several ranks, as torchrun would start it: `python -m tests.engine.ranks FOLDER`, where FOLDER/zeroN holds
what one rank did. Writes FOLDER/zeroNx2."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from llmscale import distributed
from llmscale.engine.config import DeepSpeedConfig, SingleConfig
from llmscale.engine.single import SingleEngine
from llmscale.errors import ConfigError
from tests.engine import scenarios
from tests.engine.conftest import ONE_PROCESS, UNSHARDED, ZERO_STAGES, others, zero_config
from tests.tiny import language_model


def sharding(config: DeepSpeedConfig, folder: Path) -> None:
    """How much of the weights this rank holds between steps."""
    held = list(scenarios.Bench(config, folder).engine().model.parameters())
    numbers = {"total": sum(p.ds_numel for p in held), "own": sum(p.ds_tensor.numel() for p in held)}
    (folder / f"sharding.{distributed.rank()}.json").write_text(json.dumps(numbers))


def refused_engine(folder: Path) -> None:
    """The reference engine is of one process."""
    try:
        SingleEngine(SingleConfig(), language_model(), scenarios.PROBE, 1)
    except ConfigError as error:
        (folder / f"single.{distributed.rank()}.json").write_text(json.dumps(str(error)))


def main(folder: Path) -> None:
    distributed.join(timeout_s=60)
    benches = {f"zero{stage}x2": zero_config(stage) for stage in ZERO_STAGES}
    for name, config in benches.items():
        scenarios.run_all(config, folder / name)
    distributed.barrier()
    for name, config in benches.items():
        scenarios.reshard(scenarios.Bench(config, folder / name), others(folder, name, [*ONE_PROCESS, *benches]))
    sharding(zero_config(3), folder / "zero3x2")
    scenarios.train_in_bf16(scenarios.Bench(DeepSpeedConfig(zero_stage=3), folder / UNSHARDED))
    refused_engine(folder / "zero3x2")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
