"""Solutions whose steps are labelled: where a step's label stands, and what is refused."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from llmscale.data.chat import ChatRenderer
from llmscale.data.config import DataConfig, TooLong
from llmscale.data.report import Report
from llmscale.data.solutions import solution_draft
from llmscale.data.splits import load_solutions
from llmscale.errors import DataError
from llmscale.steps import StepFinder

from .conftest import examples_of


def judged(tokenizer, *records, **config):
    renderer, config, finder = ChatRenderer(tokenizer), DataConfig(train="x", **config), StepFinder(tokenizer)
    return examples_of(tokenizer, lambda record: solution_draft(record, config, renderer, finder), records)


def failure(tokenizer, **fields) -> DataError:
    with pytest.raises(DataError) as caught:
        judged(tokenizer, {"prompt": "Q", "steps": ["a"], "labels": [True]}, {"prompt": "Q", **fields})
    assert caught.value.where == "f:2"
    return caught.value


def labelled(tokenizer, example) -> dict[str, float]:
    """The text up to and with each labelled token, after the prompt -> its label."""
    ends = np.flatnonzero(~np.isnan(example.labels))
    texts = [tokenizer.decode(example.token_ids[: end + 1]).partition("<|assistant|>")[2] for end in ends]
    return dict(zip(texts, example.labels[ends].tolist(), strict=True))


def test_a_label_stands_at_the_last_token_of_its_step(tokenizer):
    (example,), report = judged(tokenizer, {"prompt": "Q", "steps": ["1+1=2", "2+2=5"], "labels": [True, 0]})
    assert labelled(tokenizer, example) == {"1+1=2\n": 1.0, "1+1=2\n2+2=5<|eos|>": 0.0}
    assert example.labels.dtype == np.float32 and len(example.labels) == len(example.token_ids)
    assert report == Report(records=1)


def test_steps_that_nobody_judged_have_no_label_and_soft_ones_stay(tokenizer):
    (example,), _ = judged(tokenizer, {"prompt": "Q", "steps": ["a", "b", "c"], "labels": [0.25, None, 1]})
    assert labelled(tokenizer, example) == {"a\n": 0.25, "a\nb\nc<|eos|>": 1.0}
    made, report = judged(tokenizer, {"prompt": "Q", "steps": ["a"], "labels": [None]})
    assert made == [] and report.dropped_empty == 1


def test_a_line_break_inside_a_step_becomes_a_space(tokenizer):
    (example,), _ = judged(tokenizer, {"prompt": "Q", "steps": ["a\n\n b ", "c\n"], "labels": [1, 0]})
    assert labelled(tokenizer, example) == {"a b\n": 1.0, "a b\nc<|eos|>": 0.0}


def test_only_the_last_turn_has_steps(tokenizer):
    talk = [{"from": who, "value": what} for who, what in (("human", "Q"), ("gpt", "x\ny"), ("human", "R"))]
    (example,), _ = judged(tokenizer, {"conversations": talk, "steps": ["a", "b"], "labels": [0, 1]})
    ends = np.flatnonzero(~np.isnan(example.labels))
    assert [tokenizer.decode(example.token_ids[: end + 1]).rpartition("<|assistant|>")[2] for end in ends] == [
        "a\n",
        "a\nb<|eos|>",
    ]


def test_what_was_trained_on_is_found_again_in_what_is_sampled(tokenizer):
    """The rule at the reward sees tokens alone, without the record."""
    steps = ["the cat sat", "on the mat", "the dog"]
    (example,), _ = judged(tokenizer, {"prompt": "what\nis", "steps": steps, "labels": [1, 0, 1]})
    text = tokenizer.decode(example.token_ids)
    start = len(tokenizer(text.partition("<|assistant|>")[0] + "<|assistant|>")["input_ids"])
    own = np.arange(len(example.token_ids)) >= start
    assert StepFinder(tokenizer).ends(example.token_ids, own) == np.flatnonzero(~np.isnan(example.labels)).tolist()


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", []),
        ("\n\n", []),
        ("a", ["a"]),
        ("a\n", ["a\n"]),
        ("a\n\n\nb", ["a\n", "\n\nb"]),
        ("\na\n b\n", ["\na\n", " b\n"]),
        ("a\n<|eos|>", ["a\n"]),
        ("a\nb<|eos|>", ["a\n", "b<|eos|>"]),
    ],
)
def test_steps_of_a_completion(tokenizer, text, steps):
    ids = np.array(tokenizer(text)["input_ids"], dtype=np.int64)
    prompt = np.array(tokenizer("one\ntwo")["input_ids"])
    sequence = np.concatenate([prompt, ids]).astype(np.int64)
    ends = StepFinder(tokenizer).ends(sequence, np.arange(len(sequence)) >= len(prompt))
    cuts = [len(prompt), *(end + 1 for end in ends)]
    assert [tokenizer.decode(sequence[a:b]) for a, b in pairwise(cuts)] == steps


def test_a_token_that_holds_a_break_and_more_ends_one_step_and_begins_another(tokenizer):
    tokenizer.add_tokens([";\n*"])
    ids = np.array(tokenizer("a;\n*")["input_ids"])
    assert len(ids) == 2 and StepFinder(tokenizer).ends(ids, np.ones(2, dtype=bool)) == [1, 1]


def test_what_does_not_fit_is_refused(tokenizer):
    assert "2 steps and 1 labels" in failure(tokenizer, steps=["a", "b"], labels=[1]).what
    assert "'steps'" in failure(tokenizer, labels=[1]).what
    assert "'labels'" in failure(tokenizer, steps=["a"]).what
    assert "list of texts" in failure(tokenizer, steps="a", labels=[1]).what
    assert "list of texts" in failure(tokenizer, steps=[], labels=[]).what
    assert "must be a list" in failure(tokenizer, steps=["a"], labels=True).what
    assert "steps[1] is empty" in failure(tokenizer, steps=["a", " \n"], labels=[1, 1]).what
    for label in (-1, 2, "+", math.nan, [1]):
        error = failure(tokenizer, steps=["a"], labels=[label])
        assert "true, false, null" in error.what and "-1 is false" in str(error.fix)


def test_long_solutions(tokenizer):
    long = {"prompt": "Q", "steps": ["a", "bbbbbbbb"], "labels": [1, 0]}
    assert judged(tokenizer, long, max_seq_len=8)[1] == Report(records=1, dropped_too_long=1)
    (example,), report = judged(tokenizer, long, max_seq_len=8, too_long=TooLong.truncate)
    assert labelled(tokenizer, example) == {"a\n": 1.0} and report == Report(records=1, truncated=1)
    made, report = judged(tokenizer, long, max_seq_len=4, too_long=TooLong.truncate)
    assert made == [] and report.dropped_too_long == 1
    with pytest.raises(DataError, match=r"data\.max_seq_len is 8"):
        judged(tokenizer, long, max_seq_len=8, too_long=TooLong.error)


def test_from_a_file_through_the_cache_with_other_names_of_columns(write, tokenizer, cache):
    records = [{"question": f"Q{i}", "completions": ["a", "b"], "labels": [True, i % 2 == 0]} for i in range(5)]
    config = DataConfig(train=write("a.jsonl", records), columns={"steps": "completions"}, validation_fraction=0.2)
    for _ in range(2):
        split = load_solutions(config, tokenizer, cache)
        assert (len(split.train), len(split.validation)) == (4, 1)
        for example in split.train:
            values = list(labelled(tokenizer, example).values())
            assert values[0] == 1.0 and values[1] in (0.0, 1.0)
        assert split.train.lengths.tolist() == [len(e.token_ids) for e in split.train]
