"""RLHF: one driver over five pools. `Rlhf.iterate` is the algorithm; the parts are in their own rooms.

    prompts x group = sequences -> update minibatches x epochs = optimizer steps -> published weights

Each pool (policy, critic, reference, reward, rollout) runs in Ray actors or in this process, with the same code.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llmscale.batch import Prompt, Trajectory
from llmscale.checkpoint.commit import CheckpointStore
from llmscale.checkpoint.run_directory import RunDirectory, open_run, run_id
from llmscale.checkpoint.run_state import RunState
from llmscale.cluster.pool import WorkerPool, opened_pools
from llmscale.cluster.publish import VersionCounter
from llmscale.config import build, to_dict
from llmscale.data.loader import SampleOrder, micro_batches
from llmscale.data.splits import load_prompts
from llmscale.errors import ConfigError
from llmscale.models.loading import load_tokenizer, saved_context_length
from llmscale.protocols import SamplingRequest, State
from llmscale.rl.experience import (
    Experience,
    build_experience,
    check_first_update,
    check_on_policy,
    check_rewards,
    minibatches,
)
from llmscale.stages.config import RlhfConfig, check_context
from llmscale.stages.roles import CriticRole, PolicyRole, ReferenceRole, RewardRole, RolloutRole
from llmscale.tracking.composite import open_trackers
from llmscale.tracking.jsonl import last_metrics

Metrics = dict[str, float]
ROLES = {
    "policy": PolicyRole,
    "critic": CriticRole,
    "reference": ReferenceRole,
    "reward": RewardRole,
    "rollout": RolloutRole,
}


class Rlhf:
    """The state and the loop of one run."""

    def __init__(self, config: RlhfConfig, run: RunDirectory):
        self.config, self.run = config, run
        check_context(config, saved_context_length(str(config.model.path)))
        tokenizer = load_tokenizer(str(config.model.path))
        split = load_prompts(config.data, tokenizer, config.rollout.max_new_tokens)
        self.prompts, self.held_out = split.train, split.validation
        check_columns(config, [*self.prompts, *self.held_out])
        self.order = SampleOrder(len(self.prompts), config.run.seed)
        self.algorithm = build(config.algorithm)
        self.versions = VersionCounter(run.path / "weight_version")
        self.step = 0
        self.first_eval: Metrics = {}
        self.timings: Metrics = {}
        self.pools: Mapping[str, WorkerPool] = {}
        self.state = RunState()
        self.state.register("loop", self)

    # ------------------------------------------------------------ the algorithm

    def iterate(self) -> Metrics:
        """Sample, score, update, publish."""
        with self.timed("generate"):
            trajectories = self.generate(self.draw())
        with self.timed("score"):
            scoring = self.pools["reward"].units(RewardRole.score, self.units(trajectories))
            ref = self.pools["reference"].map(ReferenceRole.logprobs, trajectories)
            old = self.pools["policy"].map(PolicyRole.logprobs, trajectories)
            values = self.pools["critic"].map(CriticRole.values, trajectories)
            rewards, metrics = self.rewards(trajectories, scoring.wait())
            experience, more = build_experience(
                self.algorithm,
                trajectories,
                rewards,
                old.wait(),
                ref.wait(),
                values.wait(),
                self.config.algorithm.kl_coef,
            )
        check_on_policy(more, self.config.max_logprob_diff)
        with self.timed("update"):
            updates = self.update(experience)
        with self.timed("publish"):
            self.publish()
        self.record(trajectories, rewards)
        tokens = sum(t.completion_len for t in trajectories)
        return metrics | more | updates | {"perf/tokens_per_s": tokens / sum(self.timings.values())}

    def draw(self) -> list[SamplingRequest]:
        """This step's prompts, `group_size` samples of each; a function of the step alone."""
        size, group = self.config.training.prompts_per_step, self.config.rollout.group_size
        drawn = enumerate(self.order.batch(self.step, size), start=self.step * size)
        return [SamplingRequest(self.prompts[i], draw_id, k) for draw_id, i in drawn for k in range(group)]

    def generate(self, requests: Sequence[SamplingRequest]) -> list[Trajectory]:
        done = self.pools["rollout"].units(RolloutRole.generate, self.units(requests)).wait()
        return [trajectory for unit in done for trajectory in unit]

    def rewards(self, trajectories: Sequence[Trajectory], scored: list) -> tuple[list[float], Metrics]:
        pairs = [pair for unit in scored for pair in unit]
        rewards = [reward for reward, _ in pairs]
        check_rewards(trajectories, rewards)
        true = [value for _, value in pairs if value is not None]
        return rewards, ({"reward/true": float(np.mean(true))} if true else {})

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
        if not self.held_out:
            return {}
        trajectories = self.generate([SamplingRequest(p, -1 - i, 0) for i, p in enumerate(self.held_out)])
        scored = self.pools["reward"].units(RewardRole.score, self.units(trajectories)).wait()
        rewards, metrics = self.rewards(trajectories, scored)
        metrics["reward/mean"] = float(np.mean(rewards))
        metrics["rollout/completion_len"] = float(np.mean([t.completion_len for t in trajectories]))
        return {f"eval/{name}": value for name, value in metrics.items()}

    # ------------------------------------------------------------ the run around it

    def train(self) -> dict[str, Any]:
        config, training = self.config, self.config.training
        store = CheckpointStore(self.run.checkpoints, training.keep_checkpoints)
        skipped: list[dict[str, str]] = []
        checkpoint = store.newest_valid(lambda path, why: skipped.append({"path": str(path), "why": why}))
        if checkpoint is not None:
            self.state.load(checkpoint.path)
        tracker = self.tracker = open_trackers(
            config.tracking,
            run_dir=self.run.path,
            run_id=run_id(self.run.path),
            title="rlhf",
            total_steps=training.num_steps,
            resume_step=self.step if checkpoint else -1,
            run_config=to_dict(config),
        )
        status = "failed"
        try:
            for broken in skipped:
                tracker.event("checkpoint_skipped", **broken)
            tracker.event("plan", **plan(config))
            with self.pools_open():
                if checkpoint is not None:
                    self.restore(checkpoint.path)
                    tracker.event("resumed", step=self.step, checkpoint=str(checkpoint.path))
                else:
                    self.first_eval = self.evaluate()
                    if self.first_eval:
                        tracker.log(0, self.first_eval)
                self.loop(store)
                self.pools["policy"].call(PolicyRole.export, str(self.run.hf)).wait()
            status = "done"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            tracker.finish(status)
        return self.result

    def loop(self, store: CheckpointStore) -> None:
        training = self.config.training
        started = time.perf_counter()
        while self.step < training.num_steps:
            self.timings = {}
            with self.timed("step"):
                metrics = self.iterate()
            self.step += 1
            metrics |= self.timings
            if self.due(training.eval_every_steps):
                with self.timed("evaluate"):
                    metrics |= self.evaluate()
                metrics["timing_s/evaluate"] = self.timings["timing_s/evaluate"]
            self.tracker.log(self.step, metrics)
            if self.due(training.save_every_steps):
                self.save(store)
        self.result = {
            "stage": "rlhf",
            "run_dir": str(self.config.run_dir),
            "steps": self.step,
            "seconds": time.perf_counter() - started,
            "example": (self.held_out or self.prompts)[0].text,
            "before": self.first_eval,
            "metrics": last_metrics(self.run.path),
        }

    @contextmanager
    def pools_open(self) -> Iterator[None]:
        config_file = str((self.run.path / "config.yaml").resolve())
        builds = {name: partial(role, config_file) for name, role in ROLES.items()}
        started = time.perf_counter()
        with opened_pools(self.config.cluster, builds, self.run.attempt_dir) as self.pools:
            workers = {name: pool.num_workers for name, pool in self.pools.items()}
            self.tracker.event("pools_up", workers=workers, seconds=round(time.perf_counter() - started, 2))
            yield

    def save(self, store: CheckpointStore) -> None:
        def write(directory: Path) -> None:
            for name, role in (("policy", PolicyRole), ("critic", CriticRole)):
                (directory / name).mkdir()
                self.pools[name].call(role.save, str((directory / name).resolve())).wait()
            self.state.save(directory)

        with self.timed("save"):
            path = store.save(self.step, write)
        self.tracker.event("checkpoint", step=self.step, path=str(path), seconds=self.timings["timing_s/save"])

    def restore(self, checkpoint: Path) -> None:
        for name, role in (("policy", PolicyRole), ("critic", CriticRole)):
            self.pools[name].call(role.load, str((checkpoint / name).resolve())).wait()
        self.publish()

    def state_dict(self) -> State:
        return {"step": self.step, "first_eval": self.first_eval}

    def load_state_dict(self, state: State) -> None:
        self.step, self.first_eval = state["step"], state["first_eval"]

    def record(self, trajectories: Sequence[Trajectory], rewards: Sequence[float]) -> None:
        """samples.jsonl is complete enough to train from."""
        rows = zip(trajectories, rewards, strict=True)
        self.tracker.samples(self.step + 1, [_sample_record(t, reward) for t, reward in rows])

    def units(self, items: Sequence[Any]) -> list[list[Any]]:
        """Fixed dispatch units: what one holds does not depend on the number of workers."""
        return micro_batches(items, self.config.rollout.unit_size)

    def due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.training.num_steps

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.timings[f"timing_s/{name}"] = time.perf_counter() - started


def run(config: RlhfConfig) -> dict[str, Any]:
    """Start, resume, or return what a finished run found."""
    with closing(open_run(config.run_dir, config)) as directory:
        finished = directory.result()
        if finished is None:
            finished = Rlhf(config, directory).train()
            directory.finish(finished)
        return finished


def check_columns(config: RlhfConfig, prompts: Sequence[Prompt]) -> None:
    """Raises: ConfigError when a reward needs a column that a prompt lacks, before anything is sampled."""
    for name in ("reward", "true_reward"):
        reward = getattr(config, name)
        for column in reward.needs_columns() if reward is not None else []:
            lacking = next((p for p in prompts if column not in p.fields), None)
            if lacking is not None:
                what = f"{name}={reward.name} needs the column {column!r}, which the prompt {lacking.text!r} lacks"
                raise ConfigError(what, where=f"{name}.column", fix=f"It has: {', '.join(lacking.fields) or 'none'}.")


def plan(config: RlhfConfig) -> dict[str, Any]:
    """The batch arithmetic, so that nobody has to guess."""
    prompts, group = config.training.prompts_per_step, config.rollout.group_size
    minibatches_per_epoch = -(-prompts * group // config.algorithm.global_batch_size)
    return {
        "prompts": prompts,
        "group_size": group,
        "sequences": prompts * group,
        "minibatches": minibatches_per_epoch,
        "epochs": config.algorithm.num_epochs,
        "optimizer_steps": config.training.num_steps * config.algorithm.num_epochs * minibatches_per_epoch,
        "micro_batch_size": config.engine.micro_batch_size,
        "workers": {name: getattr(config.cluster, name).num_workers for name in ROLES},
    }


def _means(prefix: str, steps: Sequence[Metrics]) -> Metrics:
    names = [n for n in steps[0] if n != "num_tokens"]
    return {f"{prefix}/{name}": float(np.mean([s[name] for s in steps])) for name in names}


def _sample_record(trajectory: Trajectory, reward: float) -> dict[str, Any]:
    return {
        "draw_id": trajectory.draw_id,
        "sample_index": trajectory.sample_index,
        "prompt": trajectory.prompt.text,
        "completion": trajectory.completion,
        "reward": reward,
        "finished": trajectory.finished,
        "token_ids": trajectory.token_ids.tolist(),
        "loss_mask": trajectory.loss_mask.astype(int).tolist(),
        "rollout_logprobs": [round(float(x), 6) for x in trajectory.rollout_logprobs],
        "weight_versions": trajectory.weight_versions.tolist(),
    }
