"""Examples as random-access sequences over the flat arrays of the cache: an example is copied out when it is asked for, in
microseconds, and lengths are known without it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, overload

import numpy as np

from llmscale.batch import RankedExample, SteppedExample, TokenExample

E = TypeVar("E")


class Examples(Sequence[E]):
    """`lengths` [N] int64: the tokens of each example, of all K sequences of a ranking."""

    def __init__(self, lengths: np.ndarray):
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> E: ...

    @overload
    def __getitem__(self, index: slice) -> list[E]: ...

    def __getitem__(self, index: int | slice) -> E | list[E]:
        if isinstance(index, slice):
            return [self._example(i) for i in range(len(self))[index]]
        return self._example(range(len(self))[index])

    @abstractmethod
    def _example(self, index: int) -> E:
        """`index` counts from 0 and is in range."""
        ...


class ListedExamples(Examples[E]):
    """Examples that are in memory anyway."""

    def __init__(self, examples: Sequence[E], length: Callable[[E], int]):
        super().__init__(np.array([length(example) for example in examples], dtype=np.int64))
        self._examples = examples

    def _example(self, index: int) -> E:
        return self._examples[index]


class TokenExamples(Examples[TokenExample]):
    """Sequences with loss masks. `arrays`: `tokens` and `mask` [T], `offsets` [sequences + 1]; `index`: which of them."""

    def __init__(self, arrays: Mapping[str, np.ndarray], index: np.ndarray):
        offsets = arrays["offsets"]
        super().__init__(offsets[index + 1] - offsets[index])
        self._tokens, self._mask, self._starts = arrays["tokens"], arrays["mask"], offsets[index]

    def _example(self, index: int) -> TokenExample:
        own = slice(start := int(self._starts[index]), start + int(self.lengths[index]))
        return TokenExample(self._tokens[own].astype(np.int64), self._mask[own].copy())


class RankedExamples(Examples[RankedExample]):
    """Rankings. `arrays`: `tokens` [T], `offsets` [sequences + 1], `groups` [rankings + 1] into the sequences, `ranks` and
    `ratings` [sequences], the latter NaN where there is none; `index`: which rankings."""

    def __init__(self, arrays: Mapping[str, np.ndarray], index: np.ndarray):
        self._tokens, self._offsets = arrays["tokens"], arrays["offsets"]
        self._ranks, self._ratings = arrays["ranks"], arrays["ratings"]
        groups = arrays["groups"]
        self._starts, self._ends = groups[index], groups[index + 1]
        super().__init__(self._offsets[self._ends] - self._offsets[self._starts])

    def _example(self, index: int) -> RankedExample:
        first, last = int(self._starts[index]), int(self._ends[index])
        offsets = self._offsets[first : last + 1].tolist()
        tokens = self._tokens[offsets[0] : offsets[-1]].astype(np.int64)
        cuts = [offset - offsets[0] for offset in offsets[1:-1]]
        ratings = self._ratings[first:last].tolist()
        rated = None if np.isnan(ratings[0]) else tuple(ratings)
        return RankedExample(tuple(np.split(tokens, cuts)), tuple(self._ranks[first:last].tolist()), rated)


class SteppedExamples(Examples[SteppedExample]):
    """Solutions with judged steps. `arrays`: `tokens` and `labels` [T], `offsets` [sequences + 1]; `index`: which of them."""

    def __init__(self, arrays: Mapping[str, np.ndarray], index: np.ndarray):
        offsets = arrays["offsets"]
        super().__init__(offsets[index + 1] - offsets[index])
        self._tokens, self._labels, self._starts = arrays["tokens"], arrays["labels"], offsets[index]

    def _example(self, index: int) -> SteppedExample:
        own = slice(start := int(self._starts[index]), start + int(self.lengths[index]))
        return SteppedExample(self._tokens[own].astype(np.int64), self._labels[own].copy())


class JoinedExamples(Examples[E]):
    """Several parts, one behind the other."""

    def __init__(self, parts: Sequence[Examples[E]]):
        super().__init__(np.concatenate([part.lengths for part in parts]))
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def _example(self, index: int) -> E:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[part][index - int(self._ends[part]) + len(self._parts[part])]


def joined(parts: Sequence[Examples[Any]]) -> Examples[Any]:
    if not parts:
        return ListedExamples([], len)
    return parts[0] if len(parts) == 1 else JoinedExamples(parts)
