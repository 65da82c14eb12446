"""The interfaces that rooms share. A protocol that only one room uses stays in that room."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from llmscale.batch import APART, Batch, Prompt, Rows, Trajectory

Accept = Callable[[Mapping[str, float]], bool]  # a step's metrics -> whether its update may be applied
Digests = Mapping[str, str]  # of files that were digested as they were written, by name
State = dict[str, Any]  # what a component writes into a checkpoint: JSON values and tensors


class Forward(Protocol):
    """A model applied to a batch."""

    def __call__(self, batch: Batch) -> Tensor:
        """Logits [B, T, V] of a language model, one scalar per token [B, T] of a reward model or critic; fp32."""
        ...

    def logprobs(
        self, batch: Batch, mask: Tensor, temperature: float = 1.0, entropy: str = "none"
    ) -> tuple[Tensor, Tensor]:
        """log p(x_t | x_<t) of the tokens that `mask` [B, T] selects, and the entropy in nats of the distribution that
        predicts each, fp32 [B, T]; 0 elsewhere, and at t = 0, which nothing predicts. `temperature` divides the logits, as
        it did where the token was sampled. `entropy`: none (zeros), value (without gradient) or grad. The logits of all
        tokens are never held at once."""
        ...


@dataclass
class LossSums:
    """What an objective returns for one micro-batch: sums, never means; the engine divides by global counts."""

    terms: dict[str, Tensor]  # loss term -> sum over its elements, weights applied; scalars with gradient
    metrics: dict[str, tuple[Tensor, str]] = field(default_factory=dict)  # name -> (sum, the term that counts it)
    maxima: dict[str, Tensor] = field(default_factory=dict)  # name -> the largest of something, 0 or more


class Objective(Protocol):
    """How examples become a batch and a batch becomes a loss. It knows nothing of engines or ranks."""

    def prepare(self, examples: Sequence[Any], rows: Rows = APART) -> Batch:
        """Build one micro-batch and count each loss term in it. No examples give a valid batch of zero counts.
        `rows`: whether and how sequences share rows, which changes no number."""
        ...

    def loss(self, forward: Forward, batch: Batch) -> LossSums: ...


class RewardObjective(Objective, Protocol):
    """What the reward stage learns by: it can also say what the model's output means."""

    def scores(self, output: Tensor, batch: Batch) -> Tensor:
        """[B, T] -> [N]: the score of each thing that is judged, a completion or a step."""
        ...

    def evidence(self, output: Tensor, batch: Batch) -> Tensor:
        """[B, T] -> [M]: the log-odds that the model gives to each thing that people said, of a pair or of a step."""
        ...


@dataclass(frozen=True)
class WeightBucket:
    """Some named weights as raw arrays (bf16 as its uint16 bits), and the digest of their bytes."""

    arrays: dict[str, np.ndarray]
    dtypes: dict[str, str]  # torch dtype name of each weight
    digest: str


class TrainEngine(Protocol):
    """Holds a model and its optimizer on one or several ranks; every method is called on every rank."""

    num_steps: int
    packed: bool  # whether sequences share rows
    branching: bool  # whether those that begin alike share that too

    def step(self, micro_batches: Sequence[Batch], objective: Objective, accept: Accept = ...) -> dict[str, float]:
        """One optimizer step over this rank's micro-batches. Each loss term is divided once by its count over the
        whole global step, so any split gives the same gradient. Metrics are the same on every rank.

        `accept` is asked once, before anything has changed; refused, weights and optimizer state stay as they are and
        only `num_steps` goes on. It has to answer the same on every rank. By default what is not finite raises
        NumericsError."""
        ...

    def evaluate(self, micro_batches: Sequence[Batch], objective: Objective) -> dict[str, float]:
        """The same numbers without gradient or update."""
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """Collective: inside, the weights are their moving average, where one is kept (`optim.ema_decay`). `evaluate` and
        `export` see to it themselves."""
        ...

    def forward(
        self, micro_batches: Sequence[Batch], compute: Callable[[Forward, Batch], dict[str, Tensor]]
    ) -> list[dict[str, Tensor]]:
        """Run `compute` without gradient on each micro-batch; results on the CPU."""
        ...

    def full_parameters(self, bucket_bytes: int, trained_only: bool = False) -> Iterator[dict[str, Tensor]]:
        """Collective: every rank exhausts it, rank 0 receives the weights, one bucket at a time; a tied weight once. Of an
        adapted model these are base and adapter as they are, side by side; `llmscale.models.adapters.merged` joins them."""
        ...

    def snapshot(self) -> Callable[[Path], Digests]:
        """Collective: a copy of this rank's part of model and optimizer state, on the CPU. What it returns writes that
        copy into a directory; it takes part in no collective, so another thread may call it while training goes on."""
        ...

    def load(self, directory: Path) -> None:
        """Take up what `snapshot` wrote; the caller has verified the files."""
        ...

    def export(self, directory: Path, tokenizer: Any) -> None:
        """Collective: write the model as Hugging Face safetensors (rank 0 writes); an adapter is merged into its base."""
        ...

    def export_adapter(self, directory: Path) -> None:
        """Collective: write the adapter of an adapted model alone, in PEFT's format."""
        ...

    def sleep(self) -> None:
        """Leave the memory of the device to others: weights, gradients and optimizer state wait in host memory. Nothing else is
        asked until `wake`, after which all is as it was, bit for bit. On a CPU there is nothing to move."""
        ...

    def wake(self) -> None: ...


@dataclass(frozen=True)
class SamplingRequest:
    """Sample one completion of a prompt. (draw_id, sample_index, turn) keys its randomness."""

    prompt: Prompt
    draw_id: int
    sample_index: int
    turn: int = 0  # of the policy's in this sample; the prompt then ends with the observation that it answers
    weights: int | None = None  # the oldest version to sample with; None: whichever the engine holds
    begun: Trajectory | None = None  # what was sampled of it before it was interrupted; it goes on from there


class RolloutEngine(Protocol):
    """Token ids in; token ids and the sampled tokens' log-probabilities out."""

    def generate(self, requests: Sequence[SamplingRequest]) -> list[Trajectory]:
        """All with the weights that it holds, whose version is on every token.

        Raises: WeightMismatchError when these are older than a request allows."""
        ...

    def interrupt(self, version: int) -> None:
        """Weights of this version are coming; called by another thread while `generate` runs, or later, when it changes
        nothing. What `generate` is about may come back `interrupted`, to be continued by a request that has it as `begun`."""
        ...

    def load_weights(self, version: int, buckets: Sequence[WeightBucket]) -> None:
        """Take new weights, all of them or, where any is damaged, none.

        Raises: WeightMismatchError when what arrived, or what is held afterwards, is not what was published.
        """
        ...

    def sleep(self) -> None:
        """Leave the memory of the device to others, until `wake`. It then holds the weights that it held, and samples what it
        would have sampled. On a CPU there is nothing to move."""
        ...

    def wake(self) -> None: ...


@dataclass(frozen=True)
class Score:
    """What a reward function says of one sample."""

    value: float | None  # None: it could not be scored, so the sample is left out of the step
    parts: Mapping[str, float] = field(default_factory=dict)  # name -> what it contributed, before its weight
    why: str = ""  # the reason, for people; always there where the value is None
    # float32 [T]: the part of the value that is due to a token before the last one of the policy's; None: nothing
    early: np.ndarray | None = field(default=None, compare=False)


class RewardFunction(Protocol):
    """Scores whole samples, each by itself. One that cannot be scored says so in its Score or stops the run; it is never a
    silent zero."""

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[Score]: ...


class Tracker(Protocol):
    """Where metrics go. `step` is the optimizer or RLHF step that produced them."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def samples(self, step: int, records: Sequence[Mapping[str, Any]]) -> None: ...

    def event(self, kind: str, **details: Any) -> None: ...

    def finish(self, status: str) -> None: ...


class Stateful(Protocol):
    """Something that must survive a restart."""

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...
