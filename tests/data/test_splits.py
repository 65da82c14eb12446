from __future__ import annotations

import numpy as np
import pytest

from llmscale.data.config import DataConfig, TooLong
from llmscale.data.splits import load_conversations, load_prompts, load_rankings, load_text
from llmscale.data.tokenizer import train_tokenizer
from llmscale.errors import DataError


def questions(count: int) -> list[dict[str, str]]:
    return [{"question": f"Q{i}", "answer": f"A{i}"} for i in range(count)]


def test_held_out_records_are_the_same_every_time_and_in_no_other_part(write, tokenizer):
    config = DataConfig(train=write("a.jsonl", questions(40)), validation_fraction=0.1)
    splits = [load_prompts(config, tokenizer, 8) for _ in range(2)]
    train, validation = ([p.text for p in part] for part in (splits[0].train, splits[0].validation))
    assert len(validation) == 4 and sorted(train + validation) == sorted(f"Q{i}" for i in range(40))
    assert validation == [p.text for p in splits[1].validation]
    assert validation != [f"Q{i}" for i in range(36, 40)] and train == sorted(train, key=lambda q: int(q[1:]))


def test_a_validation_source_is_read_as_it_is(write, tokenizer, cache):
    config = DataConfig(train=write("a.jsonl", questions(5)), validation=write("b.jsonl", questions(2)))
    split = load_conversations(config, tokenizer, cache)
    assert (len(split.train), len(split.validation)) == (5, 2)
    assert split.report["records"] == 5 and split.report["validation_records"] == 2


def test_without_validation_there_is_none(write, tokenizer, cache):
    split = load_conversations(DataConfig(train=write("a.jsonl", questions(5)), max_records=3), tokenizer, cache)
    assert len(split.train) == 3 and not split.validation
    assert not any(name.startswith("validation") for name in split.report)


def test_a_small_fraction_holds_out_one_and_one_record_cannot_be_held_out(write, tokenizer):
    config = DataConfig(train=write("a.jsonl", questions(3)), validation_fraction=0.01)
    assert [len(part) for part in (lambda s: (s.train, s.validation))(load_prompts(config, tokenizer, 8))] == [2, 1]
    config.max_records = 1
    with pytest.raises(DataError, match="single record"):
        load_prompts(config, tokenizer, 8)


def test_documents_are_held_out_whole(write, tokenizer, cache):
    path = write("a.jsonl", [{"text": c * 9} for c in "abcdefgh"])
    split = load_text(DataConfig(train=path, validation_fraction=0.25, max_seq_len=1000), tokenizer, cache)
    texts = [tokenizer.decode(np.concatenate([b.token_ids for b in part])) for part in (split.train, split.validation)]
    assert sorted(c for text in texts for c in text.split("<|eos|>") if c) == [c * 9 for c in "abcdefgh"]
    assert texts[1].count("<|eos|>") == 2
    assert split.report["tokens"] == sum(len(b.token_ids) for b in split.train)


def test_the_end_of_a_single_document_is_held_out(write, tokenizer, cache):
    split = load_text(
        DataConfig(train=write("a.txt", "0123456789" * 10), validation_fraction=0.1, max_seq_len=91), tokenizer, cache
    )
    assert [tokenizer.decode(p[0].token_ids) for p in (split.train, split.validation)] == [
        "0123456789" * 9 + "0",
        "123456789<|eos|>",
    ]


def test_raw_text_needs_its_column(write, tokenizer, cache):
    path = write("a.jsonl", [{"text": "x"}, {"body": "x"}])
    with pytest.raises(DataError) as caught:
        load_text(DataConfig(train=path), tokenizer, cache)
    assert caught.value.where == f"{path}:2" and "'text'" in caught.value.what


def test_dropped_records_are_warned_about(write, tokenizer, caplog, cache):
    path = write("a.jsonl", [*questions(2), {"question": "Q", "answer": "x" * 99}, {"question": "Q", "answer": ""}])
    split = load_conversations(DataConfig(train=path, max_seq_len=20), tokenizer, cache)
    assert (split.report["dropped_too_long"], split.report["dropped_empty"], len(split.train)) == (1, 1, 2)
    assert (
        "1 longer than 20 tokens were dropped" in caplog.text
        and path in caplog.text
        and "without an answer" in caplog.text
    )


def test_nothing_left_to_train_on_is_an_error(write, tokenizer, cache):
    path = write("a.jsonl", questions(4))
    with pytest.raises(DataError, match="none of the 4 records is left") as caught:
        load_conversations(DataConfig(train=path, max_seq_len=4), tokenizer, cache)
    assert caught.value.where == path and "data.max_seq_len" in str(caught.value)


# ---------------------------------------------------------------- real data


@pytest.fixture(scope="module")
def real_tokenizer(shared_data):
    text = (shared_data / "pretrain/tinyshakespeare.txt").read_text()
    return train_tokenizer(iter(text.split("\n\n")[:2000]), 512, 256)


@pytest.mark.realdata
def test_tinyshakespeare(shared_data, real_tokenizer, cache):
    path = shared_data / "pretrain/tinyshakespeare.txt"
    split = load_text(DataConfig(train=str(path), validation_fraction=0.1), real_tokenizer, cache)
    tokens = np.concatenate([b.token_ids for b in (*split.train, *split.validation)])
    assert real_tokenizer.decode(tokens) == path.read_text() + "<|eos|>"
    assert 0.09 < split.report["validation_tokens"] / len(tokens) < 0.11
    assert all(len(b.token_ids) == 256 for b in split.train[:-1])


@pytest.mark.realdata
def test_web_pages(shared_data, real_tokenizer, cache):
    config = DataConfig(train=str(shared_data / "pretrain/c4_demo.jsonl"), validation_fraction=0.1, max_records=100)
    split = load_text(config, real_tokenizer, cache)
    assert (split.report["records"], split.report["validation_records"]) == (90, 10)
    for block in split.train:
        starts = np.flatnonzero(block.position_ids == 0)
        assert starts[0] == 0 and (block.token_ids[starts[1:] - 1] == real_tokenizer.eos_token_id).all()
        assert (~block.loss_mask).sum() == len(starts)


@pytest.mark.realdata
def test_instructions(shared_data, real_tokenizer, cache):
    config = DataConfig(train=str(shared_data / "instruct/alpaca_en_demo.json"), max_seq_len=4096)
    split = load_conversations(config, real_tokenizer, cache)
    assert len(split.train) == 999
    example = split.train[0]
    learned = real_tokenizer.decode(example.token_ids[example.loss_mask])
    assert learned.startswith("Making crepes is an easy") and learned.endswith("<|eos|>")
    assert real_tokenizer.decode(example.token_ids).startswith(
        "<|user|>Describe a process of making crepes.<|eos|><|assistant|>Making"
    )


@pytest.mark.realdata
def test_preferences(shared_data, real_tokenizer, cache):
    config = DataConfig(
        train=str(shared_data / "preference/dpo_en_demo.json"), max_seq_len=512, too_long=TooLong.truncate
    )
    split = load_rankings(config, real_tokenizer, cache)
    report = split.report
    assert len(split.train) + report["dropped_too_long"] == 300 and report["truncated"] > 0
    assert all(e.ranks == (1, 2) and not np.array_equal(e.sequences[0], e.sequences[1]) for e in split.train)


@pytest.mark.realdata
def test_math_problems(shared_data, real_tokenizer):
    config = DataConfig(train=str(shared_data / "math/gsm8k_train.jsonl"), max_seq_len=1024, max_records=500)
    split = load_prompts(config, real_tokenizer, max_completion_tokens=256)
    assert len(split.train) == 500
    assert split.train[0].fields["answer"].endswith("#### 72") and "question" not in split.train[0].fields
    assert split.train[0].text.startswith("Natalia sold clips")
