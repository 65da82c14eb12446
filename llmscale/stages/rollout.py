"""Batch inference: completions of every prompt, from all rollout workers. A run like others:

    completions.jsonl   a line for each sample, in the order of the prompts, with the prompt's columns and the model's digest

Samples are generated in dispatch units and written in order as they come; prompts are in memory, samples never. What a unit
holds depends on nothing but config and data, so an interrupted run goes on at the first unit that is not wholly on disk, and
its file becomes that of an undisturbed one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from llmscale.batch import Trajectory
from llmscale.checkpoint.run_directory import RunDirectory, run_id, run_once
from llmscale.cluster.pool import WorkerPool
from llmscale.config import to_dict
from llmscale.data.splits import load_prompts
from llmscale.errors import Requeue, RunError
from llmscale.models.loading import load_tokenizer, saved_context_length, weights_digest
from llmscale.protocols import SamplingRequest, Score, Tracker
from llmscale.rl.admission import check_finite, means_of_parts
from llmscale.rollout.recording import COMPLETIONS, to_record
from llmscale.stages.answering_config import RolloutStageConfig
from llmscale.stages.config import check_context
from llmscale.stages.rlhf_run import check_columns, room_for_completions
from llmscale.stages.roles import RewardRole, RolloutRole, opened_roles
from llmscale.tracking.composite import finishing, open_trackers
from llmscale.tracking.jsonl import METRICS, RecordFile, iter_jsonl
from llmscale.training.stop import signals

NUM_SAMPLES, NUM_TOKENS = "rollout/samples", "rollout/tokens"  # of a step; the other metrics are means over its samples


def run(config: RolloutStageConfig) -> dict[str, Any]:
    return run_once(config.run_dir, config, lambda directory: BatchInference(config, directory).complete())


class BatchInference:
    """One attempt of a run. A step is a dispatch unit."""

    def __init__(self, config: RolloutStageConfig, directory: RunDirectory):
        self.config, self.directory = config, directory
        path = str(config.model.path)
        check_context(config, saved_context_length(path))
        tokenizer = load_tokenizer(path)
        self.prompts = load_prompts(config.data, tokenizer, room_for_completions(config, tokenizer)).train
        check_columns(config, self.prompts)
        self.model = weights_digest(path)
        self.num_samples = len(self.prompts) * config.num_samples
        self.num_steps = -(-self.num_samples // config.rollout.unit_size)

    def complete(self) -> dict[str, Any]:
        started, path = time.perf_counter(), self.directory.path
        done = self.steps_on_disk()
        tracker = open_trackers(
            self.config.tracking,
            run_dir=path,
            run_id=run_id(path),
            title="rollout",
            total_steps=self.num_steps,
            resume_step=done or -1,
            run_config=to_dict(self.config),
        )
        with finishing(tracker):
            tracker.event("resumed" if done else "plan", step=done, **self.plan())
            self.sample_from(done, tracker)
        result: dict[str, Any] = {"stage": "rollout", "run_dir": str(path), "steps": self.num_steps}
        return result | {"seconds": time.perf_counter() - started, "metrics": totals(path)}

    def sample_from(self, done: int, tracker: Tracker) -> None:
        """Every step after the first `done`, whose lines alone stay in the file."""
        kept = iter(range(done * self.config.rollout.unit_size))
        is_kept = lambda _: next(kept, None) is not None  # noqa: E731
        with closing(RecordFile(self.directory.path / COMPLETIONS, is_kept, tracker.event)) as file:
            if done == self.num_steps:
                return
            with opened_roles(self.config, self.directory, self.roles, tracker) as pools, signals.deferred():
                for step, records, metrics in self.steps(done, pools):
                    file.append(records)
                    tracker.log(step, metrics)  # last: it says that the step is whole
                    if signals.received and step < self.num_steps:
                        raise Requeue(f"stopped and saved at step {step}; the same command resumes")

    def steps(
        self, done: int, pools: Mapping[str, WorkerPool]
    ) -> Iterator[tuple[int, list[dict[str, Any]], dict[str, float]]]:
        """What each step after the first `done` found: its number, its lines, its metrics."""
        started, num_tokens = time.perf_counter(), 0
        units = (self.unit(step) for step in range(done, self.num_steps))
        for step, trajectories in enumerate(pools["rollout"].stream(RolloutRole.generate, units), start=done + 1):
            scores = self.score(trajectories, pools)
            metrics = step_metrics(trajectories, scores)
            num_tokens += int(metrics[NUM_TOKENS])
            metrics["perf/tokens_per_s"] = num_tokens / (time.perf_counter() - started)  # so far: workers overlap
            yield step, [self.record(*pair) for pair in zip(trajectories, scores, strict=True)], metrics

    def unit(self, number: int) -> list[SamplingRequest]:
        """A prompt's draw is its place in the data."""
        size, num_samples = self.config.rollout.unit_size, self.config.num_samples
        places = (divmod(i, num_samples) for i in range(self.num_samples)[number * size : (number + 1) * size])
        return [SamplingRequest(self.prompts[draw], draw, sample) for draw, sample in places]

    def score(self, trajectories: Sequence[Trajectory], pools: Mapping[str, WorkerPool]) -> list[Score | None]:
        """None where no reward is configured."""
        if "reward" not in pools:
            return [None] * len(trajectories)
        (pairs,) = pools["reward"].units(RewardRole.score, [trajectories]).wait()
        scores = [score for score, _ in pairs]
        check_finite(trajectories, scores)
        return scores

    def record(self, trajectory: Trajectory, score: Score | None) -> dict[str, Any]:
        about: dict[str, Any] = {"fields": dict(trajectory.prompt.fields), "model": self.model}
        if score is not None:
            about |= {"reward": score.value, "reward_parts": dict(score.parts), "reward_why": score.why}
        return to_record(trajectory, logprobs=self.config.record_logprobs, **about)

    def steps_on_disk(self) -> int:
        """How many steps from the first on are wholly recorded, with their metrics.

        Raises: RunError when what was sampled are not these prompts, or not by this model.
        """
        path, num_samples = self.directory.path, 0
        logged = sum(1 for _ in iter_jsonl(path / METRICS)) if (path / METRICS).exists() else 0
        if not logged or not (path / COMPLETIONS).exists():
            return 0
        for sample in iter_jsonl(path / COMPLETIONS):
            num_samples += 1
            draw = sample["draw_id"]
            changed = ""
            if draw >= len(self.prompts) or self.prompts[draw].text != sample["prompt"]:
                changed = f"prompt {draw} was {sample['prompt']!r} when this run began; the data have changed"
            elif sample["model"] != self.model:
                changed = f"the weights of {self.config.model.path} are not those that this run began with"
            if changed:
                raise RunError(changed, where=str(path), fix="Give this run another run.name=..., or put the old back.")
        is_all = num_samples == self.num_samples
        whole = self.num_steps if is_all else num_samples // self.config.rollout.unit_size
        return min(whole, logged)

    @property
    def roles(self) -> list[str]:
        return ["rollout"] if self.config.reward is None else ["reward", "rollout"]

    def plan(self) -> dict[str, Any]:
        """The arithmetic, so that nobody has to guess."""
        return {
            "prompts": len(self.prompts),
            "num_samples": self.config.num_samples,
            "completions": self.num_samples,
            "steps": self.num_steps,
            "workers": {name: getattr(self.config.cluster, name).num_workers for name in self.roles},
            "model": self.model,
        }


def step_metrics(trajectories: Sequence[Trajectory], scores: Sequence[Score | None]) -> dict[str, float]:
    num_tokens = sum(t.completion_len for t in trajectories)
    metrics = {
        NUM_SAMPLES: len(trajectories),
        NUM_TOKENS: num_tokens,
        "rollout/completion_len": num_tokens / len(trajectories),
        "rollout/cut_off": sum(not t.finished for t in trajectories) / len(trajectories),
        "rollout/failed": sum(bool(t.failure) for t in trajectories) / len(trajectories),
    }
    found = [s for s in scores if s is not None and s.value is not None]
    if any(s is not None for s in scores):
        metrics["reward/excluded"] = sum(s is None or s.value is None for s in scores) / len(scores)
    if found:
        metrics |= {"reward/mean": float(np.mean([s.value for s in found]))} | means_of_parts(found)
    return metrics


def totals(run_dir: Path) -> dict[str, float]:
    """Over all steps: the numbers of samples and tokens, and the means of the rest."""
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    for step in iter_jsonl(run_dir / METRICS):
        num_scored = step[NUM_SAMPLES] * (1 - step.get("reward/excluded", 0))
        for name, value in step.items():
            if name in (NUM_SAMPLES, NUM_TOKENS):
                sums[name] = sums.get(name, 0) + value
            elif name.startswith(("rollout/", "reward/")):
                of_scored = name.startswith("reward/") and name != "reward/excluded"
                weight = num_scored if of_scored else step[NUM_SAMPLES]
                sums[name] = sums.get(name, 0.0) + value * weight
                counts[name] = counts.get(name, 0.0) + weight
    return {name: value / counts[name] if name in counts else value for name, value in sums.items()}
