"""What became of the records that were read."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import IntFlag

import numpy as np
from numpy.typing import ArrayLike


class Outcome(IntFlag):
    """What became of one record; nothing special where no flag is set."""

    EMPTY = 1  # left out, without an answer
    TOO_LONG = 2  # left out, longer than max_seq_len
    LEFT_OUT = EMPTY | TOO_LONG
    TRUNCATED = 4  # cut to max_seq_len
    TIED = 8  # a ranking in which every completion has the same rank: kept, it teaches nothing


NUM_OUTCOMES = 16  # combinations of flags


@dataclass
class Report:
    """Counts over some records."""

    records: int = 0  # read and well formed
    skipped_corrupt: int = 0  # left out, malformed
    dropped_too_long: int = 0  # left out, longer than max_seq_len
    dropped_empty: int = 0  # left out, without an answer
    truncated: int = 0  # cut to max_seq_len
    tied: int = 0  # rankings in which every completion has the same rank
    tokens: int = 0  # in the examples that were kept
    cut_documents: int = 0  # raw text that does not stand whole in one block
    padding: int = 0  # slots of blocks of raw text that hold no token

    @classmethod
    def of(cls, outcomes: ArrayLike, tokens: int) -> Report:
        """outcomes: int [NUM_OUTCOMES], the records of each combination of flags."""
        counts = np.asarray(outcomes)
        flags = np.arange(NUM_OUTCOMES)

        def count(flag: Outcome) -> int:
            return int(counts[flags & flag != 0].sum())

        return cls(
            records=int(counts.sum()),
            dropped_too_long=count(Outcome.TOO_LONG),
            dropped_empty=count(Outcome.EMPTY),
            truncated=count(Outcome.TRUNCATED),
            tied=count(Outcome.TIED),
            tokens=tokens,
        )

    def __add__(self, other: Report) -> Report:
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return Report(**{name: count + theirs[name] for name, count in mine.items()})

    def to_dict(self, prefix: str = "") -> dict[str, float]:
        """Every count, and two shares: of padding in the blocks, and of documents that were cut."""
        shares = {
            "padding_share": round(self.padding / max(1, self.padding + self.tokens), 4),
            "cut_share": round(self.cut_documents / max(1, self.records), 4),
        }
        return {f"{prefix}{name}": count for name, count in (dataclasses.asdict(self) | shares).items()}
