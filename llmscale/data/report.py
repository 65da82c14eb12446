"""What became of the records that were read."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass
class Report:
    """Counts over one source, filled while it is read."""

    records: int = 0  # read
    dropped_too_long: int = 0  # left out, longer than max_seq_len
    dropped_empty: int = 0  # left out, without an answer
    truncated: int = 0  # cut to max_seq_len
    tied: int = 0  # rankings in which every completion has the same rank: kept, they teach nothing
    tokens: int = 0  # in the examples that were kept

    def to_dict(self, prefix: str = "") -> dict[str, int]:
        return {f"{prefix}{name}": count for name, count in dataclasses.asdict(self).items()}
