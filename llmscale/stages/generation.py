"""Samples on their way: dispatch units of draws are sampled and then, each as soon as it is there, scored, while the driver
does something else. A unit's samples go from the rollout worker to the others, and to the driver when a step takes them.

What a unit holds is fixed when it is handed in, and every number of a sample comes from its unit: nothing depends on the
order in which units end, nor on how many workers there are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from llmscale.batch import Prompt, Trajectory
from llmscale.cluster.pool import Units, WorkerPool, newest_of
from llmscale.data.loader import micro_batches
from llmscale.protocols import SamplingRequest, Score, State
from llmscale.rollout.completion import continued, unsampled
from llmscale.rollout.recording import from_record, to_record
from llmscale.rollout.replay import Replay
from llmscale.stages.roles import ReferenceRole, RewardRole, RolloutRole

Rewards = list[tuple[Score, Score | None]]  # of samples: the reward, and the true one
Shown = tuple["Future[Rewards]", "Future[list[np.ndarray]] | None"]  # what reward and reference workers are asked


@dataclass(eq=False)
class Unit:
    """A dispatch unit, and what the others say of it, whom it is shown when it has been sampled."""

    sampled: Future[list[Trajectory]]
    shown: Future[Shown]
    show: Callable[[Future[list[Trajectory]]], Shown]

    def __post_init__(self) -> None:
        self.judged = self.sampled  # what they were shown

    def show_again(self) -> None:
        """Where samples were lost with their node and made again, perhaps by newer weights: what was said of the lost ones does
        not hold of these."""
        if (newest := newest_of(self.sampled)) is not self.judged:
            self.judged, self.shown = newest, done(self.show(newest))


@dataclass(frozen=True)
class Taken:
    """Samples that a step has taken, in the order of draws and samples; where each of them stands in its unit."""

    places: Sequence[tuple[Unit, int]]

    def trajectories(self) -> list[Trajectory]:
        """Waits until all are sampled, as the others wait for what they return."""
        found = self._of_units(lambda unit: unit.sampled)
        for unit in {unit for unit, _ in self.places}:
            unit.show_again()
        return found

    def rewards(self) -> Rewards:
        return self._of_units(lambda unit: unit.shown.result()[0])

    def ref_logprobs(self) -> list[np.ndarray | None]:
        """None where no reference stands apart."""
        if any(unit.shown.result()[1] is None for unit, _ in self.places):
            return [None] * len(self.places)
        return self._of_units(lambda unit: unit.shown.result()[1])

    def _of_units(self, task: Callable[[Unit], Any]) -> list[Any]:
        units = list(dict.fromkeys(unit for unit, _ in self.places))
        results = dict(zip(units, Units([task(unit) for unit in units]).wait(), strict=True))
        return [results[unit][i] for unit, i in self.places]


class Generation:
    """The replay buffer: draws that are begun and that no step has taken yet."""

    def __init__(
        self,
        pools: Mapping[str, WorkerPool],
        unit_size: int,
        replay: Replay | None = None,
        asks_reference: bool = True,
        continues: bool = False,
    ):
        """`continues`: what is interrupted goes on from there."""
        self.pools, self.unit_size, self.replay = pools, unit_size, replay
        self.rest = continued if continues else None
        self.asks_reference = asks_reference and "reference" in pools
        self.draws: dict[int, list[tuple[Unit, int]]] = {}  # where the samples of each are
        self.saved: dict[int, list[str]] = {}  # those of a checkpoint, as JSON, until `resume`

    def begin(self, requests: Sequence[SamplingRequest]) -> None:
        """Begin whole draws. What may take longest is handed in first, so that no worker is left with it at the end."""
        parts = micro_batches(requests, self.unit_size)
        longest = [max(len(r.prompt.token_ids) for r in part) for part in parts]
        first = sorted(range(len(parts)), key=lambda i: longest[i], reverse=True)
        units = {i: self._unit(parts[i]) for i in first}
        for i, part in enumerate(parts):
            self._add(units[i], [request.draw_id for request in part])

    def take(self, num_draws: int) -> Taken:
        """The oldest ones."""
        return Taken([place for draw in sorted(self.draws)[:num_draws] for place in self.draws.pop(draw)])

    @property
    def num_ready(self) -> int:
        """Draws that are wholly sampled."""
        return sum(all(has_ended_well(unit.sampled) for unit, _ in places) for places in self.draws.values())

    def state_dict(self) -> State:
        """The draws that are wholly sampled. The others are under way, and are begun again."""
        ready = {
            draw: Taken(places).trajectories()
            for draw, places in self.draws.items()
            if all(has_ended_well(unit.sampled) for unit, _ in places)
        }
        return {"ready": {draw: [json.dumps(to_record(t)) for t in samples] for draw, samples in ready.items()}}

    def load_state_dict(self, state: State) -> None:
        self.saved = state["ready"]

    def resume(self, prompts_of: Callable[[Sequence[int]], Sequence[Prompt]]) -> list[int]:
        """Take up what a checkpoint held, which still has to be shown to the others; returns which draws these are."""
        draws = list(self.saved)
        pairs = zip(draws, prompts_of(draws), strict=True)
        saved = [from_record(json.loads(line), prompt, d) for d, prompt in pairs for line in self.saved[d]]
        for part in micro_batches(saved, self.unit_size):
            self._add(self._known(part), [trajectory.draw_id for trajectory in part])
        self.saved = {}
        return draws

    def close(self) -> None:
        """Give up what has not begun."""
        for unit, _ in chain.from_iterable(self.draws.values()):
            unit.sampled.cancel()
        self.draws.clear()

    def _add(self, unit: Unit, draws: Sequence[int]) -> None:
        for place, draw in enumerate(draws):
            self.draws.setdefault(draw, []).append((unit, place))

    def _unit(self, requests: Sequence[SamplingRequest]) -> Unit:
        if self.replay is not None:
            return self._known(self.replay.generate(requests))
        sampled = self.pools["rollout"].submit(RolloutRole.generate, requests, instead=unsampled, rest=self.rest)
        shown: Future[Shown] = Future()

        def show(task: Future[list[Trajectory]]) -> None:
            """In the thread in which the sampling ended."""
            try:
                shown.set_result(self._show(task))
            except BaseException as error:  # of the sampling too; whoever waits for the unit has to hear of it
                shown.set_exception(error)

        sampled.add_done_callback(show)
        return Unit(sampled, shown, self._show)

    def _known(self, trajectories: list[Trajectory]) -> Unit:
        return Unit(done(trajectories), done(self._show(trajectories)), self._show)

    def _show(self, sampled: Future[list[Trajectory]] | list[Trajectory]) -> Shown:
        rewards = self.pools["reward"].submit(RewardRole.score, sampled, instead=unjudged)
        if not self.asks_reference:
            return rewards, None
        return rewards, self.pools["reference"].submit(ReferenceRole.logprobs, sampled)


def has_ended_well(task: Future[Any]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


def done(result: Any) -> Future[Any]:
    task: Future[Any] = Future()
    task.set_result(result)
    return task


def unjudged(trajectories: Sequence[Trajectory], why: str) -> list[tuple[Score, Score | None]]:
    """What stands for the scores of samples that no worker could give."""
    return [(Score(None, why=why), None) for _ in trajectories]
