from __future__ import annotations

import time

import numpy as np
import pytest

from llmscale.batch import RankedExample, TokenExample
from llmscale.data.config import DataConfig
from llmscale.data.examples import JoinedExamples, ListedExamples, RankedExamples, TokenExamples, joined
from llmscale.data.splits import load_conversations, load_prompts, load_rankings, load_text

CHATS = [{"prompt": f"Q{i}", "completion": "A" * i} for i in range(1, 6)]


def test_a_sequence_like_any_other():
    letters = joined([ListedExamples(list(part), len) for part in ("abc", "d", "", "ef")])
    assert list(letters) == list("abcdef") and len(letters) == 6
    assert (letters[0], letters[3], letters[-1], letters[np.int64(4)]) == ("a", "d", "f", "e")
    assert letters[1:4] == ["b", "c", "d"] and letters[::-2] == ["f", "d", "b"] and letters[9:] == []
    for index in (6, -7):
        with pytest.raises(IndexError):
            letters[index]
    assert letters.lengths.tolist() == [1] * 6
    assert not joined([]) and len(joined([]).lengths) == 0
    assert isinstance(joined([letters, letters]), JoinedExamples) and joined([letters]) is letters


def test_sequences_and_their_masks():
    arrays = {
        "tokens": np.arange(10, dtype=np.uint16),
        "mask": np.arange(10) % 2 == 1,
        "offsets": np.array([0, 3, 4, 10]),
    }
    examples = TokenExamples(arrays, np.array([2, 0]))
    assert [e.token_ids.tolist() for e in examples] == [[4, 5, 6, 7, 8, 9], [0, 1, 2]]
    assert examples[1].loss_mask.tolist() == [False, True, False] and examples[1].position_ids is None
    assert (examples[0].token_ids.dtype, examples[0].loss_mask.dtype) == (np.int64, np.bool_)
    assert examples.lengths.tolist() == [6, 3]
    examples[1].token_ids[:] = 9  # a copy
    assert examples[1].token_ids.tolist() == [0, 1, 2]


def test_rankings_of_several_sizes():
    arrays = {
        "tokens": np.arange(12, dtype=np.int32),
        "offsets": np.array([0, 3, 4, 8, 10, 12]),
        "groups": np.array([0, 2, 5]),
        "ranks": np.array([1, 2, 1, 1, 3]),
        "ratings": np.array([np.nan, np.nan, 0.5, 0.5, -2.0]),
    }
    examples = RankedExamples(arrays, np.array([0, 1]))
    assert [[s.tolist() for s in e.sequences] for e in examples] == [
        [[0, 1, 2], [3]],
        [[4, 5, 6, 7], [8, 9], [10, 11]],
    ]
    assert [e.ranks for e in examples] == [(1, 2), (1, 1, 3)] and type(examples[0].ranks[0]) is int
    assert [e.ratings for e in examples] == [None, (0.5, 0.5, -2.0)]
    assert all(s.dtype == np.int64 for e in examples for s in e.sequences)
    assert examples.lengths.tolist() == [4, 8]
    assert RankedExamples(arrays, np.array([1]))[0].ranks == (1, 1, 3)


def tokens_of(example) -> int:
    return sum(map(len, example.sequences)) if isinstance(example, RankedExample) else len(example.token_ids)


@pytest.mark.parametrize("validation_fraction", [0.0, 0.4])
def test_lengths_are_those_of_the_examples(write, tokenizer, cache, validation_fraction):
    def config(records):
        return DataConfig(train=write("a.jsonl", records), max_seq_len=50, validation_fraction=validation_fraction)

    rankings = [{"prompt": "Q", "completions": ["A" * i, "B"], "ranks": [1, 2]} for i in range(1, 6)]
    splits = [
        load_conversations(config(CHATS), tokenizer, cache),
        load_rankings(config(rankings), tokenizer, cache),
        load_text(config([{"text": "the dog " * i} for i in range(1, 40, 7)]), tokenizer, cache),
        load_prompts(config(CHATS), tokenizer, 8),
    ]
    for split in splits:
        for part in (split.train, split.validation):
            assert part.lengths.dtype == np.int64
            assert part.lengths.tolist() == [tokens_of(example) for example in part]
        assert len(split.train) and bool(len(split.validation)) == bool(validation_fraction)


def test_an_example_is_read_in_microseconds():
    lengths = np.full(20_000, 500)
    arrays = {
        "tokens": np.zeros(lengths.sum(), dtype=np.uint16),
        "mask": np.zeros(lengths.sum(), dtype=bool),
        "offsets": np.cumsum([0, *lengths]),
    }
    examples = TokenExamples(arrays, np.arange(20_000))
    started = time.process_time()
    made = [examples[i] for i in range(0, 20_000, 10)]
    assert isinstance(made[0], TokenExample)
    assert (time.process_time() - started) / len(made) < 100e-6, "it takes 3 on an idle machine"
