"""The root configs of pretrain, sft, reward and pipeline, and what those of all stages have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from llmscale.cluster.config import ClusterConfig
from llmscale.config import STAGE, Problem, at_least, option
from llmscale.data.config import DataConfig
from llmscale.engine.config import DeepSpeedConfig, EngineConfig
from llmscale.errors import ConfigError
from llmscale.models.config import ModelConfig
from llmscale.objectives.config import ObjectiveConfig
from llmscale.optim.config import OptimConfig, Optimizer
from llmscale.tracking.config import TrackingConfig
from llmscale.training.config import TrainingConfig


@dataclass
class RunConfig:
    """Where a run lives: `<dir>/<name>/<stage>`. The same name continues the same run."""

    dir: str = "runs"
    name: str = "default"
    seed: int = 0  # of new weights, the order of the data and sampling

    def problems(self) -> Iterator[Problem]:
        yield from at_least(self, seed=0)
        if not self.dir:
            yield "dir", "is empty", "Name a folder, such as runs."
        if not self.name or Path(self.name).is_absolute() or ".." in Path(self.name).parts:
            yield "name", f"{self.name!r} names no folder below run.dir", "Give a plain name, such as trial."


@dataclass
class StageConfig:
    """What every stage with a run directory has."""

    stage: str = MISSING
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    engine: EngineConfig = MISSING
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    plugins: list[str] = field(default_factory=list)  # modules of yours that register more options

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir) / self.run.name / self.stage

    def problems(self) -> Iterator[Problem]:
        if self.data.max_seq_len > self.model.max_position and self.model.path is None:
            what = f"{self.data.max_seq_len} tokens do not fit a model of {self.model.max_position} positions"
            yield "data.max_seq_len", what, "Lower it, or raise model.max_position."


@dataclass
class TrainedConfig(StageConfig):
    """What every stage that trains has."""

    optim: OptimConfig = field(default_factory=OptimConfig)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from unfit_optimizer(self.engine, self.optim, "optim")
        sharded = isinstance(self.engine, DeepSpeedConfig) and self.engine.tensor_parallel_size > 1
        if sharded and self.model.adapter is not None:
            what = "AutoTP cuts no matrix that has an adapter"
            yield "engine.tensor_parallel_size", what, "Leave it at 1, or train the whole model."


@dataclass
class SupervisedConfig(TrainedConfig):
    objective: ObjectiveConfig = MISSING
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.cluster.trainer.num_workers > 1 and self.engine.name == "single":
            what = f"{self.cluster.trainer.num_workers} workers cannot share engine=single"
            yield "cluster.trainer.num_workers", what, "Add engine=deepspeed."
        gives = ("rankings", "solutions") if self.stage == "reward" else ("tokens",)
        if self.objective.reads not in gives:
            what = (
                f"{self.objective.name} learns from {self.objective.reads}, {self.stage} gives it {' or '.join(gives)}"
            )
            yield "objective", what, "Leave it out: the stage chooses the right one."
        if self.stage == "reward" and self.model.adapter is not None:
            what = "reward trains a new scalar head, which no adapter holds"
            yield "model.adapter", what, "Leave it out: the whole model is trained."
        if self.stage != "pretrain" and self.model.path is None:
            yield "model.path", f"{self.stage} starts from a model", "Name a run directory, a folder or a hub name."


@option(STAGE, "pretrain", builds="llmscale.stages.supervised_run:run")
@dataclass
class PretrainConfig(SupervisedConfig):
    stage: str = "pretrain"


@option(STAGE, "sft", builds="llmscale.stages.supervised_run:run")
@dataclass
class SFTConfig(SupervisedConfig):
    stage: str = "sft"


@option(STAGE, "reward", builds="llmscale.stages.supervised_run:run")
@dataclass
class RewardStageConfig(SupervisedConfig):
    stage: str = "reward"


@option(STAGE, "pipeline", builds="llmscale.stages.pipeline:run")
@dataclass
class PipelineConfig:
    """Several stages one after the other. An override `<stage>.path=value` goes to that stage, any other to all."""

    stage: str = "pipeline"
    stages: list[str] = field(default_factory=lambda: ["pretrain", "sft", "reward", "rlhf"])
    run: RunConfig = field(default_factory=RunConfig)

    def problems(self) -> Iterator[Problem]:
        if not self.stages or len(set(self.stages)) < len(self.stages):
            yield "stages", "must name at least one stage, each once", "For example [sft,reward,rlhf]."


def unfit_optimizer(engine: EngineConfig, optim: OptimConfig, where: str) -> Iterator[Problem]:
    """ZeRO cuts the weights of all layers into flat pieces; an elementwise optimizer does not see the difference."""
    if engine.name == "deepspeed" and optim.optimizer is Optimizer.muon:
        what = "muon updates whole matrices, and engine=deepspeed gives an optimizer flat pieces of them"
        yield f"{where}.optimizer", what, f"Choose {where}.optimizer=adamw or lion, or engine=single."


def check_context(config: StageConfig, context_length: int) -> None:
    """Raises: ConfigError when sequences may be longer than the model that was loaded can take."""
    if config.data.max_seq_len > context_length:
        what = f"{config.data.max_seq_len} tokens do not fit a model of {context_length} positions"
        raise ConfigError(what, where="data.max_seq_len", fix=f"Set it to {context_length} or less.")
