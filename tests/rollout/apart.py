"""vLLM engines in a process of their own, as rollout workers are: vLLM takes over the process that it runs in."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from llmscale.batch import Trajectory
from llmscale.models.adapters import adapted
from llmscale.models.config import LoraConfig
from llmscale.models.loading import LanguageModel, cast_parameters, load_language_model
from llmscale.models.weights import fingerprint
from llmscale.protocols import SamplingRequest, WeightBucket
from llmscale.rollout.config import VLLMRolloutConfig
from tests.tiny import tokenizer

DEADLINE_S = 120.0


@dataclass(frozen=True)
class Wanted:
    """An engine that a test asked for."""

    number: int
    folder: str
    holds: str  # digest of the model that it starts with
    dtype: torch.dtype
    adapter: LoraConfig | None
    config: VLLMRolloutConfig
    seed: int
    stop_ids: Sequence[int]


@dataclass
class ApartEngine:
    """`llmscale.protocols.RolloutEngine`, there."""

    wanted: Wanted
    apart: Apart

    def generate(self, requests: Sequence[SamplingRequest]) -> list[Trajectory]:
        made = self.apart.ask(self.wanted, "generate", requests)
        for trajectory, request in zip(made, requests, strict=True):
            object.__setattr__(trajectory, "prompt", request.prompt)  # it has been there and back
        return made

    def load_weights(self, version: int, buckets: Sequence[WeightBucket]) -> None:
        self.apart.ask(self.wanted, "load_weights", version, buckets)

    def sleep(self) -> None:
        self.apart.ask(self.wanted, "sleep")

    def wake(self) -> None:
        self.apart.ask(self.wanted, "wake")


class Apart:
    """The other process. vLLM has one engine in it at a time, so one is made when it is first used, in place of the one before;
    one that still is what it was at its start serves the next of the same model."""

    def __enter__(self) -> Apart:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        self.folder = Path(tempfile.mkdtemp())
        self.numbers = itertools.count()
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.join()
        shutil.rmtree(self.folder)

    def engine(
        self,
        model: LanguageModel,
        *,
        seed: int = 0,
        stop_ids: Sequence[int] = (),
        adapter: LoraConfig | None = None,
        **settings: Any,
    ) -> ApartEngine:
        number = next(self.numbers)
        folder = str(self.folder / str(number))
        model.hf.save_pretrained(folder)
        (dtype,) = {p.dtype for p in model.parameters()}
        holds = f"{model.hf.config} {fingerprint(dict(model.named_parameters()))} {adapter}"
        config = VLLMRolloutConfig(**settings)
        return ApartEngine(Wanted(number, folder, holds, dtype, adapter, config, seed, stop_ids), self)

    def ask(self, wanted: Wanted, method: str, *args: Any) -> Any:
        self.pipe.send((wanted, method, args))
        assert self.pipe.poll(DEADLINE_S), f"{method} did not end in {DEADLINE_S} s"
        answer = self.pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


@dataclass
class _Engines:
    """The engine there is, and the test's engines that it has been."""

    engine: Any = None
    wanted: Wanted | None = None
    gone: set[int] = field(default_factory=set)
    untouched: bool = True  # no weights were offered to it

    def call(self, wanted: Wanted, method: str, args: Sequence[Any]) -> Any:
        assert wanted.number not in self.gone, "a test may not go back to an engine that has made room"
        if self.wanted is None or wanted.number != self.wanted.number:
            if self.wanted is not None:
                self.gone.add(self.wanted.number)
            if not self._serves(wanted):
                self._build(wanted)
            self.wanted = wanted
        self.engine.config, self.engine.seed = wanted.config, wanted.seed
        self.engine.stop_ids = list(wanted.stop_ids)
        self.untouched &= method != "load_weights"
        return getattr(self.engine, method)(*args)

    def _serves(self, wanted: Wanted) -> bool:
        there = self.engine is not None and self.wanted is not None and self.untouched
        return there and (wanted.holds, wanted.dtype) == (self.wanted.holds, self.wanted.dtype)

    def _build(self, wanted: Wanted) -> None:
        from llmscale.rollout.vllm import VLLMRollout

        self.engine, self.untouched = None, True
        gc.collect()
        model = adapted(load_language_model(wanted.folder, empty=True), wanted.adapter, seed=0)
        cast_parameters(model, wanted.dtype)
        self.engine = VLLMRollout(wanted.config, model, tokenizer(), wanted.seed, wanted.stop_ids)


def _serve(pipe: Connection) -> None:
    engines = _Engines()
    while True:
        wanted, method, args = pipe.recv()
        try:
            answer = engines.call(wanted, method, args)
        except Exception as error:  # the test's to judge
            answer = error
        pipe.send(answer)
        del answer  # an error's traceback would keep the engine alive, whose late end takes away what the next one uses
