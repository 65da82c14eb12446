"""The file formats, read as they come: one record or a small batch is in memory, never a whole file. Two hold no records
that stand apart and are read whole: a .txt, which is one document, and a .json, which is one list.

A record that is malformed by itself comes as the DataError that names its place, and reading goes on behind it; what
makes the whole file unreadable is raised.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmscale.data.records import Record
from llmscale.errors import DataError

_ROWS_AT_ONCE = 256  # of a .parquet file
_BUFFER_BYTES = 1 << 20  # of each of its columns


def read_file(path: Path) -> Iterator[Record | DataError]:
    """Raises: DataError for a file of another type, one that cannot be read, or one without a record."""
    if path.suffix not in _READERS:
        fix = f"Convert it to one of {', '.join(SUFFIXES)}."
        raise DataError(f"files of type {path.suffix or '(no suffix)'} cannot be read", where=str(path), fix=fix)
    is_empty = True
    try:
        for item in _READERS[path.suffix](path):
            is_empty = False
            yield item
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    if is_empty:
        raise DataError("there is no record in this file", where=str(path), fix="Fill it or leave it out.")


def _read_text(path: Path) -> Iterator[Record]:
    """One document a file, as it is: no line ending is changed."""
    text = _decoded(path.read_bytes(), path)
    if text.strip():
        yield Record({"text": text}, f"{path}:1")


# ---------------------------------------------------------------- JSON


def _read_lines(path: Path) -> Iterator[Record | DataError]:
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            try:
                line = _decoded(raw, path, number)
                if not line.strip():
                    continue
                yield _record(_parsed(line.rstrip(), path, number), f"{path}:{number}", _escapes_surrogates(line))
            except DataError as error:
                yield error


def _read_array(path: Path) -> Iterator[Record | DataError]:
    text = _decoded(path.read_bytes(), path)
    if not text.strip():
        return
    items = _parsed(text, path, 1)
    if not isinstance(items, list):
        fix = "Write a list of objects, [{...}, ...], or one object a line in a .jsonl file."
        raise DataError(f"must hold a list of objects, holds {_kind(items)}", where=f"{path}:1", fix=fix)
    may_hold_surrogates = _escapes_surrogates(text)
    for number, item in enumerate(items, 1):
        try:
            yield _record(item, f"{path}:item {number}", may_hold_surrogates)
        except DataError as error:
            yield error


def _decoded(raw: bytes, path: Path, line: int = 1) -> str:
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += error.object[: error.start].count(b"\n")
        raise _not_utf8(error.object[error.start], f"{path}:{line}") from error


def _not_utf8(byte: int, where: str) -> DataError:
    fix = "Convert the file: iconv -f ENCODING -t UTF-8"
    return DataError(f"this is not UTF-8: byte 0x{byte:02x}", where=where, fix=fix)


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


# ---------------------------------------------------------------- tables


def _read_csv(path: Path) -> Iterator[Record | DataError]:
    """Comma-separated, quoted with ", the names of the columns in the first line; every field is text."""
    csv.field_size_limit(sys.maxsize)  # the default, 131072 characters, is less than a document may have
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file, strict=True)
        header = next(_csv_rows(rows, path), None)
        if header is None:
            return
        if isinstance(header, DataError):
            raise header
        names, where = header
        if not all(names) or len(set(names)) < len(names):
            what = f"the first line must name the columns, each by another name, is {','.join(names)!r:.60}"
            raise DataError(what, where=where, fix="Write the names of the columns above the rows.")
        for row in _csv_rows(rows, path):
            if isinstance(row, DataError):
                yield row
            elif len(row[0]) == len(names):
                yield Record(dict(zip(names, row[0], strict=True)), row[1])
            else:
                what = f"this row has {len(row[0])} fields, the first line names {len(names)} columns"
                yield DataError(what, where=row[1], fix='Put fields with a comma or a line break in "quotes".')


def _csv_rows(rows: Any, path: Path) -> Iterator[tuple[list[str], str] | DataError]:
    """The fields of each row and the line where it begins, `rows` being a csv.reader; blank lines are none."""
    while True:
        where = f"{path}:{rows.line_num + 1}"
        try:
            fields = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            fix = 'Write a quote inside of a quoted field twice: "".'
            yield DataError(f"this is not CSV: {error}", where=where, fix=fix)
            continue
        try:
            "".join(fields).encode()
        except UnicodeEncodeError as error:  # an escaped byte, see `surrogateescape`
            yield _not_utf8(ord(error.object[error.start]) - 0xDC00, where)
            continue
        if fields:
            yield fields, where


def _read_parquet(path: Path) -> Iterator[Record | DataError]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError("the package `pyarrow` is not installed", where=str(path), fix="pip install pyarrow") from error
    number = 0
    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file:
            if len(set(names := file.schema_arrow.names)) < len(names):
                raise DataError(f"two columns have one name: {', '.join(names)}", where=str(path), fix="Rename one.")
            for batch in file.iter_batches(_ROWS_AT_ONCE):
                for row in _rows(batch):
                    number += 1
                    where = f"{path}:row {number}"
                    broken = isinstance(row, UnicodeDecodeError)
                    yield _not_utf8(row.object[row.start], where) if broken else Record(row, where)
    except (pyarrow.ArrowException, OSError) as error:
        what = f"cannot be read behind row {number}: {str(error).splitlines()[0]}"
        raise DataError(what, where=str(path), fix="Write the file again.") from error


def _rows(batch: Any) -> Iterator[Any]:
    """Each row of a RecordBatch as a dict, or the UnicodeDecodeError that stands for it."""
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError as error:
        rows = [error] if len(batch) == 1 else [row for i in range(len(batch)) for row in _rows(batch.slice(i, 1))]
    yield from rows


_READERS = {
    ".txt": _read_text,
    ".jsonl": _read_lines,
    ".json": _read_array,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
SUFFIXES = tuple(_READERS)
