"""Where records come from: files, a dataset of the Hugging Face Hub, or a generated task. Whatever is wrong with the input
becomes one DataError that says in which file and line.
"""

from __future__ import annotations

import difflib
import glob
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from llmscale.data import adding, tasks
from llmscale.data.files import SUFFIXES, read_file
from llmscale.data.records import Record
from llmscale.errors import DataError

HUB = "hub:"


def read_items(source: str, columns: Mapping[str, str], max_records: int | None = None) -> Iterator[Record | DataError]:
    """The records of `source` in order, with `columns` (our name -> theirs) renamed; the other columns are kept. The error
    of a malformed record comes in its place.

    Raises: DataError for a source that is missing, empty or unreadable, when reading gets there.
    """
    items: Iterator[Record | DataError]
    if source.startswith(HUB):
        rows = enumerate(_load_hub(source), 1)
        items = (Record(row, f"{source}:item {n}") for n, row in rows)
    elif source.startswith(tasks.TASK):
        items = (Record(fields, f"{source}:item {n}") for n, fields in enumerate(tasks.read_task(source), 1))
    else:
        items = (item for path in find_paths(source) for item in read_file(path))
    for item in islice(items, max_records):
        yield _renamed(item, columns) if columns and isinstance(item, Record) else item


def read_records(source: str, columns: Mapping[str, str], max_records: int | None = None) -> Iterator[Record]:
    """Like `read_items`.

    Raises: DataError for the first malformed record, too.
    """
    for item in read_items(source, columns, max_records):
        if isinstance(item, DataError):
            raise item
        yield item


def _renamed(record: Record, columns: Mapping[str, str]) -> Record | DataError:
    for ours, theirs in columns.items():
        if theirs not in record.fields:
            found = difflib.get_close_matches(theirs, record.fields, n=1)
            nearest = f"Did you mean data.columns.{ours}={found[0]}? " if found else ""
            fix = f"{nearest}The columns are: {', '.join(record.fields) or '(none)'}."
            return DataError(f"there is no column {theirs!r} (data.columns.{ours})", where=record.where, fix=fix)
    kept = {name: value for name, value in record.fields.items() if name not in columns.values()}
    return Record(kept | {ours: record.fields[theirs] for ours, theirs in columns.items()}, record.where)


def content_of(source: str) -> tuple[str, list[Path]]:
    """What `read_items` would read: files, and how they are named to it where that says which of their records.

    Raises: DataError where there is nothing to read.
    """
    if source.startswith(tasks.TASK):
        return source, [Path(tasks.__file__), Path(adding.__file__)]
    if source.startswith(HUB):
        return source, [Path(file["filename"]) for file in _load_hub(source).cache_files]
    return "", find_paths(source)


# ---------------------------------------------------------------- files


def find_paths(source: str) -> list[Path]:
    """The files of a file name, directory or glob, sorted by name."""
    path = Path(source).expanduser()
    if path.is_dir():
        paths = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file())
        if not paths:
            fix = "For files in folders below it, use a glob: DIR/**/*.jsonl"
            raise DataError(f"no {', '.join(SUFFIXES)} file in this directory", where=source, fix=fix)
        return paths
    if path.exists():
        return [path]
    if glob.has_magic(source):
        paths = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        if paths:
            return paths
        raise DataError("no file matches this pattern", where=source, fix="Try it with ls, in quotes taken off.")
    raise DataError("no such file", where=source, fix=_nearest_name(path))


def _nearest_name(path: Path) -> str:
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    names = sorted(p.name for p in folder.iterdir())
    missing = path.absolute().relative_to(folder).parts[0]
    found = difflib.get_close_matches(missing, names, n=1, cutoff=0.5)
    if found:
        return f"Did you mean {folder / found[0]}?"
    listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"{folder} holds: {listed}." if names else f"{folder} is empty."


# ---------------------------------------------------------------- hub


def _load_hub(source: str) -> Any:
    """Not in the streaming mode of `datasets`, which needs the network in every run and has no files to know the content by.
    What it downloads is read through memory maps, too."""
    name, _, split = source.removeprefix(HUB).partition(":")
    try:
        import datasets
    except ImportError as error:
        raise DataError("the package `datasets` is not installed", where=source, fix="pip install datasets") from error
    try:
        rows = datasets.load_dataset(name, split=split or "train", keep_in_memory=False)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        fix = "Check the name, the split and the network, or save the dataset as .jsonl and give that file."
        raise DataError(f"the dataset cannot be loaded: {error}", where=source, fix=fix) from error
    if len(rows) == 0:
        raise DataError("there is no record in this dataset", where=source)
    return rows
