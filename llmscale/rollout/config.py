"""How completions are sampled, and with whom the policy speaks while it writes one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from importlib.util import find_spec

from omegaconf import MISSING

from llmscale.config import Problem, at_least, option


class OnUpdate(Enum):
    """What becomes of a sample that is being written when there are new weights (rlhf with training.max_staleness)."""

    keep = "keep"  # it is written to its end with the old ones
    abort = "abort"  # it is broken off after the next token, and goes on from there with the new ones


@dataclass
class RolloutConfig:
    """Sampling."""

    name: str = MISSING
    temperature: float = 1.0  # divides the logits; 0 is greedy, for generate and chat only
    top_k: int | None = None  # sample among the k likeliest tokens alone; not in rlhf. None: all
    top_p: float = 1.0  # among the likeliest that together have this probability (Holtzman et al. 2020); not in rlhf
    max_new_tokens: int = 64  # longest completion in tokens; with an environment, of one turn
    group_size: int | None = None  # completions per prompt; None: 8 where rlhf's algorithm compares them, else 1
    unit_size: int = 32  # samples of one dispatch unit: generated as one batch on one worker, retried whole
    on_update: OnUpdate = OnUpdate.keep  # what becomes of samples under way when there are new weights: keep or abort
    # Largest |rollout - trainer log-probability| of fresh samples; null: 1e-4 in fp32, 0.5 in bf16
    max_logprob_diff: float | None = None

    @property
    def truncates(self) -> bool:
        return self.top_k is not None or self.top_p < 1

    def problems(self) -> Iterator[Problem]:
        yield from at_least(self, temperature=0, max_new_tokens=1, group_size=1, unit_size=1, max_logprob_diff=0)
        yield from at_least(self, top_k=1)
        if not 0 < self.top_p <= 1:
            yield "top_p", f"must be above 0 and at most 1, is {self.top_p}", "0.9 is common; 1 leaves nothing out."


@option("rollout", "hf", builds="llmscale.rollout.hf:HFRollout")
@dataclass
class HFRolloutConfig(RolloutConfig):
    """Forwards of the Hugging Face model itself."""

    name: str = "hf"


@option("rollout", "vllm", builds="llmscale.rollout.vllm:VLLMRollout")
@dataclass
class VLLMRolloutConfig(RolloutConfig):
    """vLLM (Kwon et al. 2023, arXiv:2309.06180), on CPUs or GPUs. `unit_size` samples run at a time."""

    name: str = "vllm"
    gpu_memory_share: float = 0.9  # of a GPU, for weights, keys and values; on a CPU: as much as unit_size samples need

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if find_spec("vllm") is None:
            yield "name", "vLLM is not installed", "For CPUs: make vllm. For GPUs: pip install -e '.[vllm]'."
        if not 0 < self.gpu_memory_share <= 1:
            yield "gpu_memory_share", f"must be above 0 and at most 1, is {self.gpu_memory_share}", "0.9 is common."


@option("rollout", "replay", builds="llmscale.rollout.replay:Replay")
@dataclass
class ReplayConfig(RolloutConfig):
    """No engine: rlhf trains from what another run sampled. `temperature` and `max_new_tokens` have to be that run's."""

    name: str = "replay"
    path: str = MISSING  # directory of a run: of rlhf with record=true, or of rollout with record_logprobs=true


class Role(Enum):
    """Who speaks in the chat template, when an environment does."""

    user = "user"
    tool = "tool"


@dataclass
class EnvironmentConfig:
    """What answers the policy between its turns. A sample ends when the environment says so, or cut off at a limit."""

    name: str = MISSING
    max_turns: int = 4  # of the policy in one sample, the answer among them; 1 or more
    max_observation_tokens: int = 64  # what the environment says beyond them is cut, with a sign that it was; 1 or more
    timeout_s: float = 10.0  # of one answer; a sample that waits longer is left out of the step
    role: Role = Role.user  # whose turn an observation is

    def problems(self) -> Iterator[Problem]:
        yield from at_least(self, max_turns=1, max_observation_tokens=1)
        if self.timeout_s <= 0:
            yield "timeout_s", f"must be above 0, is {self.timeout_s}", "10 is ten seconds for each answer."


@option("environment", "calculator", builds="llmscale.rollout.calculator:Calculator")
@dataclass
class CalculatorConfig(EnvironmentConfig):
    """Works out `calc EXPRESSION`, exactly; anything else that the policy says is its answer."""

    name: str = "calculator"


@option("environment", "class", builds="llmscale.rollout.environment:own")
@dataclass
class ClassConfig(EnvironmentConfig):
    """A Python class of yours with `reset(prompt, fields)` and `step(said)`, as in llmscale/rollout/environment.py."""

    name: str = "class"
    path: str = MISSING  # FILE.py:CLASS

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if ".py:" not in self.path:
            yield "path", f"must be FILE.py:CLASS, is {self.path!r}", "For example games.py:Guess."
