"""Collecting data from a policy: completions of every prompt, by sampling or beam search, and their scores. A run like others:

    samples.jsonl    every completion with its score and log-probabilities, as rlhf writes them
    rankings.jsonl   what `llmscale reward data.train=` reads        sft.jsonl   what `llmscale sft data.train=` reads

The prompts are cut into steps. What a step finds depends on nothing but the config, so an interrupted run goes on at the first
step that is not on disk, and its files become those of an undisturbed one.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from llmscale.batch import Prompt, Trajectory
from llmscale.checkpoint.run_directory import RunDirectory, run_id, run_once
from llmscale.cluster.pool import WorkerPool
from llmscale.config import to_dict
from llmscale.data.loader import micro_batches
from llmscale.data.splits import load_prompts
from llmscale.errors import Requeue, RunError
from llmscale.models.loading import load_tokenizer, saved_context_length
from llmscale.protocols import SamplingRequest, Score
from llmscale.rl.admission import admitted, check_finite, check_some_left, unscored
from llmscale.stages.answering_config import CollectConfig
from llmscale.stages.collected import write_collected
from llmscale.stages.config import check_context
from llmscale.stages.rlhf_run import check_columns, sample_record
from llmscale.stages.roles import RewardRole, RolloutRole, opened_roles
from llmscale.tracking.composite import finishing, open_trackers
from llmscale.tracking.jsonl import METRICS, SAMPLES, iter_jsonl
from llmscale.training.stop import signals

ROLES = ("reward", "rollout")
NUM_SAMPLES = "collect/samples"  # of a step, among its metrics: so many lines of samples.jsonl make it whole

Scored = tuple[Trajectory, Score, float, float | None]  # with its score, reward and true reward


def run(config: CollectConfig) -> dict[str, Any]:
    return run_once(config.run_dir, config, lambda directory: Collection(config, directory).collect())


class Collection:
    """One attempt of a run."""

    def __init__(self, config: CollectConfig, directory: RunDirectory):
        self.config, self.directory = config, directory
        path = str(config.model.path)
        check_context(config, saved_context_length(path))
        self.prompts = load_prompts(config.data, load_tokenizer(path), config.rollout.max_new_tokens).train
        check_columns(config, self.prompts)
        self.num_steps = -(-len(self.prompts) // config.prompts_per_step)

    def collect(self) -> dict[str, Any]:
        started, path = time.perf_counter(), self.directory.path
        done = steps_on_disk(path, self.prompts)
        self.tracker = open_trackers(
            self.config.tracking,
            run_dir=path,
            run_id=run_id(path),
            title="collect",
            total_steps=self.num_steps,
            resume_step=done or -1,
            run_config=to_dict(self.config),
        )
        with finishing(self.tracker):
            self.tracker.event("resumed" if done else "plan", step=done, **self.plan())
            if done < self.num_steps:
                with opened_roles(self.config, self.directory, ROLES, self.tracker) as pools, signals.deferred():
                    self.sample_from(done, pools)
            found = write_collected(path, self.config, self.prompts)
            written = {n: v for n, v in found["metrics"].items() if n.startswith(("rankings/", "sft/"))}
            self.tracker.event("written", **written)
        seconds = time.perf_counter() - started
        return {"stage": "collect", "run_dir": str(path), "steps": self.num_steps, "seconds": seconds} | found

    def sample_from(self, done: int, pools: Mapping[str, WorkerPool]) -> None:
        """Every step after the first `done`."""
        for step in range(done + 1, self.num_steps + 1):
            started = time.perf_counter()
            trajectories = self.generate(step, pools["rollout"])
            generated = time.perf_counter()
            scored = self.score(step, trajectories, pools["reward"])
            metrics = step_metrics(scored)
            metrics["timing_s/generate"] = generated - started
            metrics["timing_s/score"] = time.perf_counter() - generated
            num_tokens = sum(t.completion_len for t in trajectories)
            metrics["perf/tokens_per_s"] = num_tokens / (time.perf_counter() - started)
            records = [sample_record(t, reward, true, score.parts, score.why) for t, score, reward, true in scored]
            self.tracker.samples(step, records)
            self.tracker.log(step, metrics)
            if signals.received and step < self.num_steps:
                raise Requeue(f"stopped and saved at step {step}; the same command resumes")

    def generate(self, step: int, pool: WorkerPool) -> list[Trajectory]:
        """All completions of a step's prompts. A prompt is drawn once; its draw is its place in the data."""
        config = self.config
        first = (step - 1) * config.prompts_per_step
        drawn = enumerate(self.prompts[first : first + config.prompts_per_step], start=first)
        samples = 1 if config.num_beams else config.num_samples  # a beam search gives all at once
        requests = [SamplingRequest(prompt, draw, k) for draw, prompt in drawn for k in range(samples)]
        # What a unit holds depends neither on the workers nor on where a run was interrupted.
        units = micro_batches(requests, max(1, config.rollout.unit_size // max(1, config.num_beams)))
        return [t for unit in pool.units(RolloutRole.generate, units).wait() for t in unit]

    def score(self, step: int, trajectories: Sequence[Trajectory], pool: WorkerPool) -> list[Scored]:
        """Those that could be scored; the others are named in events.jsonl."""
        units = micro_batches(trajectories, self.config.rollout.unit_size)
        pairs = [pair for unit in pool.units(RewardRole.score, units).wait() for pair in unit]
        scores = [score if true is None or true.value is not None else true for score, true in pairs]
        check_finite(trajectories, scores)
        for sample in unscored(trajectories, scores):
            self.tracker.event("sample_excluded", step=step, **asdict(sample))
        kept = admitted(trajectories, scores, whole_draws=False)
        check_some_left(len(kept), trajectories, scores)
        found = []
        for i in kept:
            score, true = pairs[i]
            assert score.value is not None, "it was admitted"
            found.append((trajectories[i], score, score.value, true.value if true is not None else None))
        return found

    def plan(self) -> dict[str, Any]:
        """The arithmetic, so that nobody has to guess."""
        prompts, samples = len(self.prompts), self.config.num_samples
        return {
            "prompts": prompts,
            "num_samples": samples,
            "completions": prompts * samples,
            "steps": self.num_steps,
            "workers": {name: getattr(self.config.cluster, name).num_workers for name in ROLES},
        }


def step_metrics(scored: Sequence[Scored]) -> dict[str, float]:
    best: dict[int, float] = {}
    for trajectory, _, reward, _ in scored:
        best[trajectory.draw_id] = max(reward, best.get(trajectory.draw_id, reward))
    true = [value for *_, value in scored if value is not None]
    return {
        NUM_SAMPLES: len(scored),
        "reward/mean": float(np.mean([reward for _, _, reward, _ in scored])),
        "reward/best": float(np.mean(list(best.values()))),
        **({"reward/true": float(np.mean(true))} if true else {}),
        "rollout/completion_len": float(np.mean([t.completion_len for t, *_ in scored])),
        "rollout/cut_off": sum(not t.finished for t, *_ in scored) / len(scored),
    }


def steps_on_disk(run_dir: Path, prompts: Sequence[Prompt]) -> int:
    """How many steps from the first on are wholly recorded. A step's metrics come after its samples and say how many they
    are, so that neither a kill between the two nor a lost disk buffer goes unnoticed.

    Raises: RunError when what was sampled are not these prompts.
    """
    if not all((run_dir / name).exists() for name in (METRICS, SAMPLES)):
        return 0
    found: Counter[int] = Counter()
    for sample in iter_jsonl(run_dir / SAMPLES):
        draw = sample["draw_id"]
        if draw >= len(prompts) or prompts[draw].text != sample["prompt"]:
            what = f"prompt {draw} was {sample['prompt']!r} when this run began; the data have changed"
            raise RunError(what, where=str(run_dir), fix="Give this run another run.name=..., or put the data back.")
        found[sample["step"]] += 1
    wanted = {metrics["step"]: metrics[NUM_SAMPLES] for metrics in iter_jsonl(run_dir / METRICS)}
    step = 0
    while wanted.get(step + 1) == found[step + 1] > 0:
        step += 1
    return step
