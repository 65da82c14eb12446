"""The root configs of the stages in which a model answers and nothing is trained: collect, rollout, generate, chat."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from omegaconf import MISSING

from llmscale.config import STAGE, Problem, at_least, option
from llmscale.rewards.config import RewardConfig
from llmscale.rollout.config import EnvironmentConfig, ReplayConfig, RolloutConfig, VLLMRolloutConfig
from llmscale.stages.config import StageConfig
from llmscale.stages.rlhf_config import RlhfConfig, completion_tokens, sampling_problems


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


SamplingConfig = RlhfConfig | CollectConfig | RolloutStageConfig


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
