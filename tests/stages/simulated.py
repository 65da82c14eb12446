"""The driver of RLHF as it is, over pools whose workers are threads that take random times and die at random: many schedules in
a second. The driver itself is killed at random points and goes on from its last checkpoint."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from llmscale.batch import Prompt, Trajectory
from llmscale.checkpoint.durable import commit_directory
from llmscale.checkpoint.run_state import RunState
from llmscale.cluster.local import Done
from llmscale.cluster.pool import WorkerPool
from llmscale.cluster.publish import Publisher
from llmscale.compose import compose
from llmscale.data.splits import Split
from llmscale.protocols import SamplingRequest, Score
from llmscale.randomness import random_words
from llmscale.rl.ledger import DRAWS, Ledger
from llmscale.rollout.completion import Completion, check_newer, check_weights
from llmscale.rollout.config import OnUpdate
from llmscale.stages.rlhf import Rlhf
from llmscale.stages.rlhf_config import RlhfConfig
from llmscale.stages.rlhf_run import Progress
from llmscale.tracking.jsonl import RecordFile
from tests.tiny import tokenizer

PROMPTS = Split([Prompt(np.array([3, 4]), f"prompt {i}") for i in range(7)], [], {})
PATIENCE_S = 30.0
LINGERS_S = 0.05


class Killed(Exception):
    """Of the driver."""


class Sampler:
    """Writes two tokens, the second by newer weights where these come in between and it is told of them."""

    version = announced = 0

    def load_weights(self, version: int, handles: Any) -> None:
        check_newer(version, self.version)
        self.version = version

    def generate(self, requests: Sequence[SamplingRequest]) -> list[Trajectory]:
        check_weights(requests, self.version)
        return [self.write(Completion.begun(request)) for request in requests]

    def write(self, completion: Completion) -> Trajectory:
        is_stopped = self.announced > self.version
        for _ in range(1 if is_stopped else 2 - len(completion.token_ids)):
            completion.add(5, -1.0, self.version)
        return completion.trajectory([5], tokenizer(), interrupted=is_stopped and len(completion.token_ids) < 2)

    def interrupt(self, version: int) -> None:
        self.announced = version


class Judge:
    """Says nothing of some samples, and the same of all samples of other draws."""

    def score(self, trajectories: Sequence[Trajectory]) -> list[tuple[Score, None]]:
        return [(Score(reward(t.draw_id, t.sample_index), why="it is silent"), None) for t in trajectories]


def reward(draw: int, sample: int) -> float | None:
    kind = int(random_words(0, "reward", draw, size=1)[0] % 9)
    if kind == 0 and sample == 1:
        return None
    return 1.0 if kind < 4 else float(sample)


class Threads(WorkerPool):
    """One queue of units for all workers. New weights wait until a worker has ended its unit. `pause` before each unit; `dies`
    says whether it kills its worker: then a new one does it again later, which has the newest weights; `lingers`, whether it
    takes until its worker is told of newer weights, or for a while."""

    ahead = 1
    members = ("somebody",)

    def __init__(
        self,
        role: type,
        num_workers: int,
        pause: Callable[[], None],
        dies: Callable[[], bool],
        lingers: Callable[[], bool] = lambda: False,
    ):
        self.role, self.num_workers, self.pause, self.dies, self.lingers = role, num_workers, pause, dies, lingers
        self.units: deque[tuple[Future[Any], str, Any, Any] | None] = deque()
        self.workers = [role() for _ in range(num_workers)]
        self.busy = [False] * num_workers
        self.newest: tuple[Any, ...] = (0, None)
        self.changed = threading.Condition()
        for i in range(num_workers):
            threading.Thread(target=self._serve, args=(i,), daemon=True).start()

    def call(self, method: Callable[..., Any], *args: Any) -> Any:
        raise NotImplementedError

    def install(self, method: Callable[..., Any], *args: Any) -> Any:
        with self.changed:
            self.newest = args
            for i, busy in enumerate(self.busy):
                if not busy:
                    self._catch_up(i)

        def wait() -> list[int]:
            with self.changed:
                assert self.changed.wait_for(lambda: all(w.version >= args[0] for w in self.workers), PATIENCE_S)
            return [0] * self.num_workers

        return SimpleNamespace(wait=wait)

    def map(self, method: Callable[..., Any], items: Sequence[Any]) -> Any:
        raise NotImplementedError

    def submit(self, method: Callable[..., Any], *args: Any, instead: Any = None, rest: Any = None) -> Future[Any]:
        task: Future[Any] = Future()
        (items,) = (a.result() if isinstance(a, Future) else a for a in args)
        self._hand_in(self.units.append, (task, method.__name__, rest, items))
        return task

    def aside(self, method: Callable[..., Any], *args: Any) -> None:
        with self.changed:
            for worker in self.workers:
                getattr(worker, method.__name__)(*args)
            self.changed.notify_all()

    def close(self) -> None:
        for _ in self.workers:
            self._hand_in(self.units.append, None)

    def _hand_in(self, add: Callable[[Any], None], unit: Any) -> None:
        with self.changed:
            add(unit)
            self.changed.notify_all()

    def _next(self) -> Any:
        with self.changed:
            self.changed.wait_for(lambda: self.units)
            return self.units.popleft()

    def _catch_up(self, i: int) -> None:
        if self.role is Sampler and self.workers[i].version < self.newest[0]:
            self.workers[i].load_weights(*self.newest)
            self.changed.notify_all()

    def _serve(self, i: int) -> None:
        while (unit := self._next()) is not None:
            task, method, rest, items = unit
            if not task.running() and not task.set_running_or_notify_cancel():
                continue
            with self.changed:
                self._catch_up(i)
                self.busy[i] = True
            self.pause()
            if self.lingers():
                with self.changed:
                    worker = self.workers[i]
                    self.changed.wait_for(lambda worker=worker: worker.announced > worker.version, LINGERS_S)
            if self.dies():
                self.workers[i] = self.role()
                self._hand_in(self.units.append, unit)
            else:
                try:
                    result = getattr(self.workers[i], method)(items)
                except Exception as error:
                    task.set_exception(error)
                else:
                    more = rest and rest(items, result)
                    if more is None:
                        task.set_result(result)
                    else:
                        self._hand_in(self.units.appendleft, (task, method, rest, more))
            with self.changed:
                self.busy[i] = False
                self._catch_up(i)


class Policy:
    """Its pool: updates that take a while, in which the driver may be killed."""

    num_workers = 1
    members = ("policy",)

    def __init__(self, pause: Callable[[], None], moment: Callable[[], None]):
        self.pause, self.moment = pause, moment

    def call(self, method: Callable[..., Any], *args: Any) -> Done:
        self.moment()
        if method.__name__ == "publish":
            return Done([[]])
        self.pause()
        return Done([[{"approx_kl": 0.0, "logprob_diff": 0.0, "num_tokens": 1.0} for _ in args[0]]])

    def map(self, method: Callable[..., Any], items: Sequence[Trajectory]) -> Done:
        return Done([t.rollout_logprobs for t in items])


@cache
def configured(*overrides: str) -> RlhfConfig:
    needed = ["data.train=x", "model.path=x", "reward=answer", "algorithm=grpo", "algorithm.kl_coef=0"]
    sizes = ["training.prompts_per_step=3", "rollout.group_size=2", "algorithm.global_batch_size=6"]
    config: RlhfConfig = compose("rlhf", [*needed, *sizes, "training.num_steps=9", "rollout.unit_size=4", *overrides])
    return config


class Simulation:
    """A run of a random schedule in `folder`: `attempt` until one comes to the end. `trained` has (step, draw, weight versions)
    of every sample that steps before the last checkpoint, and those since, have learned from.

    `kills`: at which moment the driver is killed, of one attempt after another; the last one comes to the end. Moments are
    before each call of the policy, before a record of draws, in the middle of it and after it, before a checkpoint, in the
    middle of it and after it."""

    def __init__(self, folder: Path, seed: int, bound: int, *overrides: str, kills: Sequence[int] | None = None):
        self.folder, self.random, self.bound = folder, random.Random(seed), bound
        self.config = configured(f"training.max_staleness={bound}", *overrides)
        self.made_at = {0: 0}  # version -> updates, as the policy knows it
        self.trained: list[tuple[int, int, set[int]]] = []
        self.saved: int | None = None  # the step of the last checkpoint
        self.longest_s = {who: self.random.choice([0.0, 0.0005, 0.002]) for who in ("rollout", "reward", "policy")}
        self.death_rate = self.random.choice([0.0, 0.1, 0.3])
        some = [self.random.randint(1, 60) for _ in range(self.random.randint(0, 3))]
        self.kills = list(some if kills is None else kills)
        self.left = 0  # moments until the driver is killed; 0: never

    def run(self) -> None:
        while not self.attempt():
            pass

    def attempt(self) -> bool:
        """Whether it came to the end."""
        self.left = self.kills.pop(0) if self.kills else 0
        dies = lambda: self.random.random() < self.death_rate  # noqa: E731
        lingers = lambda: self.config.rollout.on_update is OnUpdate.abort and self.random.random() < 0.2  # noqa: E731
        pools: dict[str, Any] = {"policy": Policy(self.pause("policy"), self.moment)}
        pools["rollout"] = Threads(Sampler, self.random.randint(1, 4), self.pause("rollout"), dies, lingers)
        pools["reward"] = Threads(Judge, self.random.randint(1, 2), self.pause("reward"), dies)
        last = self.saved or 0
        draws = RecordFile(self.folder / DRAWS, lambda record: record["step"] <= last)
        self.trained = [t for t in self.trained if t[0] <= last]
        try:
            self.train(pools, draws)
        except Killed:
            return False
        finally:
            draws.close()
            pools["rollout"].close()
            pools["reward"].close()
        return True

    def train(self, pools: dict[str, Any], draws: RecordFile) -> None:
        ledger = Ledger(lambda records: self.append(draws, records))
        publisher = Publisher(self.config.cluster, self.folder)
        rlhf = Rlhf(self.config, PROMPTS, pools, publisher, lambda *a, **k: None, lambda *a: None, ledger)
        state = RunState()
        state.register("loop", Progress(rlhf, SimpleNamespace(first_eval={})))  # type: ignore[arg-type]
        state.register("ledger", ledger)
        state.register("generation", rlhf.generation)
        if self.saved is not None:
            state.load(self.checkpoint)
            rlhf.publish()
            self.made_at[rlhf.weights] = rlhf.step
            rlhf.resume()
        while rlhf.step < self.config.training.num_steps:
            at = rlhf.step
            _, scored = rlhf.iterate()
            self.made_at[rlhf.weights] = rlhf.step
            own = [(s.trajectory, s.trajectory.weight_versions[s.trajectory.loss_mask]) for s in scored]
            self.trained += [(at + 1, t.draw_id, set(versions.tolist())) for t, versions in own]
            if self.random.random() < 0.4:
                self.moment()
                commit_directory(self.checkpoint, lambda directory: self.write(state, directory))
                self.saved = rlhf.step
                self.moment()
        rlhf.close()

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    def write(self, state: RunState, directory: Path) -> None:
        state.save(directory)
        self.moment()

    def append(self, draws: RecordFile, records: Sequence[Any]) -> None:
        self.moment()
        if self.left == 1:  # half a line has reached the file
            with draws.path.open("a") as file:
                file.write('{"step": 1, "draw_')
        self.moment()
        draws.append(records)
        self.moment()

    def moment(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed

    def pause(self, who: str) -> Callable[[], None]:
        return lambda: time.sleep(self.random.random() * self.longest_s[who])
