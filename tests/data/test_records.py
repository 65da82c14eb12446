"""Malformed records, through the loaders that meet them."""

from __future__ import annotations

import pytest

from llmscale.data.config import DataConfig, OnCorrupt
from llmscale.data.splits import Split, load_conversations, load_prompts, load_rankings, load_text
from llmscale.data.text import read_texts
from llmscale.errors import DataError

GOOD = '{"prompt": "Q", "completion": "A"}'


def skipping(path: str, **config) -> DataConfig:
    return DataConfig(train=path, on_corrupt=OnCorrupt.skip, **config)


def counts(split: Split) -> tuple[int, int, float]:
    return len(split.train), split.report["records"], split.report["skipped_corrupt"]


@pytest.mark.parametrize(
    "bad",
    [
        "{oops",
        "3",
        '{"prompt": "Q", "completion": "\\ud800"}',
        '{"prompt": "Q"}',
        '{"prompt": 3, "completion": "A"}',
        '{"messages": [{"role": "user"}]}',
        b'{"prompt": "\xff", "completion": "A"}',
    ],
)
def test_a_malformed_record_is_an_error_or_left_out_and_counted(write, tokenizer, cache, caplog, bad):
    bad = bad if isinstance(bad, bytes) else bad.encode()
    path = write("a.jsonl", b"\n".join([GOOD.encode(), bad, bad, GOOD.encode()]))
    with pytest.raises(DataError) as caught:
        load_conversations(DataConfig(train=path), tokenizer, cache)
    assert caught.value.where == f"{path}:2"
    for _ in ("read", "from the cache"):
        caplog.clear()
        assert counts(load_conversations(skipping(path), tokenizer, cache)) == (2, 2, 2)
        (warning,) = caplog.messages
        assert warning.startswith(f"{path}: 2 malformed records were skipped, the first at {path}:2: ")
        assert caught.value.what in warning


def test_a_copy_elsewhere_is_named_by_its_own_place(write, tokenizer, cache, caplog):
    for name in ("a.jsonl", "b.jsonl"):
        path = write(name, f"{GOOD}\n{{oops\n")
        load_conversations(skipping(path), tokenizer, cache)
        assert f"the first at {path}:2: " in caplog.messages[-1]


def test_other_kinds_of_data_skip_what_is_malformed_for_them(write, tokenizer, cache):
    rankings = [{"prompt": "Q", "completions": c, "ranks": [1, 2][: len(c)]} for c in (["A"], ["A", "B"], ["A", 3])]
    path = write("rankings.jsonl", rankings)
    assert counts(load_rankings(skipping(path), tokenizer, cache)) == (1, 1, 2)
    path = write("prompts.jsonl", [{"prompt": []}, {"prompt": "Q"}])
    assert counts(load_prompts(skipping(path), tokenizer, 8)) == (1, 1, 1)
    path = write("texts.jsonl", [{"text": None}, {"text": "the cat"}, {"body": "x"}])
    assert counts(load_text(skipping(path), tokenizer, cache)) == (1, 1, 2)
    assert list(read_texts(skipping(path))) == ["the cat"]
    path = write("rows.csv", "text,n\nthe cat,1\nthe dog\n")
    assert counts(load_text(skipping(path), tokenizer, cache)) == (1, 1, 1)


def test_the_column_that_a_mapping_names_may_be_missing_in_some(write, tokenizer, cache):
    path = write("a.jsonl", [{"q": "Q", "a": "A"}, {"q": "Q"}])
    columns = {"prompt": "q", "completion": "a"}
    assert counts(load_conversations(skipping(path, columns=columns), tokenizer, cache)) == (1, 1, 1)


def test_a_file_of_nothing_else_is_an_error(write, tokenizer, cache, tmp_path):
    write("a.jsonl", [{"text": "the cat"}])
    write("b.jsonl", [{"body": "x"}, {"body": "y"}])
    with pytest.raises(DataError, match="no column 'text'") as caught:
        load_text(skipping(str(tmp_path)), tokenizer, cache)
    assert caught.value.where == f"{tmp_path}/b.jsonl:1"
    for name, content in (("c.json", "[{"), ("d.txt", b"\xff"), ("e.parquet", b"x"), ("f.jsonl", "{}\n{oops\n")):
        with pytest.raises(DataError):
            load_text(skipping(write(name, content)), tokenizer, cache)
    with pytest.raises(DataError, match="no such file"):
        load_text(skipping(f"{tmp_path}/nope.txt"), tokenizer, cache)


def test_what_is_too_long_is_not_malformed(write, tokenizer):
    path = write("a.jsonl", [{"prompt": "Q"}, {"prompt": "Q" * 99}])
    with pytest.raises(DataError, match="room for") as caught:
        load_prompts(skipping(path, max_seq_len=40), tokenizer, 8)
    assert caught.value.where == f"{path}:2"


def test_malformed_records_are_read_but_not_held_out(write, tokenizer):
    path = write("a.jsonl", "{oops\n" + "".join(f'{{"prompt": "Q{i}"}}\n' for i in range(9)) + "{oops\n")
    split = load_prompts(skipping(path, validation_fraction=0.2, max_records=9), tokenizer, 8)
    assert (len(split.train), len(split.validation)) == (6, 2)
    assert (split.report["records"], split.report["skipped_corrupt"]) == (6, 1)
    assert split.report["validation_skipped_corrupt"] == 0
