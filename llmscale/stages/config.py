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
from llmscale.engine.config import DeepSpeedConfig, EngineConfig, Precision
from llmscale.errors import ConfigError
from llmscale.models.config import ModelConfig
from llmscale.objectives.config import ObjectiveConfig
from llmscale.optim.config import OptimConfig, Optimizer
from llmscale.rewards.config import EnvironmentRewardConfig, LearnedConfig, RewardConfig, flattened
from llmscale.rl.config import AlgorithmConfig
from llmscale.rollout.config import EnvironmentConfig, ReplayConfig, RolloutConfig, VLLMRolloutConfig
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


@dataclass
class RlhfTrainingConfig:
    """How long an RLHF run is. prompts_per_step x group_size sequences are sampled at each step."""

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


class Publish(Enum):
    """What the rollout workers get after an update."""

    merged = "merged"  # every weight, an adapter merged into its base
    adapter = "adapter"  # the adapter alone; they hold the base themselves


class OnNonfinite(Enum):
    """What happens to a sample whose reward is NaN or infinite."""

    stop = "stop"  # end the run, naming draw and sample
    drop = "drop"  # leave it out of the step; counted and recorded, like one that could not be scored


@option(STAGE, "rlhf", builds="llmscale.stages.rlhf_run:run")
@dataclass
class RlhfConfig(TrainedConfig):
    """`model` is the policy's start and the reference; `optim` is the policy's."""

    stage: str = "rlhf"
    algorithm: AlgorithmConfig = MISSING
    reward: RewardConfig = MISSING
    on_nonfinite: OnNonfinite = OnNonfinite.stop  # a sample whose reward is NaN or infinite
    true_reward: RewardConfig | None = None  # only logged, as reward/true: what the reward stands for, where known
    rollout: RolloutConfig = MISSING
    # To the rollouts: merged, or adapter: less to send, no small change rounded away in bf16, but slower sampling
    publish: Publish = Publish.merged
    environment: EnvironmentConfig | None = None  # what answers the policy between its turns; None: it has one turn
    critic: CriticConfig = field(default_factory=CriticConfig)
    training: RlhfTrainingConfig = field(default_factory=RlhfTrainingConfig)
    record: bool = False  # all that is sampled, in completions.jsonl: rollout=replay trains from it without an engine

    @property
    def replays(self) -> bool:
        """Whether samples come from another run."""
        return isinstance(self.rollout, ReplayConfig)

    @property
    def max_logprob_diff(self) -> float:
        """Bound on |rollout - trainer log-probability|; two bf16 forwards of one model differ by up to 0.16 on random
        weights, and one token of thousands by more."""
        default = 1e-4 if self.engine.precision is Precision.fp32 else 0.5
        return default if self.rollout.max_logprob_diff is None else self.rollout.max_logprob_diff

    @property
    def roles(self) -> list[str]:
        """The pools that this run needs."""
        critic = ["critic"] if self.algorithm.needs_critic else []
        reference = ["reference"] if self.algorithm.needs_reference and not self.reference_is_base else []
        rollout = ["rollout"] if not self.replays else []
        return ["policy", *critic, *reference, "reward", *rollout]

    @property
    def reference_is_base(self) -> bool:
        """Whether the policy's workers answer for the reference too: without its adapter the policy is what it started as."""
        return self.algorithm.needs_reference and self.model.adapter is not None

    @property
    def scores_by_policy(self) -> bool:
        """Whether the policy says what it thinks of each token before the update. A step of a single update asks only once,
        in the update itself, unless the algorithm needs to know before."""
        algorithm, sequences = self.algorithm, self.training.prompts_per_step * self.group_size
        updates = algorithm.num_epochs * -(-sequences // algorithm.global_batch_size)
        return updates > 1 or algorithm.needs_old_logprobs

    @property
    def group_size(self) -> int:
        """Completions of a prompt."""
        return self.rollout.group_size or (8 if self.algorithm.needs_groups else 1)

    @property
    def max_completion_tokens(self) -> int:
        """That the policy can write in one sample."""
        return completion_tokens(self.rollout, self.environment)

    @property
    def critic_path(self) -> str:
        """InstructGPT starts the critic from the reward model; of several, the first."""
        parts = (part for _, part in flattened(self.reward, "reward"))
        learned = next((part.path for part in parts if isinstance(part, LearnedConfig)), None)
        return self.critic.path or learned or str(self.model.path)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from unfit_optimizer(self.engine, self.critic.optim, "critic.optim")
        if self.publish is Publish.adapter and self.model.adapter is None:
            yield "publish", "there is no adapter to publish", "Add model.adapter=lora, or leave it at merged."
        if self.engine.data_shard(1, 2) != (1, 2):
            what = "rlhf gives each rank sequences of its own"
            yield "engine", what, "Set engine.tensor_parallel_size=1 and engine.sequence_parallel_size=1."
        yield from sampling_problems(self)
        if self.record and self.replays:
            yield "record", "there is nothing new to record in what is replayed", "Leave it out."
        if self.rollout.temperature == 0:
            yield "rollout.temperature", "greedy samples teach nothing", "Set it above 0."
        if self.rollout.truncates:
            what = "what is left after top_k or top_p is not the policy whose log-probabilities are trained"
            yield "rollout", what, "Leave both out; a temperature is accounted for."
        if self.algorithm.needs_groups and self.group_size < 2:
            what = "this algorithm compares the samples of a prompt with each other, and there is one of each"
            yield "rollout.group_size", what, "Set it to 4 or more."
        if self.algorithm.global_batch_size > self.training.prompts_per_step * self.group_size:
            made = f"{self.training.prompts_per_step} x {self.group_size}"
            what = f"{self.algorithm.global_batch_size} sequences an update, but a step samples {made}"
            yield "algorithm.global_batch_size", what, "Lower it, or raise training.prompts_per_step."
        if self.engine.name == "single":
            for role in {"policy", "critic"}.intersection(self.roles):
                if getattr(self.cluster, role).num_workers > 1:
                    what = "several workers cannot share engine=single"
                    yield f"cluster.{role}.num_workers", what, "Add engine=deepspeed."


@dataclass
class AnsweringConfig(StageConfig):
    """What the stages share in which `model` answers every prompt of `data.train` once. Nothing is trained: of `engine` the
    precision alone matters."""

    num_samples: int = 1  # completions of each prompt
    rollout: RolloutConfig = MISSING

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from at_least(self, num_samples=1)
        if self.model.adapter is not None:
            yield "model.adapter", f"{self.stage} trains nothing", "Leave it out."
        yield from sampling_problems(self)
        if self.rollout.group_size is not None:
            yield "rollout.group_size", f"{self.stage} has another name for it", "Set num_samples instead."
        if self.data.validation is not None:
            yield (
                "data.validation",
                f"{self.stage} reads data.train alone",
                f"Leave it out; {self.stage} twice for two sets.",
            )
        if self.data.validation_fraction > 0:
            yield "data.validation_fraction", f"{self.stage} answers every prompt", "Leave it at 0."
        if self.data.mixture_weights or self.data.mixture_temperature != 1 or self.data.mixture_cap is not None:
            what = f"{self.stage} takes every prompt of a mixture once"
            yield "data.mixture_weights", what, "Leave the shares out."
        if self.rollout.temperature == 0 and self.num_samples > 1:
            yield "rollout.temperature", "greedy samples are all the same", "Set it above 0, or num_samples=1."


@dataclass
class MethodConfig:
    """How `collect` finds completions, and which of them SFT is to learn."""

    name: str = MISSING


@option("method", "best_of_n")
@dataclass
class BestOfNConfig(MethodConfig):
    """Samples; SFT learns the best of each prompt (Stiennon et al. 2020, arXiv:2009.01325)."""

    name: str = "best_of_n"


@option("method", "beam")
@dataclass
class BeamConfig(MethodConfig):
    """Beam search, which takes no account of the reward; SFT learns the best by reward of what it returns."""

    name: str = "beam"
    num_beams: int | None = None  # completions carried along, num_samples or more; None: num_samples
    length_penalty: float = 0.0  # beams are compared by log p / tokens^this: 0 by probability, 1 by the mean of a token

    def problems(self) -> Iterator[Problem]:
        yield from at_least(self, num_beams=1, length_penalty=0)


@option("method", "rejection")
@dataclass
class RejectionConfig(MethodConfig):
    """Samples; SFT learns all that are good enough, of any prompt (RAFT: Dong et al. 2023, arXiv:2304.06767)."""

    name: str = "rejection"
    min_score: float | None = None  # learn what scores at least this; None: see keep_fraction
    keep_fraction: float | None = None  # learn the best of all, ties with the last included; above 0, 1 at most

    def problems(self) -> Iterator[Problem]:
        if (self.min_score is None) == (self.keep_fraction is None):
            what = f"{'neither' if self.min_score is None else 'both'} of min_score and keep_fraction is set"
            yield "min_score", what, "Set one: method.min_score=1 or method.keep_fraction=0.25."
        if self.keep_fraction is not None and not 0 < self.keep_fraction <= 1:
            yield (
                "keep_fraction",
                f"must be above 0 and at most 1, is {self.keep_fraction}",
                "0.25 is the best quarter.",
            )


@option(STAGE, "collect", builds="llmscale.stages.collect:run")
@dataclass
class CollectConfig(AnsweringConfig):
    """`model` answers every prompt of `data.train` once, `reward` scores the answers. Nothing is trained: of `engine` the
    precision alone matters."""

    stage: str = "collect"
    method: MethodConfig = MISSING
    num_samples: int = 8  # completions of each prompt
    reward: RewardConfig = MISSING
    true_reward: RewardConfig | None = None  # only reported: what the reward stands for, where known
    prompts_per_step: int = 32  # sampled, scored and written together; an interrupted run repeats no more than that

    @property
    def num_beams(self) -> int:
        """0: completions are sampled."""
        return (self.method.num_beams or self.num_samples) if isinstance(self.method, BeamConfig) else 0

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from at_least(self, prompts_per_step=1)
        if self.num_beams:
            if self.num_beams < self.num_samples:
                what = f"{self.num_beams} beams cannot return num_samples={self.num_samples}"
                yield "method.num_beams", what, "Raise it, or leave it out."
            if self.rollout.name != "hf":
                yield "rollout", "beam search runs on rollout=hf alone", "Choose it."
            if self.rollout.temperature != 1 or self.rollout.truncates:
                yield "rollout", "beam search samples nothing", "Leave temperature, top_k and top_p out."


@option(STAGE, "rollout", builds="llmscale.stages.rollout:run")
@dataclass
class RolloutStageConfig(AnsweringConfig):
    """`model` answers every prompt of `data.train` once, in completions.jsonl. Nothing is trained: of `engine` the precision
    alone matters."""

    stage: str = "rollout"
    environment: EnvironmentConfig | None = None  # what answers the model between its turns; None: it has one turn
    reward: RewardConfig | None = None  # scores the completions; None: they have no score
    record_logprobs: bool = False  # of every token; needed to train from the completions, by rlhf with rollout=replay

    @property
    def max_completion_tokens(self) -> int:
        """That the model can write in one sample."""
        return completion_tokens(self.rollout, self.environment)


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
        if isinstance(self.rollout, VLLMRolloutConfig):
            yield "rollout", f"{self.stage} samples in its own process, which vLLM would take over", "Leave it at hf."
        if isinstance(self.rollout, ReplayConfig):
            yield "rollout", "only rlhf can do without an engine", "Choose rollout=hf."


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


def completion_tokens(rollout: RolloutConfig, environment: EnvironmentConfig | None) -> int:
    return rollout.max_new_tokens * (environment.max_turns if environment is not None else 1)


SamplingConfig = RlhfConfig | CollectConfig | RolloutStageConfig


def sampling_problems(config: RlhfConfig | AnsweringConfig) -> Iterator[Problem]:
    """What has to be there to sample completions of prompts."""
    if config.model.path is None:
        what = f"{config.stage} starts from a model"
        yield "model.path", what, "Name the run directory of an SFT run, or a folder."
    if config.rollout.max_new_tokens >= config.data.max_seq_len:
        what = f"{config.rollout.max_new_tokens} leaves no room for a prompt in {config.data.max_seq_len} tokens"
        yield "rollout.max_new_tokens", what, "Lower it, or raise data.max_seq_len."
    if isinstance(config.rollout, VLLMRolloutConfig) and config.cluster.one_process:
        what = "vLLM takes over the process that it runs in: its threads, seeds and memory"
        yield "rollout", what, "Add cluster=ray, or cluster=laptop for two cores: each worker is a process then."
    if isinstance(config.rollout, ReplayConfig) and not isinstance(config, RlhfConfig):
        yield "rollout", "only rlhf can do without an engine", "Choose rollout=hf."
    environment: EnvironmentConfig | None = getattr(config, "environment", None)
    if environment is None:
        for where, part in rewards_of(config):
            if isinstance(part, EnvironmentRewardConfig):
                what = "there is no environment that could give it"
                yield where, what, "Choose one, in rlhf or rollout: environment=calculator."
    elif completion_tokens(config.rollout, environment) >= config.data.max_seq_len:
        what = f"{environment.max_turns} turns of {config.rollout.max_new_tokens} tokens leave no room for a prompt "
        what += f"in {config.data.max_seq_len}"
        yield "environment.max_turns", what, "Lower it or rollout.max_new_tokens, or raise data.max_seq_len."


def rewards_of(config: RlhfConfig | AnsweringConfig) -> Iterator[tuple[str, RewardConfig]]:
    """(dotted path, config) of every reward that is asked, the parts of sums one by one."""
    for where in ("reward", "true_reward"):
        reward: RewardConfig | None = getattr(config, where, None)
        if reward is not None:
            yield from flattened(reward, where)


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
