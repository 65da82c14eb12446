"""The run around the RLHF loop: opening and resuming it, its pools, checkpoints, records and result."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llmscale.batch import Prompt, Trajectory
from llmscale.checkpoint.commit import Checkpoint, CheckpointStore
from llmscale.checkpoint.durable import atomic_write_text
from llmscale.checkpoint.run_directory import RunDirectory, run_id, run_once
from llmscale.checkpoint.run_state import RunState
from llmscale.cluster.pool import WorkerPool
from llmscale.cluster.publish import Publisher
from llmscale.config import build, to_dict
from llmscale.data.chat import CUT, ChatRenderer, Message
from llmscale.data.splits import load_prompts
from llmscale.disk import patiently
from llmscale.errors import ConfigError, LlmscaleError, Requeue
from llmscale.models.adapters import FrozenBase, adapted
from llmscale.models.loading import load_language_model, load_tokenizer, num_parameters, saved_context_length
from llmscale.protocols import Digests, State, Tracker
from llmscale.rl.experience import Scored
from llmscale.rl.ledger import DRAWS, Ledger
from llmscale.rl.overoptimisation import overoptimisation
from llmscale.rollout.recording import COMPLETIONS, to_record
from llmscale.rollout.replay import Replay
from llmscale.stages.answering_config import RolloutStageConfig, SamplingConfig
from llmscale.stages.config import check_context
from llmscale.stages.progress import ProgressWatch
from llmscale.stages.replayed import open_replay
from llmscale.stages.restarting import restarting
from llmscale.stages.rlhf import Metrics, Rlhf
from llmscale.stages.rlhf_config import RlhfConfig, rewards_of
from llmscale.stages.roles import CriticRole, PolicyRole, observation_renderer, opened_roles
from llmscale.tracking.composite import finishing, open_trackers
from llmscale.tracking.jsonl import EVENTS, METRICS, RecordFile, iter_jsonl, last_metrics, read_jsonl
from llmscale.training.stop import signals

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

T = TypeVar("T")
TRAINED = {"policy": PolicyRole, "critic": CriticRole}


def run(config: RlhfConfig) -> dict[str, Any]:
    """When a rank of policy or critic is lost, all state goes back together to the newest checkpoint, and the run goes on."""

    def train(directory: RunDirectory) -> dict[str, Any]:
        return restarting(config, directory.path, lambda: RlhfRun(config, directory).train())

    return run_once(config.run_dir, config, train)


class RlhfRun:
    """One attempt of a run."""

    def __init__(self, config: RlhfConfig, directory: RunDirectory):
        self.config, self.directory = config, directory
        path = str(config.model.path)
        check_context(config, saved_context_length(path))
        self.plan = plan(config)
        tokenizer = load_tokenizer(path)
        self.prompts = load_prompts(config.data, tokenizer, room_for_completions(config, tokenizer))
        check_columns(config, [*self.prompts.train, *self.prompts.validation])
        self.replay: Replay | None = None
        if config.replays:
            self.replay, self.terms = open_replay(config, self.prompts)
        self.recording: RecordFile | None = None
        self.store = CheckpointStore(directory.checkpoints, config.training.keep_checkpoints)
        self.trained = {name: role for name, role in TRAINED.items() if name in config.roles}
        self.first_eval: Metrics = {}

    def train(self) -> dict[str, Any]:
        """Resume or start, train to the end, export."""
        started = time.perf_counter()
        skipped: list[dict[str, str]] = []
        checkpoint = self.store.newest_valid(lambda path, why: skipped.append({"path": str(path), "why": why}))
        tracker = self.tracker = self.open_tracker(checkpoint)
        with finishing(tracker):
            for broken in skipped:
                tracker.event("checkpoint_skipped", **broken)
            tracker.event("plan", **self.plan)
            if self.replay is not None:
                tracker.event("replay", **self.terms)
            last = checkpoint.step if checkpoint else 0
            is_kept = lambda record: record["step"] <= last  # noqa: E731
            self.draws = RecordFile(self.directory.path / DRAWS, is_kept, tracker.event)
            if self.config.record:
                self.recording = RecordFile(self.directory.path / COMPLETIONS, is_kept, tracker.event)
            with self.pools() as pools:
                self.train_on(pools, checkpoint)
            verdict = self.look_for_overoptimisation()
        return {
            "stage": "rlhf",
            "run_dir": str(self.config.run_dir),
            "steps": self.config.training.num_steps,
            "seconds": time.perf_counter() - started,
            "example": (self.prompts.validation or self.prompts.train)[0].text,
            "before": self.first_eval,
            "metrics": last_metrics(self.directory.path),
            "overoptimisation": verdict,
        }

    def train_on(self, pools: Mapping[str, WorkerPool], checkpoint: Checkpoint | None) -> None:
        training = self.config.training
        publisher = Publisher(self.config.cluster, self.directory.path, self.tracker.event)
        ledger = Ledger(self.draws.append)
        rlhf = Rlhf(self.config, self.prompts, pools, publisher, self.tracker.event, self.record, ledger, self.replay)
        state = RunState()
        state.register("loop", Progress(rlhf, self))
        state.register("ledger", ledger)
        state.register("generation", rlhf.generation)
        state.register("kl_coef", rlhf.kl_coef)
        if self.config.model.adapter is not None:
            state.register("base", FrozenBase(str(self.config.model.path)))
        if checkpoint is not None:
            self.restore(rlhf, state, checkpoint)
        else:
            self.first_eval = rlhf.evaluate()
            if self.first_eval:
                self.tracker.log(0, self.first_eval)
        with signals.deferred():
            while rlhf.step < training.num_steps:
                metrics, samples = rlhf.iterate()
                if self.due(rlhf.step, training.eval_every_steps):
                    metrics |= rlhf.evaluate()
                self.tracker.samples(rlhf.step, [record_of(s) for s in samples])
                self.tracker.log(rlhf.step, metrics)
                stop = signals.received
                if stop or self.due(rlhf.step, training.save_every_steps):
                    self.save(rlhf, state)
                if stop:
                    raise Requeue(f"stopped and saved at step {rlhf.step}; the same command resumes")
        rlhf.close()
        for file in (self.draws, self.recording):
            if file is not None:
                file.close()
        rlhf.shifts.of_training()
        run_dir = str(self.directory.path.resolve())
        self.patiently("export", lambda: pools["policy"].call(PolicyRole.export, run_dir).wait())

    def look_for_overoptimisation(self) -> str | None:
        """One line, where there is a true score; the numbers are in an event and in overoptimisation.md."""
        found = overoptimisation(read_jsonl(self.directory.path / METRICS))
        if found is None:
            return None
        self.tracker.event("overoptimisation", **asdict(found), verdict=found.verdict)
        atomic_write_text(self.directory.path / "overoptimisation.md", found.table())
        return found.verdict

    def record(self, step: int, trajectories: Sequence[Trajectory]) -> None:
        if self.recording is not None:
            self.recording.append(to_record(t, step=step) for t in trajectories)

    def save(self, rlhf: Rlhf, state: RunState) -> None:
        def write(directory: Path) -> Digests:
            digests: dict[str, str] = {}
            for name, role in self.trained.items():
                (directory / name).mkdir()
                for own in rlhf.pools[name].call(role.save, str((directory / name).resolve())).wait():
                    digests |= {f"{name}/{file}": digest for file, digest in own.items()}
            state.save(directory)
            return digests

        started = time.perf_counter()
        rlhf.shifts.of_training()
        for file in (self.draws, self.recording):
            if file is not None:
                file.sync()  # who resumes from this checkpoint counts on every step before it
        path = self.patiently("checkpoint", lambda: self.store.save(rlhf.step, write))
        seconds = round(time.perf_counter() - started, 3)
        self.tracker.event("checkpoint", step=rlhf.step, path=str(path), seconds=seconds)

    def patiently(self, what: str, write: Callable[[], T]) -> T:
        told = lambda seconds: self.tracker.event("disk_full", at=what, seconds=seconds)  # noqa: E731
        return patiently(write, self.directory.path, told)

    def restore(self, rlhf: Rlhf, state: RunState, checkpoint: Checkpoint) -> None:
        state.load(checkpoint.path)
        rlhf.shifts.of_training()
        for name, role in self.trained.items():
            rlhf.pools[name].call(role.load, str((checkpoint.path / name).resolve())).wait()
        rlhf.publish()
        rlhf.resume()
        self.tracker.event("resumed", step=rlhf.step, checkpoint=str(checkpoint.path))

    @contextmanager
    def pools(self) -> Iterator[Mapping[str, WorkerPool]]:
        started = time.perf_counter()
        with opened_roles(self.config, self.directory, self.config.roles, self.tracker) as pools:
            workers = {name: len(pool.members) for name, pool in pools.items()}
            self.tracker.event("pools_up", workers=workers, seconds=round(time.perf_counter() - started, 2))
            timeout_s = self.config.cluster.progress_timeout_s
            watch = ProgressWatch(pools, timeout_s, lambda text: self.tracker.event("stalled", why=text))
            with watch, self.chaos(pools):
                yield pools

    def chaos(self, pools: Mapping[str, WorkerPool]) -> AbstractContextManager[None]:
        """It goes on where an earlier attempt was, whose faults are among the events."""
        if self.config.chaos is None:
            return nullcontext()
        past = sum(event["kind"] == "chaos" for event in iter_jsonl(self.directory.path / EVENTS))
        arguments = (pools, past, self.tracker.event, self.directory.path)
        context: AbstractContextManager[None] = build(self.config.chaos, *arguments)
        return context

    def open_tracker(self, checkpoint: Checkpoint | None) -> Tracker:
        return open_trackers(
            self.config.tracking,
            run_dir=self.directory.path,
            run_id=run_id(self.directory.path),
            title="rlhf",
            total_steps=self.config.training.num_steps,
            resume_step=checkpoint.step if checkpoint else -1,
            run_config=to_dict(self.config),
        )

    def due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.config.training.num_steps


class Progress:
    """What the driver itself must remember over a restart."""

    def __init__(self, rlhf: Rlhf, run: RlhfRun):
        self.rlhf, self.run = rlhf, run

    def state_dict(self) -> State:
        return {"step": self.rlhf.step, "updates": self.rlhf.updates, "first_eval": self.run.first_eval}

    def load_state_dict(self, state: State) -> None:
        self.rlhf.step, self.rlhf.updates = state["step"], state["updates"]
        self.run.first_eval = state["first_eval"]


def room_for_completions(config: RlhfConfig | RolloutStageConfig, tokenizer: PreTrainedTokenizerFast) -> int:
    """Tokens of the longest completion: every turn at its limit, and the longest observation between each two.

    Raises: ModelError or DataError for a chat template that cannot put an observation between two turns.
    """
    environment = config.environment
    if environment is None:
        return config.max_completion_tokens
    turns = [Message(role="user", content="a"), Message(role="assistant", content="b")]
    try:
        _, around = observation_renderer(ChatRenderer(tokenizer), environment)(turns, CUT)
    except LlmscaleError as error:
        error.where, error.fix = "environment.role", "Choose the other of user and tool, or another chat template."
        raise
    between = len(around) + environment.max_observation_tokens
    return config.max_completion_tokens + (environment.max_turns - 1) * between


def check_columns(config: SamplingConfig, prompts: Sequence[Prompt]) -> None:
    """Raises: ConfigError when a reward needs a column that a prompt lacks, before anything is sampled."""
    for where, reward in rewards_of(config):
        for column in reward.needs_columns():
            lacking = next((p for p in prompts if column not in p.fields), None)
            if lacking is not None:
                what = f"{where}={reward.name} needs the column {column!r}, which the prompt {lacking.text!r} lacks"
                raise ConfigError(what, where=f"{where}.column", fix=f"It has: {', '.join(lacking.fields) or 'none'}.")


def plan(config: RlhfConfig) -> dict[str, Any]:
    """The batch arithmetic and what is trained, so that nobody has to guess.

    Raises: ModelError when the model cannot have the adapter that is configured.
    """
    policy = adapted(load_language_model(str(config.model.path), empty=True), config.model.adapter, config.run.seed)
    prompts, group = config.training.prompts_per_step, config.group_size
    minibatches_per_epoch = -(-prompts * group // config.algorithm.global_batch_size)
    return {
        "prompts": prompts,
        "group_size": group,
        **({"max_turns": config.environment.max_turns} if config.environment is not None else {}),
        "sequences": prompts * group,
        "minibatches": minibatches_per_epoch,
        "epochs": config.algorithm.num_epochs,
        "optimizer_steps": config.training.num_steps * config.algorithm.num_epochs * minibatches_per_epoch,
        "micro_batch_size": config.engine.micro_batch_size,
        "workers": {name: getattr(config.cluster, name).fewest for name in config.roles},
        "parameters": num_parameters(policy),
        "trained_parameters": num_parameters(policy, trained_only=True),
        **staleness_plan(config),
    } | ({"reference": "the policy without its adapter"} if config.reference_is_base else {})


def staleness_plan(config: RlhfConfig) -> dict[str, Any]:
    """How far sampling may be ahead, and what makes up for it."""
    algorithm, bound = config.settled_algorithm, config.training.max_staleness
    correction = getattr(algorithm, "correction", None)  # an algorithm of the user's own may know of none
    named = {"correction": correction.value} if correction is not None else {}
    return {"max_staleness": bound, **named} if bound else {}


def record_of(sample: Scored) -> dict[str, Any]:
    return sample_record(sample.trajectory, sample.reward, sample.true_reward, sample.parts, sample.why)


def sample_record(
    trajectory: Trajectory, reward: float, true_reward: float | None, parts: Mapping[str, float], why: str
) -> dict[str, Any]:
    """A line of samples.jsonl, complete enough to train from."""
    return to_record(trajectory, reward=reward, reward_parts=dict(parts), reward_why=why, true_reward=true_reward)
