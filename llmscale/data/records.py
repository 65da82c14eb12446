"""One record of any source, and what is done about one that is malformed."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

from llmscale.data.config import OnCorrupt
from llmscale.errors import DataError, LlmscaleError

T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """One record under our column names, and where it stands: `file:line`, `file:item N` or `file:row N`."""

    fields: Mapping[str, Any]
    where: str

    def value(self, name: str) -> Any:
        """Raises: DataError that lists the columns there are."""
        if name not in self.fields:
            raise DataError(f"there is no column {name!r}", where=self.where, fix=columns_hint(name, self.fields))
        return self.fields[name]

    def string(self, name: str) -> str:
        value = self.value(name)
        if not isinstance(value, str):
            kind = "null" if value is None else type(value).__name__
            raise DataError(
                f"column {name!r} must be text, is {kind}", where=self.where, fix="Mend or drop the record."
            )
        return value


def columns_hint(name: str, columns: Mapping[str, Any]) -> str:
    found = difflib.get_close_matches(name, columns, n=1)
    nearest = f"Did you mean data.columns.{name}={found[0]}? " if found else f"Map one with data.columns.{name}=NAME. "
    return f"{nearest}The columns are: {', '.join(columns) or '(none)'}."


@contextmanager
def located(where: str) -> Iterator[None]:
    """Errors raised inside that do not say where they are get this place."""
    try:
        yield
    except LlmscaleError as error:
        if error.where is not None:
            raise
        raise type(error)(error.what, where=where, fix=error.fix) from error


@dataclass
class Malformed:
    """The malformed records of one source: each is an error, or they are left out and counted."""

    on_corrupt: OnCorrupt
    count: int = 0
    first: str | None = None  # place and fault

    def left_out(self, items: Iterable[Record | DataError], parse: Callable[[Record], T]) -> Iterator[T]:
        """What `parse` makes of each well-formed record. `items` has the error in the place of a record that could not
        even be read.

        Raises: the first DataError; where they are skipped, that of a file in which every record has one.
        """
        for _, of_one_file in groupby(items, key=lambda item: str(item.where).rpartition(":")[0]):
            first, any_good = None, False
            for item in of_one_file:
                try:
                    if isinstance(item, DataError):
                        raise item
                    with located(item.where):
                        parsed = parse(item)
                except DataError as error:
                    if self.on_corrupt is OnCorrupt.error:
                        raise
                    self.count += 1
                    first = first or error
                    self.first = self.first or f"{error.where}: {error.what}"
                else:
                    any_good = True
                    yield parsed
            if first is not None and not any_good:
                raise first
