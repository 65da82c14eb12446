from __future__ import annotations

import pytest

from llmscale.data.chat import ChatRenderer
from llmscale.data.config import DataConfig, TooLong
from llmscale.data.conversations import conversation, conversation_draft, question
from llmscale.data.records import Record
from llmscale.data.report import Report
from llmscale.errors import DataError

from .conftest import examples_of

CONFIG = DataConfig(train="x")


def turns(fields, **config) -> list[tuple[str, str]]:
    made = conversation(Record(fields, "f:7"), DataConfig(train="x", **config))
    return [(m["role"], m["content"]) for m in made]


def failure(fields) -> DataError:
    with pytest.raises(DataError) as caught:
        conversation(Record(fields, "f:7"), CONFIG)
    assert caught.value.where == "f:7"
    return caught.value


QA = [("user", "Q"), ("assistant", "A")]
ROLE_CONTENT = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
FROM_VALUE = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": ROLE_CONTENT},
        {"conversations": FROM_VALUE},
        {"instruction": "Q", "output": "A"},
        {"instruction": "Q", "input": "", "output": "A"},
        {"instruction": "Q", "input": None, "output": "A"},
        {"prompt": "Q", "completion": "A"},
        {"prompt": ROLE_CONTENT[:1], "completion": "A"},
        {"question": "Q", "answer": "A", "id": 3},
        {"prompt": "not these", "messages": ROLE_CONTENT},
    ],
)
def test_every_shape_says_the_same(fields):
    assert turns(fields) == QA


def test_input_goes_under_the_instruction():
    assert turns({"instruction": "Q", "input": "I", "output": "A"})[0] == ("user", "Q\n\nI")


def test_mapped_columns_come_first():
    fields = {"messages": ROLE_CONTENT, "prompt": "P", "completion": "C"}
    assert turns(fields, columns={"prompt": "x", "completion": "y"}) == [("user", "P"), ("assistant", "C")]


def test_system_messages():
    system = ("system", "S")
    assert turns({"messages": [{"role": "system", "content": "S"}, *ROLE_CONTENT]}) == [system, *QA]
    assert turns({"question": "Q", "answer": "A"}, system_prompt="S") == [system, *QA]
    assert turns({"question": "Q", "answer": "A", "system": "S"}, system_prompt="T") == [system, *QA]
    assert turns({"question": "Q", "answer": "A", "system": ""}) == QA
    own = [{"from": "system", "value": "S"}, *FROM_VALUE]
    assert turns({"conversations": own}, system_prompt="T") == [system, *QA]


def test_a_tool_may_speak_between_two_answers():
    own = [*ROLE_CONTENT, {"role": "tool", "content": "T"}, {"role": "assistant", "content": "B"}]
    assert turns({"messages": own}) == [*QA, ("tool", "T"), ("assistant", "B")]


def test_an_unanswered_question_at_the_end_is_left_out():
    assert turns({"messages": [*ROLE_CONTENT, {"role": "user", "content": "R"}]}) == QA


def test_what_is_wrong_is_named():
    error = failure({"instuction": "Q", "output": "A"})
    assert "instruction+output" in error.what and "instuction, output" in str(error)
    assert "'oracle'" in failure({"messages": [{"role": "oracle", "content": "x"}]}).what
    assert "messages[1]" in failure({"messages": [ROLE_CONTENT[0], {"role": "assistant"}]}).what
    assert "not text" in failure({"messages": [{"role": "user", "content": [{"type": "text"}]}]}).what
    assert "list of turns" in failure({"conversations": []}).what
    assert "'answer' must be text, is int" in failure({"question": "Q", "answer": 4}).what
    with pytest.raises(DataError, match="no user's turn"):
        question(Record({"messages": [{"role": "system", "content": "x"}]}, "f:7"), CONFIG)


def examples(tokenizer, *records, **config):
    renderer, config = ChatRenderer(tokenizer), DataConfig(train="x", **config)
    return examples_of(tokenizer, lambda record: conversation_draft(record, config, renderer), records)


SHORT, LONG = {"question": "Q", "answer": "A"}, {"question": "Q", "answer": "ABCDEFGHIJ"}  # 6 and 15 tokens


def test_examples_are_counted(tokenizer):
    made, report = examples(tokenizer, SHORT, LONG, {"question": "Q", "answer": " "})
    assert [len(e.token_ids) for e in made] == [6, 15]
    assert report == Report(records=3, dropped_empty=1)


def test_too_long_records(tokenizer):
    made, report = examples(tokenizer, LONG, SHORT, max_seq_len=14)
    assert [len(e.token_ids) for e in made] == [6]
    assert report == Report(records=2, dropped_too_long=1)

    made, report = examples(tokenizer, LONG, max_seq_len=6, too_long=TooLong.truncate)
    assert tokenizer.decode(made[0].token_ids) == "<|user|>Q<|eos|><|assistant|>AB"
    assert made[0].loss_mask.tolist() == [False] * 4 + [True] * 2
    assert report == Report(records=1, truncated=1)

    made, report = examples(tokenizer, LONG, max_seq_len=4, too_long=TooLong.truncate)
    assert made == [] and report.dropped_too_long == 1  # no answer is left

    with pytest.raises(DataError, match=r"15 tokens, data\.max_seq_len is 14") as caught:
        examples(tokenizer, SHORT, LONG, max_seq_len=14, too_long=TooLong.error)
    assert caught.value.where == "f:2"


def test_errors_of_the_template_name_the_record(tokenizer):
    tokenizer.chat_template = "{% if messages[0].content == 'bad' %}{{ raise_exception('no') }}{% endif %}" + (
        tokenizer.chat_template
    )
    with pytest.raises(DataError, match="refuses") as caught:
        examples(tokenizer, SHORT, {"question": "bad", "answer": "A"})
    assert caught.value.where == "f:2"
