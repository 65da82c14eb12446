"""Runs the scenarios once for the whole session: the engines of one process here, those of two ranks in two others."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from llmscale.engine.config import DeepSpeedConfig, EngineConfig, Offload, SingleConfig

ROOT = Path(__file__).parents[2]
ZERO_STAGES = (1, 2, 3)
TIMEOUT_S = 900


def zero_config(stage: int, **settings: Any) -> DeepSpeedConfig:
    """A threshold of 0 makes stage 3 shard weights as small as these."""
    overrides = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    return DeepSpeedConfig(zero_stage=stage, overrides=overrides if stage == 3 else {}, **settings)


ONE_PROCESS: dict[str, EngineConfig] = {"single": SingleConfig()} | {f"zero{s}": zero_config(s) for s in ZERO_STAGES}
TWO_RANKS: dict[str, DeepSpeedConfig] = {f"zero{s}x2": zero_config(s) for s in ZERO_STAGES} | {
    "sequence": zero_config(3, sequence_parallel_size=2),
    "tensor": zero_config(2, tensor_parallel_size=2),
}
RESHARDED = [*ONE_PROCESS, *(name for name, c in TWO_RANKS.items() if c.tensor_parallel_size == 1)]
# Put through less: one step, and some more after a checkpoint.
VARIANTS: dict[str, DeepSpeedConfig] = {
    f"zero{stage}_offload": zero_config(stage, offload_optimizer=Offload.cpu) for stage in ZERO_STAGES
} | {
    "zero3_offload_parameters": zero_config(3, offload_parameters=Offload.cpu),
    "zero3_offload_both": zero_config(3, offload_parameters=Offload.cpu, offload_optimizer=Offload.cpu),
    "zero1_sequence": zero_config(1, sequence_parallel_size=2),
    "zero2_sequence_offload": zero_config(2, sequence_parallel_size=2, offload_optimizer=Offload.cpu),
    "zero1_tensor": zero_config(1, tensor_parallel_size=2),
    "zero3_tensor": zero_config(3, tensor_parallel_size=2),
    "zero3_tensor_offload": zero_config(
        3, tensor_parallel_size=2, offload_parameters=Offload.cpu, offload_optimizer=Offload.cpu
    ),
}
UNSHARDED = "zero3_unshardedx2"  # stage 3 that keeps weights as small as these whole, as it does by itself


def others(folder: Path, own: str, names: Iterable[str]) -> list[Path]:
    """Where engines of these names left their results, but for `own`."""
    return [folder / name for name in names if name != own]


@dataclass(frozen=True)
class Results:
    """What the scenarios wrote for one engine."""

    folder: Path

    @property
    def num_ranks(self) -> int:
        return 1 if self.folder.name in ONE_PROCESS else 2

    @property
    def num_shards(self) -> int:
        """How many ranks have examples of their own."""
        name = self.folder.name
        return 1 if name in ONE_PROCESS else (TWO_RANKS | VARIANTS)[name].data_shard(0, 2)[1]

    def numbers(self, name: str, rank: int = 0) -> Any:
        return json.loads((self.folder / f"{name}.{rank}.json").read_text())

    def weights(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")


def start_ranks(command: Sequence[str], num_ranks: int, log_folder: Path | None = None) -> list[subprocess.Popen]:
    """The same command once for each rank of a group on this machine; ranks log to `log_folder`/rankN.log."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    size = {"WORLD_SIZE": str(num_ranks), "LOCAL_SIZE": str(num_ranks), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | group | size | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=(log_folder / f"rank{rank}.log").open("w") if log_folder else None,
            stderr=subprocess.STDOUT if log_folder else None,
        )
        for rank in range(num_ranks)
    ]


@pytest.fixture(scope="session")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.engine import scenarios

    folder = tmp_path_factory.mktemp("engines")
    environment = dict(os.environ)
    scenarios.prepare()
    for name, config in ONE_PROCESS.items():
        scenarios.run_all(config, folder / name)
    scenarios.learning_from_samples(scenarios.Bench(ONE_PROCESS["single"], folder / "single"))
    for name, config in ONE_PROCESS.items():
        scenarios.reshard(scenarios.Bench(config, folder / name), others(folder, name, ONE_PROCESS))
    os.environ.clear()  # DeepSpeed needs RANK and so on in it; whoever is started later must not see them
    os.environ.update(environment)
    return folder


@pytest.fixture(scope="session")
def two_ranks(one_process: Path) -> Path:
    ranks = start_ranks([sys.executable, "-m", "tests.engine.ranks", str(one_process)], 2, one_process)
    try:
        codes = [rank.wait(TIMEOUT_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    logs = "\n".join((one_process / f"rank{rank}.log").read_text()[-3000:] for rank in range(2))
    assert codes == [0, 0], logs
    from tests.engine import scenarios

    environment = dict(os.environ)
    for name, config in ONE_PROCESS.items():
        written = [source for source in RESHARDED if source in TWO_RANKS]
        scenarios.reshard(scenarios.Bench(config, one_process / name), others(one_process, name, written))
    os.environ.clear()
    os.environ.update(environment)
    return one_process


@pytest.fixture
def single(one_process: Path) -> Results:
    return Results(one_process / "single")


@pytest.fixture(params=[*ONE_PROCESS, *(name for name, c in TWO_RANKS.items() if c.data_shard(1, 2) == (1, 2))])
def adapting(request: pytest.FixtureRequest) -> Results:
    """Of every engine that trains adapters."""
    folder = request.getfixturevalue("two_ranks" if request.param in TWO_RANKS else "one_process")
    return Results(folder / request.param)


@pytest.fixture(params=[*ONE_PROCESS, *TWO_RANKS])
def results(request: pytest.FixtureRequest) -> Results:
    """Of every engine in turn."""
    folder = request.getfixturevalue("two_ranks" if request.param in TWO_RANKS else "one_process")
    return Results(folder / request.param)
