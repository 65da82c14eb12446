"""The root config of each stage. Importing this module registers every option of every group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from omegaconf import MISSING

from llmscale.cluster.config import ClusterConfig
from llmscale.config import STAGE, Problem, at_least, option
from llmscale.data.config import DataConfig
from llmscale.engine.config import EngineConfig, Precision
from llmscale.errors import ConfigError
from llmscale.models.config import ModelConfig
from llmscale.objectives.config import ObjectiveConfig
from llmscale.optim.config import OptimConfig, Optimizer
from llmscale.rewards.config import LearnedConfig, RewardConfig, flattened
from llmscale.rl.config import AlgorithmConfig
from llmscale.rollout.config import RolloutConfig
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
    """What every stage that trains has."""

    stage: str = MISSING
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    engine: EngineConfig = MISSING
    optim: OptimConfig = field(default_factory=OptimConfig)
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
        yield from unfit_optimizer(self.engine, self.optim, "optim")


@dataclass
class SupervisedConfig(StageConfig):
    objective: ObjectiveConfig = MISSING
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.cluster.trainer.num_workers > 1 and self.engine.name == "single":
            what = f"{self.cluster.trainer.num_workers} workers cannot share engine=single"
            yield "cluster.trainer.num_workers", what, "Add engine=deepspeed."
        gives = "rankings" if self.stage == "reward" else "tokens"
        if self.objective.reads != gives:
            what = f"{self.objective.name} learns from {self.objective.reads}, {self.stage} gives it {gives}"
            yield "objective", what, "Leave it out: the stage chooses the right one."
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


@dataclass
class RlhfTrainingConfig:
    """How long an RLHF run is. prompts_per_step x rollout.group_size sequences are sampled at each step."""

    num_steps: int = 50  # of: sample, score, update, publish
    prompts_per_step: int = 64
    eval_every_steps: int = 25  # scores on held-out prompts, where there are any; also at the start and the end
    save_every_steps: int = 25
    keep_checkpoints: int = 2

    def problems(self) -> Iterator[Problem]:
        yield from at_least(
            self, num_steps=1, prompts_per_step=1, eval_every_steps=1, save_every_steps=1, keep_checkpoints=1
        )


@dataclass
class CriticConfig:
    path: str | None = None  # what it starts from; None: the learned reward model, else the policy's model
    optim: OptimConfig = field(default_factory=OptimConfig)


class OnNonfinite(Enum):
    """What happens to a sample whose reward is NaN or infinite."""

    stop = "stop"  # end the run, naming draw and sample
    drop = "drop"  # leave it out of the step; counted and recorded, like one that could not be scored


@option(STAGE, "rlhf", builds="llmscale.stages.rlhf_run:run")
@dataclass
class RlhfConfig(StageConfig):
    """`model` is the policy's start and the reference; `optim` is the policy's."""

    stage: str = "rlhf"
    algorithm: AlgorithmConfig = MISSING
    reward: RewardConfig = MISSING
    on_nonfinite: OnNonfinite = OnNonfinite.stop  # a sample whose reward is NaN or infinite
    true_reward: RewardConfig | None = None  # only logged, as reward/true: what the reward stands for, where known
    rollout: RolloutConfig = MISSING
    critic: CriticConfig = field(default_factory=CriticConfig)
    training: RlhfTrainingConfig = field(default_factory=RlhfTrainingConfig)

    @property
    def max_logprob_diff(self) -> float:
        """Bound on |rollout - trainer log-probability|; two bf16 forwards of one model differ by up to 0.16 on random
        weights, and one token of thousands by more."""
        default = 1e-4 if self.engine.precision is Precision.fp32 else 0.5
        return default if self.rollout.max_logprob_diff is None else self.rollout.max_logprob_diff

    @property
    def critic_path(self) -> str:
        """InstructGPT starts the critic from the reward model; of several, the first."""
        parts = (part for _, part in flattened(self.reward, "reward"))
        learned = next((part.path for part in parts if isinstance(part, LearnedConfig)), None)
        return self.critic.path or learned or str(self.model.path)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from unfit_optimizer(self.engine, self.critic.optim, "critic.optim")
        if self.engine.data_shard(1, 2) != (1, 2):
            what = "rlhf gives each rank sequences of its own"
            yield "engine", what, "Set engine.tensor_parallel_size=1 and engine.sequence_parallel_size=1."
        if self.model.path is None:
            yield "model.path", "rlhf starts from a model", "Name the run directory of an SFT run, or a folder."
        if self.rollout.temperature == 0:
            yield "rollout.temperature", "greedy samples teach nothing", "Set it above 0."
        if self.rollout.max_new_tokens >= self.data.max_seq_len:
            what = f"{self.rollout.max_new_tokens} leaves no room for a prompt in {self.data.max_seq_len} tokens"
            yield "rollout.max_new_tokens", what, "Lower it, or raise data.max_seq_len."
        if self.algorithm.global_batch_size > self.training.prompts_per_step * self.rollout.group_size:
            made = f"{self.training.prompts_per_step} x {self.rollout.group_size}"
            what = f"{self.algorithm.global_batch_size} sequences an update, but a step samples {made}"
            yield "algorithm.global_batch_size", what, "Lower it, or raise training.prompts_per_step."
        if self.engine.name == "single":
            for role in ("policy", "critic"):
                if getattr(self.cluster, role).num_workers > 1:
                    what = "several workers cannot share engine=single"
                    yield f"cluster.{role}.num_workers", what, "Add engine=deepspeed."


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


@dataclass
class ModelPath:
    path: str = MISSING  # a run directory, a Hugging Face folder or a hub name


@dataclass
class UseConfig:
    """What generate and chat share."""

    stage: str = MISSING
    model: ModelPath = field(default_factory=ModelPath)
    system_prompt: str | None = None
    rollout: RolloutConfig = MISSING
    seed: int = 0  # of the sampling
    plugins: list[str] = field(default_factory=list)

    def problems(self) -> Iterator[Problem]:
        yield from at_least(self, seed=0)


@option(STAGE, "generate", builds="llmscale.stages.use:generate")
@dataclass
class GenerateConfig(UseConfig):
    stage: str = "generate"
    prompt: str | None = None  # None: one prompt a line from standard input
    raw: bool = False  # continue the prompt as plain text, without the chat template: for pretrained models


@option(STAGE, "chat", builds="llmscale.stages.use:chat")
@dataclass
class ChatConfig(UseConfig):
    stage: str = "chat"


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
