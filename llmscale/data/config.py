"""What to read and how it becomes sequences, for every stage: raw text, conversations, rankings, prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from llmscale.config import Problem, at_least


class TooLong(Enum):
    """What happens to a record of more than `max_seq_len` tokens."""

    error = "error"  # stop, naming the record
    drop = "drop"  # leave it out; counted and reported
    truncate = "truncate"  # cut the end off; counted and reported; not for prompts


@dataclass
class DataConfig:
    # .txt, .jsonl or .json file, a directory or glob of them, hub:NAME[:SPLIT] (package `datasets`), or task:NAME/SPLIT
    train: str = MISSING
    # Source of validation data, like `train`; null: see validation_fraction
    validation: str | None = None
    # Fraction of the training records held out for validation, the same ones in every run; 0 to 0.5
    validation_fraction: float = 0.0
    # Our column name -> its name in the file, where that differs, e.g. {prompt: question, completion: answer}
    columns: dict[str, str] = field(default_factory=dict)
    # Longest sequence, tokens; raw text is cut into blocks of this length; 2 or more
    max_seq_len: int = 256
    # Read this many records of each source at most; 1 or more; null: all
    max_records: int | None = None
    # Records longer than max_seq_len; null: drop training sequences, refuse prompts. Raw text is never too long
    too_long: TooLong | None = None
    # System message put before conversations and prompts that have none; null: none
    system_prompt: str | None = None

    def problems(self) -> Iterator[Problem]:
        yield from at_least(self, max_seq_len=2, max_records=1)
        if not 0.0 <= self.validation_fraction <= 0.5:
            what = f"must be between 0 and 0.5, is {self.validation_fraction}"
            yield "validation_fraction", what, "It is the fraction of the training records to hold out, e.g. 0.05."
        if self.validation is not None and self.validation_fraction > 0:
            fix = "Set data.validation_fraction=0 or data.validation=null."
            yield "validation_fraction", "validation records come from `validation`, so none can be held out", fix
        for name in ("train", "validation"):
            if getattr(self, name) in ("", "hub:"):
                yield name, "names no source", "Give a file, a directory, a glob, or hub:NAME."
        for ours, theirs in self.columns.items():
            if not ours or not theirs:
                yield "columns", f"empty column name in {ours!r}: {theirs!r}", "Write columns.OURS=THEIRS."
