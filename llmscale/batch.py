"""What travels between rooms: examples read from files, trajectories sampled from a policy, and the batches of
tensors that an engine runs on.

Legend: B rows, T tokens of a row, K completions of one prompt.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from llmscale.packing import best_fit


@dataclass(frozen=True)
class TokenExample:
    """One training sequence. `loss_mask[t]` says whether token t is a target (it is predicted from tokens < t).

    A packed row holds several documents; its `position_ids` restart at 0 where one begins.
    """

    token_ids: np.ndarray  # int64 [T]
    loss_mask: np.ndarray  # bool [T]
    position_ids: np.ndarray | None = None  # int64 [T]; None means 0..T-1


@dataclass(frozen=True)
class RankedExample:
    """K completions of one prompt with their ranks: 1 is best, equal numbers are tied."""

    sequences: tuple[np.ndarray, ...]  # K arrays, int64 [T_k]: prompt and completion, ready for the reward model
    ranks: tuple[int, ...]  # K
    ratings: tuple[float, ...] | None = None  # K, higher is better; only their differences count, as margins


@dataclass(frozen=True)
class SteppedExample:
    """A solution whose steps were judged one by one. `labels[t]`, where token t is the last of a judged step, is the
    probability that the step is right (mostly 0 or 1); NaN elsewhere."""

    token_ids: np.ndarray  # int64 [T]
    labels: np.ndarray  # float32 [T]


@dataclass(frozen=True)
class Prompt:
    """A prompt to sample from, already in token ids, with whatever the data knew about it (a reference answer)."""

    token_ids: np.ndarray  # int64 [T]
    text: str  # as a person would read it, for rewards and for samples.jsonl
    fields: Mapping[str, Any] = field(default_factory=dict)  # the columns of its record
    messages: tuple[Mapping[str, str], ...] = ()  # the turns that `token_ids` renders: role and content


def as_text(messages: Sequence[Mapping[str, str]]) -> str:
    """A conversation as a person would read it; a message that stands alone is its content."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)


@dataclass(frozen=True)
class Trajectory:
    """One sampled sequence, prompt first. Arrays have one entry for each token of the whole sequence.

    `loss_mask` is True on tokens that the policy produced and False on prompt, tool and user tokens; where it is
    False, `rollout_logprobs` is 0 and `weight_versions` is -1.
    """

    draw_id: int  # which draw of a prompt this belongs to; unique over the run
    sample_index: int  # 0 .. group_size - 1 within the draw
    token_ids: np.ndarray  # int64 [T]
    loss_mask: np.ndarray  # bool [T]
    rollout_logprobs: np.ndarray  # float32 [T], natural log, of the distribution that was sampled from
    weight_versions: np.ndarray  # int32 [T], version of the weights that produced the token
    finished: bool  # the policy ended it, or its environment did; False: cut off at the limit of tokens or turns
    prompt: Prompt
    completion: str  # decoded, special tokens left out; of several turns all, and what was said between them
    messages: tuple[Mapping[str, str], ...] = ()  # the turns of `completion` by role, where there is an environment
    turn_rewards: np.ndarray | None = (
        None  # float32 [T], its environment's, at the last token of each turn; 0 elsewhere
    )
    failure: str = ""  # why it ended too early to be judged: its environment gave up, or workers died over it
    interrupted: bool = False  # its engine was told to stop: neither ended nor at a limit, it can be continued

    @property
    def completion_len(self) -> int:
        """Tokens that the policy produced."""
        return int(self.loss_mask.sum())

    @property
    def said(self) -> list[str]:
        """What the policy wrote, turn by turn; the last is its answer."""
        return [m["content"] for m in self.messages if m["role"] == "assistant"] or [self.completion]


@dataclass
class Batch:
    """One micro-batch of right-padded rows, and how many elements each loss term counts in it.

    `tensors` holds `input_ids` and `position_ids` [B, T] and whatever else the objective put there. No attention
    mask: padding stands on the right, where a causal model never looks back from, and packed rows are told apart
    by restarting positions (an all-ones mask would let documents see each other).
    """

    tensors: dict[str, Tensor]
    counts: dict[str, float] = field(default_factory=dict)  # loss term -> elements (tokens, sequences or pairs)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def to(self, device: torch.device) -> Batch:
        return Batch({k: v.to(device, non_blocking=True) for k, v in self.tensors.items()}, self.counts)

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.tensors["lengths"].sum())


@dataclass(frozen=True)
class Rows:
    """How the sequences of a micro-batch stand in rows: changes memory and speed, and no number."""

    tokens: int = 0  # a row's most, which several sequences share; 0: each has a row of its own
    # Those that begin alike share their beginning too; for attention that knows of it: `llmscale.models.attention`
    branching: bool = False


APART = Rows()


@dataclass(frozen=True)
class Branch:
    """A sequence that begins as another does: its first `shared` tokens need not be computed again."""

    trunk: int  # the other's index
    shared: int


def branches_of(
    sequences: Sequence[np.ndarray], families: Sequence[Hashable], wanted: Sequence[int]
) -> list[Branch | None]:
    """Which sequence may branch off which: off the first of its family, before its token `wanted`, whose own output, or that of
    a later one, somebody asks for. None: off no other."""
    trunks: dict[Hashable, int] = {}
    found: list[Branch | None] = []
    for index, (ids, family, first) in enumerate(zip(sequences, families, wanted, strict=True)):
        trunk = trunks.setdefault(family, index)
        limit = min(first, len(sequences[trunk]))
        differ = np.flatnonzero(ids[:limit] != sequences[trunk][:limit])
        shared = int(differ[0]) if len(differ) else limit
        found.append(Branch(trunk, shared) if trunk != index and shared else None)
    return found


class Sample(Protocol):
    """A prompt and what the policy made of it."""

    @property
    def token_ids(self) -> np.ndarray: ...  # int64 [T]

    @property
    def loss_mask(self) -> np.ndarray: ...  # bool [T]


def prompt_branches(samples: Sequence[Sample]) -> list[Branch | None]:
    """Of samples of the same prompt: off the last token but one before the first in the loss, for the last one predicts it."""
    firsts = [int(s.loss_mask.argmax()) if s.loss_mask.any() else len(s.loss_mask) for s in samples]
    prompts = [s.token_ids[:first].tobytes() for s, first in zip(samples, firsts, strict=True)]
    return branches_of([s.token_ids for s in samples], prompts, [max(first - 1, 0) for first in firsts])


class Layout:
    """Where each sequence of a micro-batch stands. In shared rows (`Rows`) they stand one after another, the branches of a
    trunk right behind it and without what they share with it. Positions start at 0 with each sequence, and where a branch
    goes on. A row holds at least one trunk with its branches, however long they are.

    Legend: S sequences, B rows, T tokens of the longest row.
    """

    def __init__(self, lengths: Sequence[int], rows: Rows = APART, branches: Sequence[Branch | None] | None = None):
        self.lengths = list(lengths)
        self._trunks, self._shared = list(range(len(lengths))), [0] * len(lengths)
        trees = self._trees(branches if rows.branching and branches else [None] * len(lengths))
        own = self._own = [n - shared for n, shared in zip(self.lengths, self._shared, strict=True)]
        in_rows = [[tree] for tree in trees]
        if rows.tokens and trees:
            sizes = [sum(own[i] for i in tree) for tree in trees]
            in_rows = [[trees[n] for n in row] for row in sorted(best_fit(sizes, max(rows.tokens, *sizes)))]
        self.rows = [[index for tree in row for index in tree] for row in in_rows]
        self.shape = (max(len(self.rows), 1), max((sum(own[i] for i in row) for row in self.rows), default=1))
        self._starts = [0] * len(self.lengths)  # in the flattened [B * T]
        for number, row in enumerate(self.rows):
            column = number * self.shape[1]
            for index in row:
                self._starts[index] = column
                column += own[index]

    def _trees(self, branches: Sequence[Branch | None]) -> list[list[int]]:
        """Each trunk with its branches behind it."""
        trees: dict[int, list[int]] = {}
        for index, branch in enumerate(branches):
            tree = trees.setdefault(index if branch is None else branch.trunk, [])
            if branch is not None:
                # At the position where the branch before it ends it would be taken for more of that one.
                follows = len(tree) > 1 and branch.shared == self.lengths[tree[-1]]
                self._trunks[index], self._shared[index] = branch.trunk, branch.shared - follows
            tree.append(index)
        return list(trees.values())

    def place(self, arrays: Sequence[np.ndarray], fill: float | int | bool = 0) -> Tensor:
        """One array [T_i] a sequence -> [B, T], `fill` where there is none. Of what is shared the trunk's stands there."""
        dtype = arrays[0].dtype if arrays else np.asarray(fill).dtype
        out = np.full(self.shape[0] * self.shape[1], fill, dtype=dtype)
        for start, own, array in zip(self._starts, self._own, arrays, strict=True):
            out[start : start + own] = array[len(array) - own :]
        return torch.from_numpy(out.reshape(self.shape))

    def take(self, values: Tensor) -> list[Tensor]:
        """The inverse: [B, T] -> one [T_i] a sequence."""
        flat = values.flatten()
        own = [flat[start : start + length] for start, length in zip(self._starts, self._own, strict=True)]
        return [torch.cat([own[t][:n], x]) for t, n, x in zip(self._trunks, self._shared, own, strict=True)]

    @property
    def ends(self) -> Tensor:
        """int64 [S]: where each sequence's last token stands in the flattened [B * T]."""
        return torch.tensor([start + n - 1 for start, n in zip(self._starts, self._own, strict=True)]).long()

    def tensors(
        self, token_ids: Sequence[np.ndarray], position_ids: Sequence[np.ndarray | None] | None = None
    ) -> dict[str, Tensor]:
        """`input_ids`, `position_ids` [B, T] and `lengths` [B]. Padding continues a row's positions, so that it is never
        taken for the start of another document."""
        given = position_ids or [None] * len(token_ids)
        own = [np.arange(len(ids)) if p is None else p for ids, p in zip(token_ids, given, strict=True)]
        lengths = torch.tensor([sum(self._own[i] for i in row) for row in self.rows] or [0])
        positions = self.place(own).long()
        column = torch.arange(self.shape[1])
        last = positions.gather(1, (lengths - 1).clamp(min=0).unsqueeze(1))
        beyond = column >= lengths.unsqueeze(1)
        positions = torch.where(beyond, last + 1 + column - lengths.unsqueeze(1), positions)
        return {"input_ids": self.place(token_ids).long(), "position_ids": positions, "lengths": lengths}


def pad_rows(rows: list[np.ndarray], value: float | int | bool = 0) -> Tensor:
    """Stack ragged rows [T_i] into [B, T], padded on the right with `value`; no rows give one of [1, 1]."""
    length = max((len(row) for row in rows), default=1)
    dtype = rows[0].dtype if rows else np.int64
    out = np.full((max(len(rows), 1), length), value, dtype=dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return torch.from_numpy(out)


def token_tensors(rows: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """`input_ids`, `position_ids` [B, T] and `lengths` [B] of right-padded rows, a sequence each."""
    return Layout([len(row) for row in rows]).tensors(rows)
