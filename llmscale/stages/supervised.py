"""Pretraining, SFT and reward modelling: tokens come from a file. One rank of it, the same wherever it runs; how ranks are
started is in `supervised_run.py`.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmscale import distributed
from llmscale.batch import Batch
from llmscale.checkpoint.background import AsyncSaver, Saved
from llmscale.checkpoint.commit import CheckpointStore
from llmscale.checkpoint.durable import commit_directory
from llmscale.checkpoint.run_directory import run_id
from llmscale.checkpoint.run_state import RunState
from llmscale.config import build, to_dict
from llmscale.data.batching import Prefetcher, TokenBudget
from llmscale.data.examples import Examples
from llmscale.data.splits import Split, load_conversations, load_rankings, load_solutions, load_text
from llmscale.data.text import read_texts
from llmscale.data.tokenizer import train_tokenizer
from llmscale.engine.config import Precision
from llmscale.errors import ConfigError, Requeue
from llmscale.models.adapters import FrozenBase, adapted
from llmscale.models.flops import flops_per_token, peak_flops
from llmscale.models.loading import (
    Model,
    check_isolation,
    context_length,
    load_language_model,
    load_scalar_model,
    load_tokenizer,
    new_language_model,
    num_parameters,
)
from llmscale.phases import phase
from llmscale.protocols import Digests, Tracker
from llmscale.stages.appraisal import appraise, check_objective
from llmscale.stages.config import SupervisedConfig, check_context
from llmscale.stages.leaving import write_model
from llmscale.tracking.composite import NullTracker, finishing, open_trackers
from llmscale.tracking.jsonl import last_metrics
from llmscale.training.guard import Guard
from llmscale.training.loop import Hook, Metrics, train
from llmscale.training.stop import StopRequest, signals
from llmscale.training.validation import Validation
from llmscale.training.watchdog import Watchdog

ROLE = "trainer"
PATIENCE_S = 3600.0  # longest wait for what one rank does for all: train a tokenizer, write or verify a checkpoint
LOADERS: dict[tuple[str, str], Callable[..., Split[Any]]] = {  # by stage and what its objective reads
    ("pretrain", "tokens"): load_text,
    ("sft", "tokens"): load_conversations,
    ("reward", "rankings"): load_rankings,
    ("reward", "solutions"): load_solutions,
}


class SupervisedRun:
    """One rank of a supervised stage: what it trains, on what, and what happens on the way."""

    def __init__(self, config: SupervisedConfig, run_dir: Path):
        self.config, self.run_dir = config, run_dir
        self.world = distributed.join(config.cluster.collective_timeout_s)
        self.barrier = distributed.new_barrier(PATIENCE_S)
        self.say(f"reading {', '.join(config.data.sources.values())}")
        self.tokenizer = prepare_tokenizer(config, run_dir, self.barrier)
        self.split = LOADERS[config.stage, config.objective.reads](
            config.data, self.tokenizer, Path(config.run.dir) / ".cache"
        )
        self.barrier()  # one rank of each host has built what the others now read
        self.order = self.split.order(config.run.seed)
        self.num_steps = config.training.num_steps or math.ceil(
            config.training.num_epochs * len(self.split.train) / config.training.global_batch_size
        )
        self.objective = build(config.objective)
        if config.stage == "reward":
            check_objective(self)
        self.say(f"loading {config.model.path}" if config.model.path else "building a new model")
        model = new_model(config, self.tokenizer)
        if config.stage == "pretrain":
            check_isolation(model)
        check_context(config, context_length(model))
        self.num_parameters = num_parameters(model)
        self.num_trained = num_parameters(model, trained_only=True)
        self.flops_per_token = flops_per_token(model, round(self.split.train.lengths.mean()))
        self.peak, self.peak_source = peak_flops(distributed.device(), config.engine.precision is Precision.bf16)
        self.engine = build(config.engine, model, config.optim, self.num_steps)
        tokens = config.engine.micro_batch_size * config.data.max_seq_len
        self.budget = TokenBudget(tokens, self.engine.packed, self.engine.branching)
        self.prepared = Prefetcher(self.prepare_step, self.num_steps)
        training = config.training
        self.store = CheckpointStore(run_dir / "checkpoints", training.keep_checkpoints, training.keep_best)
        self.saver = AsyncSaver(self.store, rank=self.world.rank, world_size=self.world.size, barrier=self.barrier)
        self.scores: dict[int, float] = {}  # step -> eval/loss
        self.guard = Guard(config.training, lambda kind, **details: self.tracker.event(kind, **details))
        self.validation = Validation(config.training.early_stopping_evals)
        if config.training.early_stopping_evals and not self.split.validation:
            fix = "Give data.validation or data.validation_fraction."
            raise ConfigError("there is no validation data to stop by", where="training.early_stopping_evals", fix=fix)
        self.state = RunState()
        self.state.register("guard", self.guard)
        self.state.register("validation", self.validation)
        if config.model.adapter is not None:
            self.state.register("base", FrozenBase(str(config.model.path)))

    def say(self, what: str) -> None:
        """Progress before there is a tracker."""
        if self.world.is_main:
            print(f"{self.config.stage}: {what}", file=sys.stderr, flush=True)

    def train(self) -> dict[str, Any]:
        """Resume or start, train to the end, export; returns the result (its metrics on rank 0)."""
        started = time.perf_counter()
        _, skipped = self.resume()
        self.tracker = self.open_tracker()
        with finishing(self.tracker), closing(self.prepared):
            for broken in skipped:
                self.tracker.event("checkpoint_skipped", **broken)
            self.tracker.event("data", **{name: count for name, count in self.split.report.items() if count})
            if self.split.mixture is not None:
                num_samples = self.num_steps * self.config.training.global_batch_size
                self.tracker.event("mixture", **self.split.mixture.plan(num_samples))
            self.tracker.event("plan", **self.plan())
            self.tracker.event("resumed" if self.engine.num_steps else "started", step=self.engine.num_steps)
            try:
                self.train_steps()
            except Requeue:
                self.report(self.saver.wait())
                raise
            self.report(self.saver.wait())
            self.export()
        return {
            "stage": self.config.stage,
            "objective": self.config.objective.name,
            "run_dir": str(self.config.run_dir),
            "steps": self.engine.num_steps,
            "seconds": time.perf_counter() - started,
            "ended": self.validation.ended() or "all steps are done",
            "metrics": last_metrics(self.run_dir) if self.world.is_main else {},
        }

    def train_steps(self) -> None:
        training = self.config.training
        hooks = [
            Hook(1, self.note),
            Hook(training.eval_every_steps, self.evaluate),
            Hook(1, self.tracker.log),
            Hook(training.save_every_steps, lambda step, _: self.save(step), before_stop=True),
        ]
        watchdog = Watchdog(
            ROLE,
            self.world,
            self.run_dir,
            self.config.cluster.stall_timeout_s,
            step=lambda: self.engine.num_steps,
            report=lambda text: self.tracker.event("stalled", why=text),
        )
        with signals.deferred(), watchdog:
            train(
                self.engine,
                self.objective,
                self.batches,
                self.num_steps,
                hooks,
                self.guard,
                restore=self.restore,
                ended=self.validation.ended,
                stop_asked=StopRequest(self.run_dir, self.world.is_main),
            )
        if why := self.validation.ended():
            self.tracker.event("stopped_early", step=self.engine.num_steps, why=why)

    def plan(self) -> dict[str, Any]:
        """The batch arithmetic, so that nobody has to guess."""
        examples, first = self.config.training.global_batch_size, self.prepare_step(0)
        held, real = sum(b["input_ids"].numel() for b in first), sum(b.num_tokens for b in first)
        return {
            "examples": len(self.split.train),
            "examples_per_step": examples,
            "ranks": self.world.size,
            "tokens_per_micro_batch": self.budget.tokens,
            "micro_batches_of_first_step": len(first),  # on each rank
            "padding_of_first_step": round(1 - real / held, 3),
            "optimizer_steps": self.num_steps,
            "epochs": round(self.num_steps * examples / len(self.split.train), 2),
            "parameters": self.num_parameters,
            "trained_parameters": self.num_trained,
            "peak_tflops": round(self.peak / 1e12, 3),  # of one device, for perf/mfu
            "peak_from": self.peak_source,
        }

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step: a function of (seed, step, rank), as is the randomness of dropout."""
        shard, _ = self.config.engine.data_shard(self.world.rank, self.world.size)
        torch.manual_seed(hash((self.config.run.seed, step, shard)))
        return self.prepared(step)

    def prepare_step(self, step: int) -> list[Batch]:
        return self.prepare(self.split.train, self.order.batch(step, self.config.training.global_batch_size))

    def prepare(self, examples: Examples[Any], indexes: Sequence[int]) -> list[Batch]:
        """This rank's micro-batches of examples that all ranks share; only its own are read."""
        taken = np.asarray(indexes, dtype=np.int64)
        parts = self.budget.parts(
            examples.lengths[taken], *self.config.engine.data_shard(self.world.rank, self.world.size)
        )
        return [self.objective.prepare([examples[int(i)] for i in taken[part]], self.budget.rows) for part in parts]

    def note(self, step: int, metrics: Metrics) -> None:
        """Adds `perf/mfu`: the share of what the devices of all ranks could do that the model's arithmetic took."""
        if self.guard.refusal is None:
            self.validation.trained(metrics["train/loss"])
        metrics["perf/mfu"] = metrics["perf/tokens_per_s"] * self.flops_per_token / (self.peak * self.world.size)

    def evaluate(self, step: int, metrics: Metrics) -> None:
        """Adds `eval/` metrics on the validation split to the step's own."""
        held_out = self.split.validation
        if held_out:
            with phase("evaluate"):
                means = self.engine.evaluate(self.prepare(held_out, range(len(held_out))), self.objective)
            self.scores = {step: means["loss"]}
            metrics |= {f"eval/{name}": value for name, value in means.items() if name != "num_tokens"}
            metrics |= self.validation.evaluated(means["loss"])

    def save(self, step: int) -> None:
        """Copy the state; a thread writes it while training goes on."""

        def snapshot() -> Callable[[Path], Digests]:
            engine, state = self.engine.snapshot(), self.state.snapshot()

            def write(directory: Path) -> Digests:
                if self.world.is_main:
                    state(directory)
                return engine(directory)

            return write

        with phase("save"):
            self.report(self.saver.save(step, snapshot, score=self.scores.get(step)))

    def report(self, saved: Saved | None) -> None:
        if saved is not None:
            seconds = round(saved.seconds, 3)
            self.tracker.event("checkpoint", step=saved.step, path=str(saved.path), seconds=seconds)

    def resume(self) -> tuple[int | None, list[dict[str, str]]]:
        """Load the newest valid checkpoint, if there is one; returns its step and the broken ones that were passed over."""
        skipped: list[dict[str, str]] = []
        found: list[str] = []
        try:
            if self.world.is_main:
                checkpoint = self.store.newest_valid(lambda path, why: skipped.append({"path": str(path), "why": why}))
                found = [str(checkpoint.path)] if checkpoint else []
        finally:
            self.barrier()  # to read every byte may take longer than a collective may
            paths = distributed.gather(found)  # the others wait for it, whatever happened
        for path in paths:
            self.engine.load(Path(str(path)))
            self.state.load(Path(str(path)))
        return self.engine.num_steps if paths else None, skipped

    def restore(self) -> int | None:
        """The rollback of `Guard`: weights, optimizer and run state of the newest checkpoint; returns its step."""
        self.report(self.saver.wait())
        step, skipped = self.resume()
        for broken in skipped:
            self.tracker.event("checkpoint_skipped", **broken)
        return step

    def export(self) -> None:
        if self.config.stage == "reward":
            with self.engine.averaged():
                appraise(self)
        write_model(self.engine, self.config, self.run_dir, self.tokenizer)

    def open_tracker(self) -> Tracker:
        if not self.world.is_main:
            return NullTracker()
        return open_trackers(
            self.config.tracking,
            run_dir=self.run_dir,
            run_id=run_id(self.run_dir),
            title=self.config.stage,
            total_steps=self.num_steps,
            resume_step=self.engine.num_steps or -1,
            run_config=to_dict(self.config),
        )


def prepare_tokenizer(config: SupervisedConfig, run_dir: Path, barrier: Callable[[], None]) -> Any:
    """The model's tokenizer, or one trained on the data by rank 0 and kept in the run directory."""
    given = config.model.tokenizer or config.model.path
    if given is not None:
        return load_tokenizer(given)
    folder = run_dir / "tokenizer"
    if distributed.rank() == 0 and not folder.exists():
        tokenizer = train_tokenizer(read_texts(config.data), config.model.vocab_size, config.model.max_position)
        commit_directory(folder, tokenizer.save_pretrained)
    barrier()
    return load_tokenizer(str(folder))


def new_model(config: SupervisedConfig, tokenizer: Any) -> Model:
    model, seed = config.model, config.run.seed
    empty = not config.engine.needs_weights(distributed.rank())
    if model.path is None:
        return new_language_model(model, tokenizer, seed, empty=empty)
    if config.stage == "reward":
        return load_scalar_model(model.path, model.dropout, seed, empty=empty)
    return adapted(load_language_model(model.path, model.dropout, empty=empty), model.adapter, seed)
