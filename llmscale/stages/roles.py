"""What each worker of an RLHF run, or of a collection, holds. A role joins an engine with the algorithm; it runs in a Ray
actor or in the driver's own process and knows nothing of either. Every role reads the frozen config of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import llmscale.stages.config  # noqa: F401  registers every option before a config is read
from llmscale import distributed
from llmscale.batch import Batch, Layout, Trajectory
from llmscale.checkpoint.durable import commit_directory, fsync_tree
from llmscale.cluster.publish import BUCKET_BYTES, receive, send
from llmscale.config import build, load
from llmscale.data.batching import TokenBudget
from llmscale.data.chat import ChatRenderer
from llmscale.engine.config import DeepSpeedConfig, Precision
from llmscale.engine.frozen import FrozenEngine
from llmscale.models.loading import cast_parameters, load_language_model, load_scalar_model, load_tokenizer
from llmscale.optim.config import OptimConfig
from llmscale.protocols import Forward, Objective, RolloutEngine, SamplingRequest, Score, TrainEngine
from llmscale.rewards.weighted import build_reward
from llmscale.rl.experience import Algorithm, Experience
from llmscale.rl.objectives import PolicyObjective, ValueObjective, state_values
from llmscale.rollout.beam import BeamSearch
from llmscale.rollout.config import HFRolloutConfig
from llmscale.stages.config import BeamConfig, CollectConfig, RlhfConfig, StageConfig


def new_algorithm(config: RlhfConfig) -> Algorithm:
    algorithm: Algorithm = build(config.algorithm, config.rollout.max_new_tokens)
    return algorithm


class TrainedRole:
    """What policy and critic share: an engine over the ranks of their pool, and the updates of one step."""

    engine: TrainEngine
    objective: Objective

    def __init__(self, config_file: str):
        self.config: RlhfConfig = load(Path(config_file))
        self.world = distributed.join(self.config.cluster.collective_timeout_s)
        self.tokenizer = load_tokenizer(str(self.config.model.path))

    def update(self, minibatches: Sequence[Sequence[Experience]]) -> list[dict[str, float]]:
        """One optimizer step for each minibatch; this rank takes its share of it. Returns each step's metrics."""
        budget, metrics = token_budget(self.config, self.engine), []
        for minibatch in minibatches:
            parts = budget.parts([len(e.token_ids) for e in minibatch], self.world.rank, self.world.size)
            batches = [self.objective.prepare([minibatch[i] for i in part], budget.row_tokens) for part in parts]
            metrics.append(self.engine.step(batches, self.objective))
        return metrics

    def save(self, directory: str) -> None:
        self.engine.snapshot()(Path(directory))
        fsync_tree(Path(directory))  # by the host that wrote it

    def load(self, directory: str) -> None:
        self.engine.load(Path(directory))

    def export(self, directory: str) -> None:
        """Collective: write the model as a Hugging Face folder."""
        if self.world.is_main:
            commit_directory(Path(directory), lambda partial: self.engine.export(partial, self.tokenizer))
        else:
            self.engine.export(Path(directory), self.tokenizer)

    def _total_steps(self) -> int:
        training, algorithm = self.config.training, self.config.algorithm
        sequences = training.prompts_per_step * self.config.group_size
        return training.num_steps * algorithm.num_epochs * -(-sequences // algorithm.global_batch_size)

    def _new_engine(self, model: Any, optim: OptimConfig) -> TrainEngine:
        return build(self.config.engine, model, optim, self._total_steps())


class PolicyRole(TrainedRole):
    def __init__(self, config_file: str):
        super().__init__(config_file)
        self.engine = self._new_engine(load_language_model(str(self.config.model.path)), self.config.optim)
        algorithm = new_algorithm(self.config)
        temperature, entropy_coef = self.config.rollout.temperature, self.config.algorithm.entropy_coef
        old_is_rollout = not self.config.scores_by_policy
        self.objective = PolicyObjective(algorithm, temperature, entropy_coef, old_is_rollout)

    def logprobs(self, trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
        """log p of each token under the policy as it is now, float32 [T] a trajectory."""
        return token_values(self.engine, trajectories, self.config, logprobs_at(self.config.rollout.temperature))

    def publish(self) -> list[Any]:
        """Collective: handles to the weights, in the precision that rollouts use."""
        return send(self.engine.full_parameters(BUCKET_BYTES), torch_dtype(self.config))


class CriticRole(TrainedRole):
    def __init__(self, config_file: str):
        super().__init__(config_file)
        model = load_scalar_model(self.config.critic_path, seed=self.config.run.seed, zero_head=True)
        self.engine = self._new_engine(model, self.config.critic.optim)
        self.objective = ValueObjective(new_algorithm(self.config))

    def values(self, trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
        """Value of the state before each token, float32 [T] a trajectory."""
        return token_values(self.engine, trajectories, self.config, lambda f, b: {"out": state_values(f(b))})


class ReferenceRole:
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
        config: RlhfConfig | CollectConfig = load(Path(config_file))
        tokenizer = load_tokenizer(str(config.model.path))
        self.reward = build_reward(config.reward, tokenizer, "reward")
        self.true_reward = None
        if config.true_reward is not None:
            self.true_reward = build_reward(config.true_reward, tokenizer, "true_reward")

    def score(self, trajectories: Sequence[Trajectory]) -> list[tuple[Score, Score | None]]:
        """(reward, true reward) of each trajectory; the second is None where none is configured."""
        scores = self.reward(trajectories)
        true = self.true_reward(trajectories) if self.true_reward is not None else [None] * len(scores)
        return list(zip(scores, true, strict=True))


class RolloutRole:
    def __init__(self, config_file: str):
        config: RlhfConfig | CollectConfig = load(Path(config_file))
        path = str(config.model.path)
        model, tokenizer = load_language_model(path), load_tokenizer(path)
        cast_parameters(model, torch_dtype(config))
        around = (model, tokenizer, config.run.seed, ChatRenderer(tokenizer).stop_ids)
        if isinstance(config, CollectConfig) and isinstance(config.method, BeamConfig):
            self.engine: RolloutEngine = BeamSearch(
                HFRolloutConfig(max_new_tokens=config.rollout.max_new_tokens),
                *around,
                num_best=config.num_samples,
                num_beams=config.num_beams,
                length_penalty=config.method.length_penalty,
            )
        else:
            self.engine = build(config.rollout, *around)

    def generate(self, requests: Sequence[SamplingRequest]) -> list[Trajectory]:
        return self.engine.generate(requests)

    def load_weights(self, version: int, handles: list[Any]) -> None:
        self.engine.load_weights(version, receive(handles))


Compute = Callable[[Forward, Batch], dict[str, Tensor]]


def logprobs_at(temperature: float) -> Compute:
    return lambda forward, batch: {"out": forward.logprobs(batch, batch["loss_mask"], temperature)[0]}


def token_values(
    engine: TrainEngine | FrozenEngine, trajectories: Sequence[Trajectory], config: RlhfConfig, compute: Compute
) -> list[np.ndarray]:
    """Run `compute` over the trajectories in micro-batches; what it says of each one's tokens, in order."""
    budget = token_budget(config, engine)
    parts = [part for part in budget.parts([len(t.token_ids) for t in trajectories]) if part]
    layouts = [Layout([len(trajectories[i].token_ids) for i in part], budget.row_tokens) for part in parts]
    batches = []
    for part, layout in zip(parts, layouts, strict=True):
        tensors = layout.tensors([trajectories[i].token_ids for i in part])
        mask = layout.place([trajectories[i].loss_mask for i in part], fill=False)
        batches.append(Batch(tensors | {"loss_mask": mask}))
    values: dict[int, np.ndarray] = {}
    for part, layout, output in zip(parts, layouts, engine.forward(batches, compute), strict=True):
        values |= {i: own.numpy() for i, own in zip(part, layout.take(output["out"]), strict=True)}
    return [values[i] for i in range(len(trajectories))]


def token_budget(config: RlhfConfig, engine: TrainEngine | FrozenEngine) -> TokenBudget:
    return TokenBudget(config.engine.micro_batch_size * config.data.max_seq_len, engine.packed)


def torch_dtype(config: StageConfig) -> torch.dtype:
    return torch.bfloat16 if config.engine.precision is Precision.bf16 else torch.float32
