"""One of several ranks, as torchrun would start it: `python -m tests.engine.ranks FOLDER`, where FOLDER/zeroN holds
what one rank did. Writes FOLDER/zeroNx2."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from llmscale import distributed
from llmscale.engine.config import DeepSpeedConfig, SingleConfig
from llmscale.engine.single import SingleEngine
from llmscale.errors import ConfigError
from tests.engine import scenarios
from tests.engine.conftest import RESHARDED, TWO_RANKS, UNSHARDED, VARIANTS, others, zero_config
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


def run(folder: Path, *, tensor_parallel: bool) -> None:
    for name, config in (TWO_RANKS | VARIANTS).items():
        if (config.tensor_parallel_size > 1) == tensor_parallel:
            (scenarios.run_all if name in TWO_RANKS else scenarios.run_some)(config, folder / name)


def main(folder: Path) -> None:
    distributed.join(timeout_s=60)
    scenarios.prepare()
    run(folder, tensor_parallel=False)
    distributed.barrier()
    for name in RESHARDED:
        if name in TWO_RANKS:
            scenarios.reshard(scenarios.Bench(TWO_RANKS[name], folder / name), others(folder, name, RESHARDED))
    scenarios.learning_from_samples(scenarios.Bench(TWO_RANKS["zero2x2"], folder / "zero2x2"))
    sharding(zero_config(3), folder / "zero3x2")
    scenarios.train_in_bf16(scenarios.Bench(DeepSpeedConfig(zero_stage=3), folder / UNSHARDED))
    refused_engine(folder / "zero3x2")
    run(folder, tensor_parallel=True)  # last: DeepSpeed keeps such groups for the rest of the process
    left = list(Path("/dev/shm").glob(f"deepspeed_*_{os.environ['MASTER_PORT']}_*"))
    assert not left, f"DeepSpeed's files stay behind: {left}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
