"""The root config of rlhf, and what every stage that samples has to ask of its config."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from omegaconf import MISSING

from llmscale.cluster import faults
from llmscale.cluster.config import ChaosConfig
from llmscale.cluster.placement import shared
from llmscale.config import STAGE, Problem, at_least, option
from llmscale.engine.config import Precision
from llmscale.optim.config import OptimConfig
from llmscale.rewards.config import EnvironmentRewardConfig, LearnedConfig, RewardConfig, flattened
from llmscale.rl.config import AlgorithmConfig
from llmscale.rollout.config import (
    EnvironmentConfig,
    HFRolloutConfig,
    OnUpdate,
    ReplayConfig,
    RolloutConfig,
    VLLMRolloutConfig,
)
from llmscale.stages.config import TrainedConfig, unfit_optimizer

if TYPE_CHECKING:
    from llmscale.stages.answering_config import AnsweringConfig


@dataclass
class RlhfTrainingConfig:
    """How long an RLHF run is. prompts_per_step x group_size sequences are sampled at each step."""

    num_steps: int = 50  # of: sample, score, update, publish
    prompts_per_step: int = 64
    # Updates of the policy between the oldest token of a sample and its use, at most: 0 is synchronous; 1 samples a step ahead
    max_staleness: int = 0
    eval_every_steps: int = 25  # scores on held-out prompts, where there are any; also at the start and the end
    save_every_steps: int = 25
    keep_checkpoints: int = 2

    def problems(self) -> Iterator[Problem]:
        yield from at_least(
            self, num_steps=1, prompts_per_step=1, eval_every_steps=1, save_every_steps=1, keep_checkpoints=1
        )
        yield from at_least(self, max_staleness=0)


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
    chaos: ChaosConfig | None = None  # faults on purpose
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
    def colocated(self) -> list[str]:
        """Roles of this run that have their devices by turns."""
        return shared(self.cluster, self.roles)

    @property
    def reference_is_base(self) -> bool:
        """Whether the policy's workers answer for the reference too: without its adapter the policy is what it started as."""
        return self.algorithm.needs_reference and self.model.adapter is not None

    @property
    def scores_by_policy(self) -> bool:
        """Whether the policy says what it thinks of each token before the update. A step of a single update asks only once,
        in the update itself, unless the algorithm needs to know before, or samples may be of an older policy."""
        algorithm, sequences = self.algorithm, self.training.prompts_per_step * self.group_size
        updates = algorithm.num_epochs * -(-sequences // algorithm.global_batch_size)
        return updates > 1 or algorithm.needs_old_logprobs or self.training.max_staleness > 0

    @property
    def settled_algorithm(self) -> AlgorithmConfig:
        """The algorithm with what it leaves to be chosen for this run."""
        return self.algorithm.chosen_for(stale=self.training.max_staleness > 0)

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
        if self.colocated and not self.engine.sleeps:
            what = "DeepSpeed cannot move the optimizer of this stage out of a device that others are to use"
            yield "engine.zero_stage", what, "Set engine.zero_stage=2, or leave out cluster.colocated."
        yield from sampling_problems(self)
        if self.record and self.replays:
            yield "record", "there is nothing new to record in what is replayed", "Leave it out."
        yield from self._unfit_chaos()
        if self.training.max_staleness and self.replays:
            yield "training.max_staleness", "nothing is sampled that could be ahead of the updates", "Leave it at 0."
        if self.training.max_staleness and self.colocated:
            what = "colocated roles have their devices by turns: nothing is sampled while there is training"
            yield "training.max_staleness", what, "Leave it at 0, or leave out cluster.colocated."
        if self.rollout.on_update is OnUpdate.abort and not self.training.max_staleness:
            what = "nothing is under way when there are new weights, for training.max_staleness is 0"
            yield "rollout.on_update", what, "Leave it at keep, or set training.max_staleness=1."
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

    def _unfit_chaos(self) -> Iterator[Problem]:
        if self.chaos is None:
            return
        if self.cluster.one_process:
            yield "chaos", "there are no workers but the driver itself", "Add cluster=ray or cluster=laptop."
        if self.chaos.cut and self.cluster.address is None:
            what = "every worker is on this machine, and there is no link between them"
            yield "chaos.cut", what, "Name a running Ray of several hosts: cluster.address."
        elif self.chaos.cut and (why := faults.cannot_cut()):
            yield "chaos.cut", why, "Leave it out, or run this where it may change the network, on every host."
        if self.chaos.fill and (why := faults.cannot_fill(self.run_dir)):
            what = "Leave it out, or give the run a small disk of its own: run.dir, on a tmpfs with a size, for one."
            yield "chaos.fill", why, what


def completion_tokens(rollout: RolloutConfig, environment: EnvironmentConfig | None) -> int:
    return rollout.max_new_tokens * (environment.max_turns if environment is not None else 1)


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
    if config.rollout.on_update is OnUpdate.abort:
        yield from _unfit_to_abort(config, environment)
    if environment is None:
        for where, part in rewards_of(config):
            if isinstance(part, EnvironmentRewardConfig):
                what = "there is no environment that could give it"
                yield where, what, "Choose one, in rlhf or rollout: environment=calculator."
    elif completion_tokens(config.rollout, environment) >= config.data.max_seq_len:
        what = f"{environment.max_turns} turns of {config.rollout.max_new_tokens} tokens leave no room for a prompt "
        what += f"in {config.data.max_seq_len}"
        yield "environment.max_turns", what, "Lower it or rollout.max_new_tokens, or raise data.max_seq_len."


def _unfit_to_abort(config: RlhfConfig | AnsweringConfig, environment: EnvironmentConfig | None) -> Iterator[Problem]:
    where, fix = "rollout.on_update", "Leave it at keep."
    if not isinstance(config, RlhfConfig):
        yield where, f"{config.stage} has no new weights", fix
    if not isinstance(config.rollout, HFRolloutConfig):
        what = f"a call of {config.rollout.name} cannot be broken off between two tokens"
        yield where, what, "Leave it at keep, or choose rollout=hf."
    if environment is not None:
        yield where, "what an environment has heard in a turn that was broken off it could not hear again", fix


def rewards_of(config: RlhfConfig | AnsweringConfig) -> Iterator[tuple[str, RewardConfig]]:
    """(dotted path, config) of every reward that is asked, the parts of sums one by one."""
    for where in ("reward", "true_reward"):
        reward: RewardConfig | None = getattr(config, where, None)
        if reward is not None:
            yield from flattened(reward, where)
