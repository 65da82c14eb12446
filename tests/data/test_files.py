"""Tables: .csv and .parquet. The formats that are not tables are tested with the sources."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from llmscale.data.files import read_file
from llmscale.data.records import Record
from llmscale.data.sources import read_records
from llmscale.errors import DataError


def read(path: str | Path) -> list[Record]:
    return list(read_records(str(path), {}))


def failure(path: str | Path) -> DataError:
    with pytest.raises(DataError) as caught:
        read(path)
    return caught.value


def items(path: str | Path) -> list[str]:
    """Place and fault of what is malformed, place alone of what is not."""
    return [f"{i.where} {i.what}" if isinstance(i, DataError) else i.where for i in read_file(Path(path))]


# ---------------------------------------------------------------- csv


def test_csv_fields_are_text_and_know_the_line_where_their_row_begins(write):
    path = write("a.csv", 'text,n\none,1\n\n"two\nlines, ""so"" to say",\n three ,3\n')
    records = read(path)
    assert [dict(r.fields) for r in records] == [
        {"text": "one", "n": "1"},
        {"text": 'two\nlines, "so" to say', "n": ""},
        {"text": " three ", "n": "3"},
    ]
    assert [r.where for r in records] == [f"{path}:{line}" for line in (2, 4, 6)]


def test_csv_of_a_spreadsheet(write):
    path = write("a.csv", b'\xef\xbb\xbftext,n\r\n"a\r\nb",1\r\n\xc3\xbc,2\r\n')
    assert [r.fields["text"] for r in read(path)] == ["a\r\nb", "ü"]


def test_csv_comes_back_as_it_was_written(tmp_path):
    rows = [["a,b", 'c"d', "e\nf", "", "x" * 200_000], ["1", "2", "3", "4", "5"]]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([list("vwxyz"), *rows])
    assert [list(r.fields.values()) for r in read(tmp_path / "a.csv")] == rows


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        (b"text,n\na,1\nb\n", "3", "this row has 1 fields, the first line names 2 columns"),
        (b"text,n\na,1,x\n", "2", "this row has 3 fields"),
        (b'text,n\n"a"b,1\n', "2", "this is not CSV"),
        (b'text,n\na,1\n"b,2\nc,3\n', "3", "this is not CSV: unexpected end"),
        (b"text,n\na,1\nb\xff,2\n", "3", "not UTF-8: byte 0xff"),
        (b"text,\na,1\n", "1", "must name the columns"),
        (b"text,text\na,1\n", "1", "must name the columns"),
        (b"t\xe9xt,n\na,1\n", "1", "not UTF-8: byte 0xe9"),
    ],
)
def test_malformed_csv_says_where(write, content, line, what):
    path = write("a.csv", content)
    error = failure(path)
    assert error.where == f"{path}:{line}" and what in error.what and error.fix


@pytest.mark.parametrize("content", ["", "\n\n", "text,n\n", "text,n\n\n"])
def test_csv_without_rows_is_empty(write, content):
    assert "no record" in failure(write("a.csv", content)).what


def test_reading_goes_on_behind_a_malformed_row(write):
    path = write("a.csv", b'text,n\na,1\nb\n"c"d,3\n\xff,4\ne,5\n')
    places = [f"{path}:{line}" for line in range(2, 7)]
    made = items(path)
    assert [m.split(" ")[0] for m in made] == places and [m for m in made if " " not in m] == [places[0], places[4]]


# ---------------------------------------------------------------- parquet


def write_parquet(path: Path, columns: dict, **options) -> Path:
    parquet.write_table(pa.table(columns), path, **options)
    return path


def test_parquet_rows_are_records_of_python_values(tmp_path):
    turns = [[{"role": "user", "content": "Q"}], []]
    path = write_parquet(tmp_path / "a.parquet", {"text": ["one", None], "n": [1, 2], "messages": turns})
    records = read(path)
    assert [dict(r.fields) for r in records] == [
        {"text": "one", "n": 1, "messages": turns[0]},
        {"text": None, "n": 2, "messages": []},
    ]
    assert [r.where for r in records] == [f"{path}:row 1", f"{path}:row 2"]


def test_parquet_rows_are_counted_over_batches_and_row_groups(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"n": list(range(1000))}, row_group_size=300)
    assert [(r.fields["n"], r.where) for r in read(path)] == [(i, f"{path}:row {i + 1}") for i in range(1000)]


def not_utf8(values: list[bytes]) -> pa.Array:
    """A column of text with such bytes, as other writers make them."""
    bytes_of = pa.array(values, type=pa.binary())
    return pa.Array.from_buffers(pa.string(), len(values), bytes_of.buffers())


def test_parquet_text_that_is_not_utf8_is_named_by_its_row(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"text": not_utf8([b"one", b"t\xffo", b"three"])})
    assert items(path) == [f"{path}:row 1", f"{path}:row 2 this is not UTF-8: byte 0xff", f"{path}:row 3"]
    assert failure(path).where == f"{path}:row 2"


def test_a_broken_parquet_file_is_one_error(write, tmp_path):
    assert "cannot be read" in failure(write("a.parquet", b"PAR1 and no more")).what
    assert "no record" in failure(write_parquet(tmp_path / "b.parquet", {"text": pa.array([], pa.string())})).what
    twice = pa.table([pa.array([1]), pa.array([2])], names=["a", "a"])
    parquet.write_table(twice, tmp_path / "c.parquet")
    assert "two columns have one name" in failure(tmp_path / "c.parquet").what
    whole = write_parquet(tmp_path / "d.parquet", {"n": list(range(2000))}, row_group_size=1000, compression="snappy")
    content = bytearray(whole.read_bytes())
    middle = parquet.ParquetFile(whole).metadata.row_group(1).column(0).data_page_offset
    content[middle : middle + 200] = b"\x55" * 200
    whole.write_bytes(content)
    error = failure(whole)
    assert error.where == str(whole) and re.match(r"cannot be read behind row [1-9]\d\d", error.what)


def test_tables_lie_in_directories_like_other_files(write, tmp_path):
    write("b.csv", "text\ntwo\n")
    write_parquet(tmp_path / "a.parquet", {"text": ["one"]})
    write("c.jsonl", [{"text": "three"}])
    assert [r.fields["text"] for r in read(tmp_path)] == ["one", "two", "three"]
