"""What to read and how it becomes sequences, for every stage: raw text, conversations, rankings, prompts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum

from llmscale.config import Problem, at_least


class TooLong(Enum):
    """What happens to a record of more than `max_seq_len` tokens."""

    error = "error"  # stop, naming the record
    drop = "drop"  # leave it out; counted and reported
    truncate = "truncate"  # cut the end off; counted and reported; not for prompts


class OnCorrupt(Enum):
    """What happens to a malformed record: no JSON, no UTF-8, a column that is missing or of another type."""

    error = "error"  # stop, naming file and line
    skip = "skip"  # leave it out; counted and reported; a file of nothing else still stops


class Packing(Enum):
    """How documents of raw text become blocks of `max_seq_len` tokens."""

    cut = "cut"  # one after the other, cut where a block is full: no padding
    best_fit = "best_fit"  # whole, with those that fit beside them; only longer ones are cut; blocks end in padding


@dataclass
class DataConfig:
    # .txt, .jsonl, .json, .csv or .parquet file, a directory or glob of them, hub:NAME[:SPLIT] (package `datasets`), or
    # task:NAME/SPLIT
    train: str | None = None
    # Several sources instead of `train`, each under a name of yours, e.g. {web: web/*.parquet, books: books.jsonl}
    mixture: dict[str, str] = field(default_factory=dict)
    # Share of each source of the mixture in the samples, in any unit, e.g. {web: 3, books: 1}; empty: by size
    mixture_weights: dict[str, float] = field(default_factory=dict)
    # Shares are proportional to size^(1/T), size in examples; above 0; 1: proportional, the larger the more equal
    mixture_temperature: float = 1.0
    # Size that counts for a share at most, examples; 1 or more; null: no cap
    mixture_cap: int | None = None
    # Source of validation data, like `train`; null: see validation_fraction
    validation: str | None = None
    # Fraction of the training records held out for validation, the same ones in every run; 0 to 0.5
    validation_fraction: float = 0.0
    # Our column name -> its name in the file, where that differs, e.g. {prompt: question, completion: answer}
    columns: dict[str, str] = field(default_factory=dict)
    # Longest sequence, tokens; raw text is put into blocks of this length; 2 or more
    max_seq_len: int = 256
    # How documents of raw text share blocks
    packing: Packing = Packing.cut
    # Read this many records of each source at most; 1 or more; null: all
    max_records: int | None = None
    # Records longer than max_seq_len; null: drop training sequences, refuse prompts. Raw text is never too long
    too_long: TooLong | None = None
    # Malformed records
    on_corrupt: OnCorrupt = OnCorrupt.error
    # System message put before conversations and prompts that have none; null: none
    system_prompt: str | None = None
    # Folder of tokenized data, shared by runs, on a local or a shared disk; null: beside the runs
    cache_dir: str | None = None

    @property
    def sources(self) -> dict[str, str]:
        """Name -> source of what is trained on; a plain `train` has the name `train`."""
        return self.mixture or {"train": str(self.train)}

    def problems(self) -> Iterator[Problem]:
        yield from at_least(self, max_seq_len=2, max_records=1, mixture_cap=1)
        if not 0.0 <= self.validation_fraction <= 0.5:
            what = f"must be between 0 and 0.5, is {self.validation_fraction}"
            yield "validation_fraction", what, "It is the fraction of the training records to hold out, e.g. 0.05."
        if self.validation is not None and self.validation_fraction > 0:
            fix = "Set data.validation_fraction=0 or data.validation=null."
            yield "validation_fraction", "validation records come from `validation`, so none can be held out", fix
        if self.train is None and not self.mixture:
            yield (
                "train",
                "this value is needed and has no default",
                "Add data.train=..., or name several in data.mixture.",
            )
        if self.train is not None and self.mixture:
            yield "mixture", "the training data come from `train` already", "Set one of the two."
        named = {"train": self.train, "validation": self.validation}
        for path, source in [*named.items(), *((f"mixture.{name}", source) for name, source in self.mixture.items())]:
            if source in ("", "hub:"):
                yield path, "names no source", "Give a file, a directory, a glob, or hub:NAME."
        for ours, theirs in self.columns.items():
            if not ours or not theirs:
                yield "columns", f"empty column name in {ours!r}: {theirs!r}", "Write columns.OURS=THEIRS."
        yield from self._mixture_problems()

    def _mixture_problems(self) -> Iterator[Problem]:
        by_size = self.mixture_temperature != 1.0 or self.mixture_cap is not None
        if not self.mixture and (self.mixture_weights or by_size):
            yield "mixture", "there is no mixture whose shares could be set", "Name its sources in data.mixture."
        if self.mixture_weights and by_size:
            what = "exclude data.mixture_temperature and data.mixture_cap, which make shares from sizes"
            yield "mixture_weights", what, "Set either the weights or the others."
        if not 0.0 < self.mixture_temperature < math.inf:
            yield "mixture_temperature", f"must be above 0, is {self.mixture_temperature}", "1 is proportional to size."
        if self.mixture_weights and set(self.mixture_weights) != set(self.mixture):
            what = f"names {_listed(self.mixture_weights)}, and data.mixture names {_listed(self.mixture)}"
            yield "mixture_weights", what, "Give each source of the mixture one weight."
        for name, weight in self.mixture_weights.items():
            if not 0.0 < weight < math.inf:
                yield f"mixture_weights.{name}", f"must be above 0, is {weight}", "Leave a source without samples out."


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
