from __future__ import annotations

import pytest

from llmscale.data.chat import ChatRenderer
from llmscale.data.config import DataConfig, TooLong
from llmscale.data.preferences import ranking_draft
from llmscale.data.report import Report
from llmscale.errors import DataError

from .conftest import examples_of


def ranked(tokenizer, *records, **config):
    renderer, config = ChatRenderer(tokenizer), DataConfig(train="x", **config)
    return examples_of(tokenizer, lambda record: ranking_draft(record, config, renderer), records)


def failure(tokenizer, fields, **config) -> str:
    with pytest.raises(DataError) as caught:
        ranked(tokenizer, {"prompt": "Q", "chosen": "A", "rejected": "B"}, fields, **config)
    assert caught.value.where == "f:2"
    return caught.value.what


def spelled(tokenizer, example) -> list[str]:
    return [tokenizer.decode(s) for s in example.sequences]


PAIR = ["<|user|>Q<|eos|><|assistant|>A<|eos|>", "<|user|>Q<|eos|><|assistant|>B<|eos|>"]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        {"question": "Q", "chosen": "A", "rejected": "B"},
        {"instruction": "Q", "input": "", "chosen": "A", "rejected": "B"},
        {"messages": [{"role": "user", "content": "Q"}], "chosen": "A", "rejected": "B"},
        {
            "conversations": [{"from": "human", "value": "Q"}],
            "chosen": {"from": "gpt", "value": "A"},
            "rejected": {"role": "assistant", "content": "B"},
        },
    ],
)
def test_pairs_of_every_shape(tokenizer, fields):
    (example,), report = ranked(tokenizer, fields)
    assert spelled(tokenizer, example) == PAIR and example.ranks == (1, 2)
    assert report == Report(records=1)


def test_a_conversation_of_several_turns(tokenizer):
    talk = [{"from": who, "value": what} for who, what in (("human", "Q"), ("gpt", "X"), ("human", "R"))]
    (example,), _ = ranked(tokenizer, {"conversations": talk, "chosen": "A", "rejected": "B"}, system_prompt="S")
    said = "<|system|>S<|eos|><|user|>Q<|eos|><|assistant|>X<|eos|><|user|>R<|eos|><|assistant|>"
    assert spelled(tokenizer, example) == [f"{said}A<|eos|>", f"{said}B<|eos|>"]


def test_rankings_of_k_with_ties(tokenizer):
    made, report = ranked(
        tokenizer,
        {"prompt": "Q", "completions": ["A", "B", "C"], "ranks": [2, 1, 2]},
        {"prompt": "Q", "completions": ["A", "B"], "ranks": [1, 1]},
    )
    assert [e.ranks for e in made] == [(2, 1, 2), (1, 1)]
    assert [len(e.sequences) for e in made] == [3, 2]
    assert report.tied == 1 and report.records == 2


def test_rankings_that_rank_nothing_are_refused(tokenizer):
    assert "has 1" in failure(tokenizer, {"prompt": "Q", "completions": ["A"], "ranks": [1]})
    assert "has 10" in failure(tokenizer, {"prompt": "Q", "completions": ["A"] * 10, "ranks": [1] * 10})
    assert "2 completions and 3 ranks" in failure(
        tokenizer, {"prompt": "Q", "completions": ["A", "B"], "ranks": [1, 2, 3]}
    )
    for ranks in ([0, 1], [1, True], [1, 1 << 63], [1, 2.0], ["1", "2"]):
        assert "whole numbers" in failure(tokenizer, {"prompt": "Q", "completions": ["A", "B"], "ranks": ranks})
    assert "'ranks'" in failure(tokenizer, {"prompt": "Q", "completions": ["A", "B"]})
    assert "must be a list" in failure(tokenizer, {"prompt": "Q", "completions": "AB", "ranks": [1, 2]})


def test_what_is_missing_or_misplaced_is_named(tokenizer):
    assert "neither chosen and rejected" in failure(tokenizer, {"prompt": "Q", "good": "A", "bad": "B"})
    assert "'rejected'" in failure(tokenizer, {"prompt": "Q", "chosen": "A"})
    user = {"role": "user", "content": "A"}
    assert "chosen must be the assistant's" in failure(tokenizer, {"prompt": "Q", "chosen": user, "rejected": "B"})
    ended = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert "ends with the assistant" in failure(tokenizer, {"messages": ended, "chosen": "A", "rejected": "B"})


def test_too_long_rankings(tokenizer):
    late = {"prompt": "Q", "chosen": "AXXXX", "rejected": "BXXXXXX"}  # differ at the fifth token
    assert ranked(tokenizer, late, max_seq_len=11)[1] == Report(records=1, dropped_too_long=1)
    (example,), report = ranked(tokenizer, late, max_seq_len=5, too_long=TooLong.truncate)
    assert spelled(tokenizer, example) == [f"<|user|>Q<|eos|><|assistant|>{x}" for x in "AB"]
    assert report == Report(records=1, truncated=1)
    made, report = ranked(tokenizer, late, max_seq_len=4, too_long=TooLong.truncate)
    assert made == [] and report.dropped_too_long == 1  # nothing tells them apart
    assert "12 tokens" in failure(tokenizer, late, max_seq_len=11, too_long=TooLong.error)


def test_a_pair_can_say_by_how_much(tokenizer):
    made, _ = ranked(
        tokenizer,
        {"prompt": "Q", "chosen": "A", "rejected": "B", "margin": 2},
        {"prompt": "Q", "chosen": "A", "rejected": "B", "margin": None},
    )
    assert [e.ratings for e in made] == [(2.0, 0.0), None]
    for margin in (-1, "2", float("inf"), True):
        fields = {"prompt": "Q", "chosen": "A", "rejected": "B", "margin": margin}
        assert "column 'margin' must be a number" in failure(tokenizer, fields)


def test_ratings_rank_with_ties(tokenizer):
    """Free scores of one channel: equal ones are tied, the order has no gaps."""
    (example,), _ = ranked(tokenizer, {"prompt": "Q", "completions": ["A", "B", "C", "D"], "ratings": [3, 4.5, 3, -1]})
    assert example.ranks == (2, 1, 2, 3) and example.ratings == (3.0, 4.5, 3.0, -1.0)
    _, report = ranked(tokenizer, {"prompt": "Q", "completions": ["A", "B"], "ratings": [7, 7]})
    assert report.tied == 1


def test_ranks_and_ratings_together_must_agree(tokenizer):
    fields = {"prompt": "Q", "completions": ["A", "B", "C"], "ranks": [1, 2, 2], "ratings": [5, 5, 1]}
    (example,), _ = ranked(tokenizer, fields)
    assert example.ranks == (1, 2, 2) and example.ratings == (5.0, 5.0, 1.0)
    what = failure(tokenizer, fields | {"ratings": [5, 6, 1]})
    assert "completion 0 has rank 1 and rating 5" in what and "completion 1 2 and 6" in what
    for ratings in ([1, 2], [1, 2, None], [1, 2, float("nan")], [1, 2, True]):
        assert "3 finite numbers" in failure(tokenizer, fields | {"ratings": ratings})
