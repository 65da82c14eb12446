from __future__ import annotations

import pytest

from llmscale.data.chat import ChatRenderer
from llmscale.data.config import DataConfig, TooLong
from llmscale.data.prompts import prompt_draft, room_for_prompts
from llmscale.data.report import Report
from llmscale.errors import ConfigError, DataError

from .conftest import examples_of


def made(tokenizer, *records, room: int = 10, **config):
    renderer, config = ChatRenderer(tokenizer), DataConfig(train="x", **config)
    limit = room_for_prompts(config, room)
    return examples_of(tokenizer, lambda record: prompt_draft(record, config, renderer, limit), records)


def test_prompts_carry_tokens_text_and_the_other_columns(tokenizer):
    (prompt,), report = made(tokenizer, {"question": "Q", "answer": "4", "level": 2})
    assert tokenizer.decode(prompt.token_ids) == "<|user|>Q<|eos|><|assistant|>"
    assert prompt.text == "Q" and prompt.fields == {"answer": "4", "level": 2}
    assert report == Report(records=1)


def test_a_dialogue_reads_as_one_and_loses_its_last_answer(tokenizer):
    talk = [{"from": w, "value": v} for w, v in (("human", "Q"), ("gpt", "A"), ("human", "R"), ("gpt", "no"))]
    (prompt,), _ = made(tokenizer, {"conversations": talk}, system_prompt="S")
    assert prompt.text == "system: S\n\nuser: Q\n\nassistant: A\n\nuser: R"
    assert tokenizer.decode(prompt.token_ids).endswith("<|user|>R<|eos|><|assistant|>")
    assert [(m["role"], m["content"]) for m in prompt.messages] == [
        *(("system", "S"), ("user", "Q")),
        *(("assistant", "A"), ("user", "R")),
    ]


def test_a_prompt_that_leaves_no_room_is_an_error_unless_dropped(tokenizer):
    records = {"prompt": "Q"}, {"prompt": "XXXX"}  # 4 and 7 tokens
    assert len(made(tokenizer, *records, max_seq_len=17)[0]) == 2
    with pytest.raises(DataError, match="7 tokens, there is room for 6") as caught:
        made(tokenizer, *records, max_seq_len=16)
    assert caught.value.where == "f:2"
    kept, report = made(tokenizer, *records, max_seq_len=16, too_long=TooLong.drop)
    assert [p.text for p in kept] == ["Q"] and report == Report(records=2, dropped_too_long=1)


def test_impossible_settings_are_refused(tokenizer):
    with pytest.raises(ConfigError) as caught:
        made(tokenizer, {"prompt": "Q"}, max_seq_len=10)
    assert caught.value.where == "data.max_seq_len"
    with pytest.raises(ConfigError) as caught:
        made(tokenizer, {"prompt": "Q"}, too_long=TooLong.truncate)
    assert caught.value.where == "data.too_long"


def test_a_record_without_prompt_is_named(tokenizer):
    with pytest.raises(DataError, match="no conversation") as caught:
        made(tokenizer, {"text": "Q"})
    assert caught.value.where == "f:1" and "data.columns.prompt=" in str(caught.value)
