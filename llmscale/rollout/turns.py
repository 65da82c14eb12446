"""Completions of several turns: the policy writes, its environment answers, the policy writes on.

What was sampled stays as it was sampled. The prompt of the next turn is all token ids so far and those of the observation;
nothing is decoded and encoded again, so the trainer sees the very tokens whose log-probabilities were recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Thread
from time import monotonic
from typing import Any, TypeVar

import numpy as np

from llmscale.batch import Trajectory, as_text
from llmscale.config import build
from llmscale.protocols import RolloutEngine, SamplingRequest, WeightBucket
from llmscale.rollout.config import EnvironmentConfig
from llmscale.rollout.environment import Environment, Observation

Message = Mapping[str, str]
# (the conversation so far, what the environment says) -> (its message as the policy sees it, the token ids to append)
Render = Callable[[Sequence[Message], str], tuple[Message, np.ndarray]]
T = TypeVar("T")

SIDE_BY_SIDE = 16  # answers that are waited for at the same time


class Turns:
    """`llmscale.protocols.RolloutEngine` on top of another. `generate` is bit-equal for equal requests if that one is and the
    environment is a function of what it hears. Every turn is a `generate` of the samples that are not done."""

    def __init__(self, config: EnvironmentConfig, engine: RolloutEngine, render: Render):
        self.config, self.engine, self.render = config, engine, render
        build(config)  # what is wrong with it shows now

    def generate(self, requests: Sequence[SamplingRequest]) -> list[Trajectory]:
        samples = [_Sample(request) for request in requests]
        self._ask(samples, self._began, lambda sample, environment: sample.meets(environment))
        for turn in range(self.config.max_turns):
            speaking = [s for s in samples if not s.over]
            if not speaking:
                break
            written = self.engine.generate([s.request(turn) for s in speaking])
            for sample, trajectory in zip(speaking, written, strict=True):
                sample.says(trajectory)
            listening = [s for s in speaking if not s.over]
            self._ask(listening, self._answered, partial(self._hears, is_last=turn + 1 == self.config.max_turns))
        return [s.trajectory() for s in samples]

    def load_weights(self, version: int, buckets: Sequence[WeightBucket]) -> None:
        self.engine.load_weights(version, buckets)

    def interrupt(self, version: int) -> None:
        """Conversations go on: what an environment has heard it could not hear again."""

    def sleep(self) -> None:
        self.engine.sleep()

    def wake(self) -> None:
        self.engine.wake()

    def _began(self, sample: _Sample) -> Environment:
        environment: Environment = build(self.config)
        environment.reset(sample.origin.prompt.text, dict(sample.origin.prompt.fields))
        return environment

    def _answered(self, sample: _Sample) -> Observation:
        assert sample.environment is not None, "it has begun"
        text, done, reward = Observation(*sample.environment.step(sample.messages[-1]["content"]))
        if not isinstance(text, str):
            raise TypeError(f"step must return an Observation, its text is {text!r}")
        text.encode()  # half a surrogate pair has no tokens: the sample's failure, not the run's
        return Observation(text, bool(done), float(reward))

    def _hears(self, sample: _Sample, observation: Observation, is_last: bool) -> None:
        sample.turn_rewards[-1] = observation.reward
        if observation.done or is_last:
            sample.ends(finished=observation.done)
        else:
            message, token_ids = self.render([*sample.origin.prompt.messages, *sample.messages], observation.text)
            sample.hears(message, token_ids)

    def _ask(
        self, samples: Sequence[_Sample], what: Callable[[_Sample], T], then: Callable[[_Sample, T], None]
    ) -> None:
        """`what` of each sample's environment; `then` what follows from it, in the order of the samples."""
        for start in range(0, len(samples), SIDE_BY_SIDE):
            asked = samples[start : start + SIDE_BY_SIDE]
            answers = _in_time([partial(what, sample) for sample in asked], self.config.timeout_s)
            for sample, (answer, failure) in zip(asked, answers, strict=True):
                if failure:
                    sample.fails(f"environment {self.config.name}: {failure}")
                else:
                    then(sample, answer)


@dataclass
class _Sample:
    """One completion as it grows."""

    origin: SamplingRequest
    environment: Environment | None = None
    messages: list[Message] = field(default_factory=list)
    over: bool = False
    finished: bool = False
    failure: str = ""

    def __post_init__(self) -> None:
        self.token_ids = self.origin.prompt.token_ids
        silent = len(self.token_ids)
        self.loss_mask = np.zeros(silent, dtype=bool)
        self.rollout_logprobs = np.zeros(silent, dtype=np.float32)
        self.weight_versions = np.full(silent, -1, dtype=np.int32)
        self.turn_rewards = np.zeros(silent, dtype=np.float32)

    def meets(self, environment: Environment) -> None:
        self.environment = environment

    def request(self, turn: int) -> SamplingRequest:
        return replace(self.origin, prompt=replace(self.origin.prompt, token_ids=self.token_ids), turn=turn)

    def says(self, trajectory: Trajectory) -> None:
        """The policy's turn; one that it did not end is cut off, and nobody answers it."""
        new = slice(len(self.token_ids), None)
        parts = (trajectory.token_ids, trajectory.loss_mask, trajectory.rollout_logprobs, trajectory.weight_versions)
        self._append(*(part[new] for part in parts))
        self.messages.append({"role": "assistant", "content": trajectory.completion})
        self.over = not trajectory.finished

    def hears(self, message: Message, token_ids: np.ndarray) -> None:
        num = len(token_ids)
        self._append(token_ids, np.zeros(num, bool), np.zeros(num, np.float32), np.full(num, -1, np.int32))
        self.messages.append(message)

    def ends(self, finished: bool) -> None:
        self.over, self.finished = True, finished

    def fails(self, why: str) -> None:
        self.over, self.failure = True, why

    def trajectory(self) -> Trajectory:
        return Trajectory(
            draw_id=self.origin.draw_id,
            sample_index=self.origin.sample_index,
            token_ids=self.token_ids,
            loss_mask=self.loss_mask,
            rollout_logprobs=self.rollout_logprobs,
            weight_versions=self.weight_versions,
            finished=self.finished,
            prompt=self.origin.prompt,
            completion=as_text(self.messages) if self.messages else "",
            messages=tuple(self.messages),
            turn_rewards=self.turn_rewards,
            failure=self.failure,
        )

    def _append(self, token_ids: Any, loss_mask: Any, rollout_logprobs: Any, weight_versions: Any) -> None:
        self.token_ids = np.concatenate([self.token_ids, token_ids])
        self.loss_mask = np.concatenate([self.loss_mask, loss_mask])
        self.rollout_logprobs = np.concatenate([self.rollout_logprobs, rollout_logprobs])
        self.weight_versions = np.concatenate([self.weight_versions, weight_versions])
        self.turn_rewards = np.append(self.turn_rewards, np.zeros(len(token_ids), dtype=np.float32))


def _in_time(calls: Sequence[Callable[[], T]], timeout_s: float) -> list[tuple[Any, str]]:
    """(result, "") of each call, or (None, why there is none). The calls run side by side. One that hangs is left behind in a
    daemon thread, which does not keep the process from ending."""
    found: list[tuple[Any, str]] = [(None, f"no answer within {timeout_s:g} s")] * len(calls)

    def run(i: int) -> None:
        try:
            result: tuple[Any, str] = (calls[i](), "")
        except BaseException as error:  # the user's code may raise anything; it is named, never a silent zero
            result = (None, f"{type(error).__name__}: {error}")
        found[i] = result

    threads = [Thread(target=run, args=(i,), daemon=True) for i in range(len(calls))]
    deadline = monotonic() + timeout_s
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - monotonic()))
    return list(found)  # a copy: what comes later is too late


def turn_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """The policy's turns in a sample, on average."""
    return {"rollout/turns": float(np.mean([len(t.said) for t in trajectories]))}
