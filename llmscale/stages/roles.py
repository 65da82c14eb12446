"""What each worker of an RLHF run, or of a collection, holds. A role joins an engine with the algorithm; it runs in a Ray
actor or in the driver's own process and knows nothing of either. Every role reads the frozen config of the run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmscale import distributed
from llmscale.batch import Batch, Layout, Trajectory, prompt_branches
from llmscale.checkpoint.durable import fsync_tree
from llmscale.checkpoint.run_directory import RunDirectory
from llmscale.cluster.intake import Intake
from llmscale.cluster.placement import shared
from llmscale.cluster.pool import WorkerPool, opened_pools
from llmscale.cluster.publish import BUCKET_BYTES
from llmscale.cluster.transports import new_carrier
from llmscale.config import build, load
from llmscale.data.batching import TokenBudget
from llmscale.data.chat import ChatRenderer
from llmscale.disk import explaining_full
from llmscale.engine.config import DeepSpeedConfig, Precision
from llmscale.engine.frozen import FrozenEngine
from llmscale.models.adapters import adapted, merged
from llmscale.models.loading import (
    LanguageModel,
    cast_parameters,
    load_language_model,
    load_scalar_model,
    load_tokenizer,
)
from llmscale.optim.config import OptimConfig
from llmscale.protocols import Digests, Forward, RolloutEngine, SamplingRequest, Score, Tracker, TrainEngine
from llmscale.rewards.weighted import build_reward
from llmscale.rl.experience import Algorithm, Experience
from llmscale.rl.objectives import PolicyObjective, ValueObjective, state_values
from llmscale.rollout.beam import BeamSearch
from llmscale.rollout.config import EnvironmentConfig, HFRolloutConfig, VLLMRolloutConfig
from llmscale.rollout.turns import Render, Turns
from llmscale.stages.answering_config import BeamConfig, CollectConfig, RolloutStageConfig, SamplingConfig
from llmscale.stages.config import StageConfig
from llmscale.stages.leaving import write_model
from llmscale.stages.rlhf_config import Publish, RlhfConfig


def new_algorithm(config: RlhfConfig) -> Algorithm:
    algorithm: Algorithm = build(config.settled_algorithm, config.max_completion_tokens)
    return algorithm


def load_policy(config: StageConfig, empty: bool = False) -> LanguageModel:
    return adapted(load_language_model(str(config.model.path), empty=empty), config.model.adapter, config.run.seed)


class Colocatable:
    """A role that may have its device by turns with others."""

    engine: Any
    asleep = False

    def sleep(self) -> int:
        """Leave the device's memory to others. Returns how many bytes of it that freed: none on a CPU."""
        before = distributed.free_bytes()
        self.engine.sleep()
        self.asleep = True
        return distributed.free_bytes() - before

    def wake(self) -> None:
        self.engine.wake()
        self.asleep = False


class TrainedRole(Colocatable):
    """What policy and critic share: an engine over the ranks of their pool, and the updates of one step."""

    engine: TrainEngine
    objective: PolicyObjective | ValueObjective

    def __init__(self, config_file: str):
        self.config: RlhfConfig = load(Path(config_file))
        self.world = distributed.join(self.config.cluster.collective_timeout_s)
        self.tokenizer = load_tokenizer(str(self.config.model.path))

    def update(self, minibatches: Sequence[Sequence[Experience]]) -> list[dict[str, float]]:
        """One optimizer step for each minibatch; this rank takes its share of it. Returns each step's metrics."""
        assert not self.asleep, "it is the shift of others"
        budget, metrics = token_budget(self.config, self.engine), []
        for minibatch in minibatches:
            taught = [e for e in minibatch if self.objective.teaches(e)]
            lengths = [len(e.token_ids) for e in taught]
            parts = budget.parts(lengths, self.world.rank, self.world.size, prompt_branches(taught))
            dealt = [[taught[i] for i in part] for part in parts]
            if self.world.rank == 0:
                dealt[0] += [e for e in minibatch if not self.objective.teaches(e)]  # which are only counted
            batches = [self.objective.prepare(own, budget.rows) for own in dealt]
            metrics.append(self.engine.step(batches, self.objective))
        return metrics

    def save(self, directory: str) -> Digests:
        with explaining_full(Path(directory)):
            digests = self.engine.snapshot()(Path(directory))
            fsync_tree(Path(directory))  # by the host that wrote it
        return digests

    def load(self, directory: str) -> None:
        self.engine.load(Path(directory))

    def export(self, run_dir: str) -> None:
        """Collective: write the model."""
        with explaining_full(Path(run_dir)):
            write_model(self.engine, self.config, Path(run_dir), self.tokenizer)

    def _total_steps(self) -> int:
        training, algorithm = self.config.training, self.config.algorithm
        sequences = training.prompts_per_step * self.config.group_size
        return training.num_steps * algorithm.num_epochs * -(-sequences // algorithm.global_batch_size)

    @property
    def _empty(self) -> bool:
        return not self.config.engine.needs_weights(self.world.rank)

    def _new_engine(self, model: Any, optim: OptimConfig) -> TrainEngine:
        return build(self.config.engine, model, optim, self._total_steps())


class PolicyRole(TrainedRole):
    def __init__(self, config_file: str):
        super().__init__(config_file)
        self.model = load_policy(self.config, empty=self._empty)
        self.engine = self._new_engine(self.model, self.config.optim)
        algorithm = new_algorithm(self.config)
        temperature, entropy_coef = self.config.rollout.temperature, self.config.algorithm.entropy_coef
        old_is_rollout, needs_advantages = not self.config.scores_by_policy, self.config.algorithm.needs_advantages
        self.objective = PolicyObjective(algorithm, temperature, entropy_coef, old_is_rollout, needs_advantages)
        self.carrier = new_carrier(self.config.cluster, self.config.run_dir)

    def logprobs(self, trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
        """log p of each token under the policy as it is now, float32 [T] a trajectory."""
        return token_values(self.engine, trajectories, self.config, logprobs_at(self.config.rollout.temperature))

    def ref_logprobs(self, trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
        """The same under the base of an adapted policy, which is what it started as."""
        assert self.model.adapter is not None
        with self.model.adapter.off():
            return self.logprobs(trajectories)

    def publish(self, version: int, meeting: Any) -> Any:
        """Collective: send the weights, in the precision that rollouts use; see `llmscale.cluster.transports.Carrier`."""
        adapter_alone = self.config.publish is Publish.adapter
        buckets = self.engine.full_parameters(BUCKET_BYTES, trained_only=adapter_alone)
        whole = buckets if adapter_alone else merged(self.model, buckets)
        try:
            with explaining_full(self.config.run_dir):
                return self.carrier.send(version, whole, torch_dtype(self.config), meeting)
        finally:
            deque(buckets, maxlen=0)  # the other ranks gather to the end, whatever happened to what was gathered


class CriticRole(TrainedRole):
    def __init__(self, config_file: str):
        super().__init__(config_file)
        seed = self.config.run.seed
        model = load_scalar_model(self.config.critic_path, seed=seed, zero_head=True, empty=self._empty)
        self.engine = self._new_engine(model, self.config.critic.optim)
        self.objective = ValueObjective(new_algorithm(self.config))

    def values(self, trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
        """Value of the state before each token, float32 [T] a trajectory."""
        return token_values(self.engine, trajectories, self.config, lambda f, b: {"out": state_values(f(b))})


class ReferenceRole(Colocatable):
    def __init__(self, config_file: str):
        self.config: RlhfConfig = load(Path(config_file))
        model = load_language_model(str(self.config.model.path))
        if isinstance(
            self.config.engine, DeepSpeedConfig
        ):  # it casts the policy's weights, and they start as one model
            cast_parameters(model, torch_dtype(self.config))
        self.engine = FrozenEngine(self.config.engine, model)

    def logprobs(self, trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
        return token_values(self.engine, trajectories, self.config, logprobs_at(self.config.rollout.temperature))


class RewardRole:
    """The reward that is trained on, and the one that is only watched."""

    def __init__(self, config_file: str):
        config: SamplingConfig = load(Path(config_file))
        tokenizer = load_tokenizer(str(config.model.path))
        assert config.reward is not None, "there is something to ask"
        self.reward = build_reward(config.reward, tokenizer, "reward")
        self.true_reward = None
        if not isinstance(config, RolloutStageConfig) and config.true_reward is not None:
            self.true_reward = build_reward(config.true_reward, tokenizer, "true_reward")

    def score(self, trajectories: Sequence[Trajectory]) -> list[tuple[Score, Score | None]]:
        """(reward, true reward) of each trajectory; the second is None where none is configured. What its environment
        failed is not judged."""
        whole = [t for t in trajectories if not t.failure]
        scores = self.reward(whole) if whole else []
        true = self.true_reward(whole) if whole and self.true_reward is not None else [None] * len(whole)
        judged = iter(zip(scores, true, strict=True))
        return [self._unjudged(t.failure) if t.failure else next(judged) for t in trajectories]

    def _unjudged(self, why: str) -> tuple[Score, Score | None]:
        return Score(None, why=why), None if self.true_reward is None else Score(None, why=why)


class RolloutRole(Colocatable, Intake):
    engine: RolloutEngine

    def __init__(self, config_file: str):
        config: SamplingConfig = load(Path(config_file))
        path = str(config.model.path)
        takes_adapter = isinstance(config, RlhfConfig) and config.publish is Publish.adapter
        by_vllm = isinstance(config.rollout, VLLMRolloutConfig)  # which reads the weights itself
        model = load_policy(config, empty=by_vllm) if takes_adapter else load_language_model(path, empty=by_vllm)
        tokenizer = load_tokenizer(path)
        cast_parameters(model, torch_dtype(config))
        renderer = ChatRenderer(tokenizer)
        around = (model, tokenizer, config.run.seed, renderer.stop_ids)
        if isinstance(config, CollectConfig) and isinstance(config.method, BeamConfig):
            self.engine = BeamSearch(
                HFRolloutConfig(max_new_tokens=config.rollout.max_new_tokens),
                *around,
                num_best=config.num_samples,
                num_beams=config.num_beams,
                length_penalty=config.method.length_penalty,
            )
        elif by_vllm:
            limit, sleeps = config.data.max_seq_len, isinstance(config, RlhfConfig) and bool(config.colocated)
            self.engine = build(config.rollout, *around, max_seq_len=limit, sleeps=sleeps)
        else:
            self.engine = build(config.rollout, *around)
        if not isinstance(config, CollectConfig) and config.environment is not None:
            self.engine = Turns(config.environment, self.engine, observation_renderer(renderer, config.environment))
        self.carrier = new_carrier(config.cluster, config.run_dir)

    def generate(self, requests: Sequence[SamplingRequest]) -> list[Trajectory]:
        assert not self.asleep, "it is the shift of others"
        begun = [request.begun for request in requests]  # where the unit has been interrupted
        if not any(begun):
            return self.engine.generate(requests)  # of a beam search several for each
        going = [r for r, t in zip(requests, begun, strict=True) if t is None or t.interrupted]
        made = iter(self.engine.generate(going))
        return [next(made) if t is None or t.interrupted else t for t in begun]

    def interrupt(self, version: int) -> None:
        self.engine.interrupt(version)


ROLES = {
    "policy": PolicyRole,
    "critic": CriticRole,
    "reference": ReferenceRole,
    "reward": RewardRole,
    "rollout": RolloutRole,
}


@contextmanager
def opened_roles(
    config: StageConfig, directory: RunDirectory, names: Iterable[str], tracker: Tracker
) -> Iterator[Mapping[str, WorkerPool]]:
    """A pool of each role of a run that is named, while the context is open; `tracker` is told what becomes of workers."""
    config_file = str((directory.path / "config.yaml").resolve())
    names = list(names)
    asleep = shared(config.cluster, names)
    builds = {name: partial(_built, ROLES[name], config_file, name in asleep) for name in names}
    with opened_pools(config.cluster, builds, directory.attempt_dir, tracker.event) as pools:
        yield pools


def _built(kind: Callable[[str], Any], config_file: str, asleep: bool) -> Any:
    """Those that share a device begin asleep: the next one is built in its memory."""
    role = kind(config_file)
    if asleep:
        role.sleep()
    return role


def observation_renderer(renderer: ChatRenderer, config: EnvironmentConfig) -> Render:
    return partial(renderer.render_observation, role=config.role.name, max_tokens=config.max_observation_tokens)


Compute = Callable[[Forward, Batch], dict[str, Tensor]]


def logprobs_at(temperature: float) -> Compute:
    def compute(forward: Forward, batch: Batch) -> dict[str, Tensor]:
        # The rows of a rank that only takes part, because another has more micro-batches, come without a mask.
        wanted = batch.tensors.get("loss_mask", torch.zeros_like(batch["input_ids"], dtype=torch.bool))
        return {"out": forward.logprobs(batch, wanted, temperature)[0]}

    return compute


def token_values(
    engine: TrainEngine | FrozenEngine, trajectories: Sequence[Trajectory], config: RlhfConfig, compute: Compute
) -> list[np.ndarray]:
    """Run `compute` over the trajectories in micro-batches; what it says of each one's tokens, in order."""
    budget = token_budget(config, engine)
    parts = budget.parts([len(t.token_ids) for t in trajectories], branches=prompt_branches(trajectories))
    parts = [part for part in parts if part]
    layouts, batches = [], []
    for part in parts:
        own = [trajectories[i] for i in part]
        layout = Layout([len(t.token_ids) for t in own], budget.rows, prompt_branches(own))
        layouts.append(layout)
        tensors = layout.tensors([t.token_ids for t in own])
        mask = layout.place([t.loss_mask for t in own], fill=False)
        batches.append(Batch(tensors | {"loss_mask": mask}))
    values: dict[int, np.ndarray] = {}
    for part, layout, output in zip(parts, layouts, engine.forward(batches, compute), strict=True):
        values |= {i: own.numpy() for i, own in zip(part, layout.take(output["out"]), strict=True)}
    return [values[i] for i in range(len(trajectories))]


def token_budget(config: RlhfConfig, engine: TrainEngine | FrozenEngine) -> TokenBudget:
    return TokenBudget(config.engine.micro_batch_size * config.data.max_seq_len, engine.packed, engine.branching)


def torch_dtype(config: StageConfig) -> torch.dtype:
    return torch.bfloat16 if config.engine.precision is Precision.bf16 else torch.float32
