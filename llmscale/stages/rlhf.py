"""RLHF as an algorithm: sample, score, experience, update, publish. `Rlhf.iterate` is one step of it; the parts are in their
own rooms, and the run around it (checkpoints, tracking, resuming) in `rlhf_run.py`.

Five pools of workers (policy, critic, reference, reward, rollout) run in Ray actors or in this process, with the same code.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np

from llmscale.batch import Prompt, Trajectory
from llmscale.cluster.pool import WorkerPool
from llmscale.cluster.publish import VersionCounter
from llmscale.config import build
from llmscale.data.loader import micro_batches
from llmscale.data.splits import Split
from llmscale.protocols import SamplingRequest, Score
from llmscale.rewards.diversity import diversity_metrics
from llmscale.rl.admission import admitted, check_finite, reward_metrics, true_metrics, unscored, without_nonfinite
from llmscale.rl.experience import (
    Experience,
    Scored,
    build_experience,
    check_first_update,
    check_on_policy,
    minibatches,
)
from llmscale.stages.config import OnNonfinite, RlhfConfig
from llmscale.stages.roles import CriticRole, PolicyRole, ReferenceRole, RewardRole, RolloutRole

Metrics = dict[str, float]


class Rlhf:
    """One run's algorithm over its pools. `step` counts the finished steps; all else is a function of it and the seed."""

    def __init__(
        self,
        config: RlhfConfig,
        prompts: Split[Prompt],
        pools: Mapping[str, WorkerPool],
        versions: VersionCounter,
        event: Callable[..., None],
    ):
        self.config, self.prompts, self.pools, self.versions, self.event = config, prompts, pools, versions, event
        self.order = prompts.order(config.run.seed)
        self.algorithm = build(config.algorithm)
        self.step = 0
        self.timings: Metrics = {}

    def iterate(self) -> tuple[Metrics, list[Scored]]:
        """One step: what it measured, and the samples that it learned from."""
        self.timings = {}
        with self.timed("generate"):
            trajectories = self.sample(self.draw())
        with self.timed("score"):
            scored, measured = self.score(trajectories)
        experience, metrics = build_experience(self.algorithm, scored, self.config.algorithm.kl_coef)
        metrics |= measured | diversity_metrics(trajectories)
        check_on_policy(metrics, self.config.max_logprob_diff)
        with self.timed("update"):
            metrics |= self.update(experience)
        with self.timed("publish"):
            self.publish()
        self.step += 1
        metrics["perf/tokens_per_s"] = sum(t.completion_len for t in trajectories) / sum(self.timings.values())
        return metrics | self.timings, scored

    def draw(self) -> list[SamplingRequest]:
        """This step's prompts, `group_size` samples of each."""
        size, group = self.config.training.prompts_per_step, self.config.rollout.group_size
        drawn = enumerate(self.order.batch(self.step, size), start=self.step * size)
        return [SamplingRequest(self.prompts.train[i], draw_id, k) for draw_id, i in drawn for k in range(group)]

    def sample(self, requests: Sequence[SamplingRequest]) -> list[Trajectory]:
        units = self.pools["rollout"].units(RolloutRole.generate, self.units_of(requests)).wait()
        return [trajectory for unit in units for trajectory in unit]

    def score(self, trajectories: Sequence[Trajectory]) -> tuple[list[Scored], Metrics]:
        """Rewards, and every model's view of every token; the four pools work side by side. Samples without a reward are
        left out."""
        rewards = self.pools["reward"].units(RewardRole.score, self.units_of(trajectories))
        ref_logprobs = self.pools["reference"].map(ReferenceRole.logprobs, trajectories)
        old_logprobs = self.pools["policy"].map(PolicyRole.logprobs, trajectories)
        values = self.pools["critic"].map(CriticRole.values, trajectories)
        scores, true = self.rewards(trajectories, rewards.wait(), self.step + 1)
        kept = admitted(trajectories, scores, whole_draws=self.config.rollout.group_size > 1)
        views = [old_logprobs.wait(), ref_logprobs.wait(), values.wait()]
        scored = [scored_sample(trajectories[i], scores[i], true[i], *(view[i] for view in views)) for i in kept]
        return scored, reward_metrics(scores, len(kept)) | true_metrics(true)

    def rewards(
        self, trajectories: Sequence[Trajectory], units: Sequence[Sequence[tuple[Score, Score | None]]], step: int
    ) -> tuple[list[Score], list[Score | None]]:
        """The rewards and the true ones, as the reward workers gave them; what cannot be used is recorded, or stops the run."""
        scores, true = [s for unit in units for s, _ in unit], [t for unit in units for _, t in unit]
        if self.config.on_nonfinite is OnNonfinite.stop:
            check_finite(trajectories, scores)
        scores = without_nonfinite(scores)
        for sample in unscored(trajectories, scores):
            self.event("sample_excluded", step=step, **asdict(sample))
        return scores, true

    def update(self, experience: Sequence[Experience]) -> Metrics:
        """Every epoch over every minibatch, policy and critic side by side."""
        algorithm, seed = self.config.algorithm, self.config.run.seed
        batches = [
            [experience[i] for i in indexes]
            for epoch in range(algorithm.num_epochs)
            for indexes in minibatches(len(experience), algorithm.global_batch_size, seed, self.step, epoch)
        ]
        policy = self.pools["policy"].call(PolicyRole.update, batches)
        critic = self.pools["critic"].call(CriticRole.update, batches)
        policy_steps, critic_steps = policy.wait()[0], critic.wait()[0]
        check_first_update(policy_steps[0]["approx_kl"], self.config.max_logprob_diff)
        return _means("policy", policy_steps) | _means("value", critic_steps)

    def publish(self) -> None:
        """New weights for every rollout worker, checked by fingerprint on both sides."""
        handles = self.pools["policy"].call(PolicyRole.publish).wait()[0]
        self.pools["rollout"].call(RolloutRole.load_weights, self.versions.next(), handles).wait()

    def evaluate(self) -> Metrics:
        """Mean scores on the held-out prompts. Their draws are the same every time, so that two policies are compared on
        the same randomness."""
        if not self.prompts.validation:
            return {}
        with self.timed("evaluate"):
            trajectories = self.sample([SamplingRequest(p, -1 - i, 0) for i, p in enumerate(self.prompts.validation)])
            units = self.pools["reward"].units(RewardRole.score, self.units_of(trajectories)).wait()
        scores, true = self.rewards(trajectories, units, self.step)
        kept = admitted(trajectories, scores, whole_draws=False)
        metrics = {"reward/mean": float(np.mean([scores[i].value for i in kept]))}
        metrics |= reward_metrics(scores, len(kept)) | true_metrics(true) | diversity_metrics(trajectories)
        metrics["rollout/completion_len"] = float(np.mean([t.completion_len for t in trajectories]))
        timing = {"timing_s/evaluate": self.timings["timing_s/evaluate"]}
        return {f"eval/{name}": value for name, value in metrics.items()} | timing

    def units_of(self, items: Sequence[Any]) -> list[list[Any]]:
        """Fixed dispatch units: what one holds does not depend on the number of workers."""
        return micro_batches(items, self.config.rollout.unit_size)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.timings[f"timing_s/{name}"] = time.perf_counter() - started


def scored_sample(
    trajectory: Trajectory, score: Score, true: Score | None, old: np.ndarray, ref: np.ndarray, values: np.ndarray
) -> Scored:
    assert score.value is not None, "it was admitted"
    true_reward = true.value if true is not None else None
    return Scored(trajectory, score.value, true_reward, old, ref, values, score.parts, score.why)


def _means(prefix: str, steps: Sequence[Metrics]) -> Metrics:
    names = [n for n in steps[0] if n != "num_tokens"]
    return {f"{prefix}/{name}": float(np.mean([s[name] for s in steps])) for name in names}
