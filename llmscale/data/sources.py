"""Reading records: files line by line or item by item, or a dataset of the Hugging Face Hub. Whatever is wrong with the
input becomes one DataError that says in which file and line.
"""

from __future__ import annotations

import difflib
import glob
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from llmscale.data.tasks import TASK, read_task
from llmscale.errors import DataError, LlmscaleError

HUB = "hub:"
SUFFIXES = (".txt", ".jsonl", ".json")


@dataclass(frozen=True)
class Record:
    """One record under our column names, and where it stands: `file:line` or `file:item N`."""

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
def located(record: Record) -> Iterator[None]:
    """Errors raised inside that do not say where they are get the record's place."""
    try:
        yield
    except LlmscaleError as error:
        if error.where is not None:
            raise
        raise type(error)(error.what, where=record.where, fix=error.fix) from error


def read_records(source: str, columns: Mapping[str, str], max_records: int | None = None) -> Iterator[Record]:
    """The records of `source` in order, with `columns` (our name -> theirs) renamed; the other columns are kept.

    Raises: DataError for a source that is missing, empty or malformed, when reading gets there.
    """
    if source.startswith(HUB):
        records = _read_hub(source)
    elif source.startswith(TASK):
        records = (Record(fields, f"{source}:item {n}") for n, fields in enumerate(read_task(source), 1))
    else:
        records = (record for path in find_paths(source) for record in _read_file(path))
    for record in islice(records, max_records):
        yield _renamed(record, columns) if columns else record


def _renamed(record: Record, columns: Mapping[str, str]) -> Record:
    for ours, theirs in columns.items():
        if theirs not in record.fields:
            found = difflib.get_close_matches(theirs, record.fields, n=1)
            nearest = f"Did you mean data.columns.{ours}={found[0]}? " if found else ""
            fix = f"{nearest}The columns are: {', '.join(record.fields) or '(none)'}."
            raise DataError(f"there is no column {theirs!r} (data.columns.{ours})", where=record.where, fix=fix)
    kept = {name: value for name, value in record.fields.items() if name not in columns.values()}
    return Record(kept | {ours: record.fields[theirs] for ours, theirs in columns.items()}, record.where)


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


def _read_file(path: Path) -> Iterator[Record]:
    readers = {".txt": _read_text, ".jsonl": _read_lines, ".json": _read_array}
    if path.suffix not in readers:
        fix = f"Convert it to one of {', '.join(SUFFIXES)}."
        raise DataError(f"files of type {path.suffix or '(no suffix)'} cannot be read", where=str(path), fix=fix)
    count = 0
    try:
        for record in readers[path.suffix](path):
            count += 1
            yield record
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    if count == 0:
        raise DataError("there is no record in this file", where=str(path), fix="Fill it or leave it out.")


def _read_text(path: Path) -> Iterator[Record]:
    """One document a file, as it is: no line ending is changed."""
    text = _decoded(path.read_bytes(), path)
    if text.strip():
        yield Record({"text": text}, f"{path}:1")


def _read_lines(path: Path) -> Iterator[Record]:
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            line = _decoded(raw, path, number)
            if line.strip():
                yield _record(_parsed(line.rstrip(), path, number), f"{path}:{number}", _escapes_surrogates(line))


def _read_array(path: Path) -> Iterator[Record]:
    text = _decoded(path.read_bytes(), path)
    if not text.strip():
        return
    items = _parsed(text, path, 1)
    if not isinstance(items, list):
        fix = "Write a list of objects, [{...}, ...], or one object a line in a .jsonl file."
        raise DataError(f"must hold a list of objects, holds {_kind(items)}", where=f"{path}:1", fix=fix)
    may_hold_surrogates = _escapes_surrogates(text)
    for number, item in enumerate(items, 1):
        yield _record(item, f"{path}:item {number}", may_hold_surrogates)


def _decoded(raw: bytes, path: Path, line: int = 1) -> str:
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += error.object[: error.start].count(b"\n")
        what = f"this is not UTF-8: byte 0x{error.object[error.start]:02x}"
        raise DataError(what, where=f"{path}:{line}", fix="Convert the file: iconv -f ENCODING -t UTF-8") from error


def _parsed(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        fix = f"Mend the line{_other_suffix(text, path, error)}."
        what = f"this is not JSON: {error.msg} at column {error.colno}"
        raise DataError(what, where=f"{path}:{line + error.lineno - 1}", fix=fix) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets of endless depth
        raise DataError(f"this JSON cannot be read: {error}", where=f"{path}:{line}") from error


def _other_suffix(text: str, path: Path, error: json.JSONDecodeError) -> str:
    if path.suffix == ".jsonl" and text.lstrip().startswith("["):
        return ", or name the file .json if it is one JSON list"
    if path.suffix == ".json" and error.msg == "Extra data":
        return ", or name the file .jsonl if it has one object a line"
    return ""


def _record(item: Any, where: str, may_hold_surrogates: bool) -> Record:
    if not isinstance(item, dict):
        raise DataError(f"must be an object, is {_kind(item)}", where=where, fix='Write {"column": value, ...}.')
    if may_hold_surrogates:
        try:
            json.dumps(item, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            what = f"this is not text: a lone surrogate {error.object[error.start]!a}"
            raise DataError(what, where=where, fix="Take the \\ud... escape out.") from error
    return Record(item, where)


def _escapes_surrogates(text: str) -> bool:
    """JSON can escape half of a surrogate pair, which is no text and would only fail in the tokenizer."""
    return "\\ud" in text or "\\uD" in text


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


# ---------------------------------------------------------------- hub


def _read_hub(source: str) -> Iterator[Record]:
    name, _, split = source.removeprefix(HUB).partition(":")
    try:
        import datasets
    except ImportError as error:
        raise DataError("the package `datasets` is not installed", where=source, fix="pip install datasets") from error
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        fix = "Check the name, the split and the network, or save the dataset as .jsonl and give that file."
        raise DataError(f"the dataset cannot be loaded: {error}", where=source, fix=fix) from error
    if len(rows) == 0:
        raise DataError("there is no record in this dataset", where=source)
    for number, row in enumerate(rows, 1):
        yield Record(row, f"{source}:item {number}")
