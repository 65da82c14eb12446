from __future__ import annotations

import os
import subprocess
import sys

import pytest

from llmscale.data.sources import read_records
from llmscale.errors import DataError


def read(source: str, columns=None, max_records=None):
    return list(read_records(source, columns or {}, max_records))


def failure(source: str, columns=None) -> DataError:
    with pytest.raises(DataError) as caught:
        read(source, columns)
    return caught.value


def test_jsonl_records_know_their_line_and_blank_lines_count(write):
    path = write("a.jsonl", '{"text": "one"}\n\n{"text": "zwei ü"}\n\n')
    records = read(path)
    assert [r.fields for r in records] == [{"text": "one"}, {"text": "zwei ü"}]
    assert [r.where for r in records] == [f"{path}:1", f"{path}:3"]


def test_json_items_are_numbered(write):
    path = write("a.json", [{"a": 1}, {"a": 2}])
    assert [(r.fields["a"], r.where) for r in read(path)] == [(1, f"{path}:item 1"), (2, f"{path}:item 2")]


def test_a_text_file_is_one_unchanged_document(write):
    path = write("a.txt", b"one\r\n\r\ntwo\n")
    (record,) = read(path)
    assert record.fields == {"text": "one\r\n\r\ntwo\n"} and record.where == f"{path}:1"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_a_byte_order_mark_is_no_content(write, name):
    content = {"a.txt": "x", "a.jsonl": '{"text": "x"}', "a.json": '[{"text": "x"}]'}[name]
    (record,) = read(write(name, b"\xef\xbb\xbf" + content.encode()))
    assert record.fields == {"text": "x"}


def test_directories_and_globs_read_files_by_name(write, tmp_path):
    write("b.jsonl", [{"n": 2}])
    write("a.json", [{"n": 1}])
    write("notes.md", "not data")
    write("deep/c.jsonl", [{"n": 3}])
    assert [r.fields["n"] for r in read(str(tmp_path))] == [1, 2]
    assert [r.fields["n"] for r in read(f"{tmp_path}/*.jsonl")] == [2]
    assert [r.fields["n"] for r in read(f"{tmp_path}/**/*.jsonl")] == [2, 3]


def test_brackets_in_a_file_name_are_no_glob(write):
    assert len(read(write("run[1].jsonl", [{"n": 1}]))) == 1


def test_reading_streams_and_stops(write):
    path = write("a.jsonl", '{"n": 1}\n{"n": 2}\nbroken\n')
    assert len(read(path, max_records=2)) == 2
    assert next(read_records(path, {})).fields == {"n": 1}


def test_columns_are_renamed_and_may_be_swapped(write):
    path = write("a.jsonl", [{"q": "Q", "text": "T", "x": 1}])
    assert read(path, {"prompt": "q"})[0].fields == {"prompt": "Q", "text": "T", "x": 1}
    assert read(path, {"q": "text", "text": "q"})[0].fields == {"q": "T", "text": "Q", "x": 1}
    assert read(path, {"text": "q"})[0].fields == {"text": "Q", "x": 1}


def test_a_wrong_column_lists_the_right_ones(write):
    path = write("a.jsonl", [{"question": "Q", "answer": "A"}])
    error = failure(path, {"prompt": "qestion"})
    assert error.where == f"{path}:1" and "'qestion'" in error.what
    assert "data.columns.prompt=question" in str(error) and "question, answer" in str(error)
    with pytest.raises(DataError) as caught:
        read(path)[0].string("answers")
    assert "Did you mean data.columns.answers=answer?" in str(caught.value)


def test_a_column_that_is_no_text_is_named(write):
    path = write("a.jsonl", [{"text": None}])
    with pytest.raises(DataError) as caught:
        read(path)[0].string("text")
    assert caught.value.where == f"{path}:1" and "is null" in caught.value.what


def test_a_missing_file_names_the_nearest(write, tmp_path):
    write("train.jsonl", [{"n": 1}])
    error = failure(f"{tmp_path}/trian.jsonl")
    assert error.where == f"{tmp_path}/trian.jsonl" and f"Did you mean {tmp_path}/train.jsonl?" in str(error)
    assert "holds: train.jsonl" in str(failure(f"{tmp_path}/zzz/q.txt"))
    assert "no file matches" in failure(f"{tmp_path}/*.txt").what


def test_a_directory_without_data_says_so(write, tmp_path):
    write("deep/c.jsonl", [{"n": 3}])
    assert "**" in str(failure(str(tmp_path)))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
@pytest.mark.parametrize("content", ["", " \n\n"])
def test_an_empty_file_is_refused(write, name, content):
    path = write(name, content)
    error = failure(path)
    assert error.where == path and "no record" in error.what


def test_an_empty_list_is_refused(write):
    assert "no record" in failure(write("a.json", [])).what


@pytest.mark.parametrize(
    ("name", "content", "line", "what", "fix"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": }\n', "2", "not JSON", "Mend"),
        ("a.jsonl", "[\n{}]", "1", "not JSON", ".json"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "2", "must be an object, is a list", "column"),
        ("a.jsonl", '"x"\n', "1", "is a string", "column"),
        ("a.jsonl", '{"a": ' + "1" * 5000 + "}", "1", "cannot be read", None),
        ("a.jsonl", '{"a": 1}\n{"a": "\\ud83d"}\n', "2", "surrogate", "escape"),
        ("a.json", '[\n{"a": 1},\n{"a" 2}\n]', "3", "not JSON", "Mend"),
        ("a.json", '{"a": 1}\n{"a": 2}\n', "2", "not JSON", ".jsonl"),
        ("a.json", '{"data": []}', "1", "holds an object", "list"),
        ("a.json", '[{"a": 1}, 3]', "item 2", "is a number", "column"),
        ("a.json", '[{"a": ["\\uD83D x"]}]', "item 1", "surrogate", "escape"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "2", "0xff", "iconv"),
        ("a.json", b'[\n\n{"a": "\xe9"}]', "3", "0xe9", "iconv"),
        ("a.txt", b"one\ntwo \x80", "2", "0x80", "iconv"),
    ],
)
def test_malformed_input_says_where_and_what_to_do(write, name, content, line, what, fix):
    path = write(name, content)
    error = failure(path)
    assert error.where == f"{path}:{line}"
    assert what in error.what
    assert fix is None or fix in str(error)


def test_a_whole_surrogate_pair_is_text(write):
    assert read(write("a.jsonl", '{"a": "\\ud83d\\ude00"}'))[0].fields == {"a": "😀"}


def test_other_suffixes_are_refused(write):
    error = failure(write("a.xlsx", b"x"))
    assert ".xlsx" in error.what and ".jsonl" in str(error) and ".parquet" in str(error)


def test_an_unreadable_file_is_one_error(tmp_path):
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    assert failure(f"{tmp_path}/*.jsonl").where == f"{tmp_path}/*.jsonl"


def test_hub_reads_through_datasets(write, tmp_path):
    """`datasets` takes a folder for a dataset's name, so the real loader runs without a network."""
    write("set/train.jsonl", [{"q": "one"}, {"q": "two"}])
    code = (
        "import sys; from llmscale.data.sources import content_of, read_records\n"
        "named, files = content_of(sys.argv[1] + ':train')\n"
        "print(named, sum(f.stat().st_size for f in files) > 0)\n"
        "for r in read_records(sys.argv[1], {'prompt': 'q'}): print(r.where, dict(r.fields))\n"
        "try: list(read_records('hub:nobody/nothing:test', {}))\n"
        "except Exception as e: print(type(e).__name__, e.where, e.what, e.fix)"
    )
    source = f"hub:{tmp_path}/set"
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    out = subprocess.run([sys.executable, "-c", code, source], env=env, capture_output=True, text=True)
    lines = out.stdout.splitlines()
    assert lines.pop(0) == f"{source}:train True", out.stderr
    assert lines[:2] == [f"{source}:item 1 {{'prompt': 'one'}}", f"{source}:item 2 {{'prompt': 'two'}}"], out.stderr
    assert lines[2].startswith("DataError hub:nobody/nothing:test the dataset cannot be loaded")
