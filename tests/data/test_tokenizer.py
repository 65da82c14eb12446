from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from llmscale.data.chat import DEFAULT_CHAT_TEMPLATE
from llmscale.data.tokenizer import MIN_VOCAB_SIZE, SPECIAL_TOKENS, train_tokenizer
from llmscale.errors import ConfigError

from .conftest import CORPUS

TEXTS = [
    "the cat sat on the mat",
    "  two spaces , and .  trailing  ",
    "tabs\tand\r\nlines\n\n\n",
    "数字 12345, ünïcödé, 😀👩‍👩‍👧, e\u0301",
    "\x00\x01\x7f\ufeff\ufffd",
    "<|eos|> is spelled here <|user|>",
    "it 's n't 'll",
    "",
]


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_is_lossless(tokenizer, text):
    assert tokenizer.decode(ids(tokenizer, text)) == text


def test_digits_stand_alone():
    tokenizer = train_tokenizer(iter(["2024 2024 2024"] * 50), 400, 64)
    tokens = tokenizer.convert_ids_to_tokens(ids(tokenizer, "in 2024"))
    assert tokens[-4:] == ["2", "0", "2", "4"]


def test_merges_are_learned_up_to_the_size_asked_for(tokenizer):
    assert len(tokenizer) == 280
    # Fewer where nothing is left to merge.
    assert len(train_tokenizer(iter(CORPUS), 10_000, 64)) < 300
    assert len(ids(tokenizer, "the cat")) < len("the cat")


def test_special_tokens_come_first_and_once(tokenizer):
    assert tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS) == list(range(len(SPECIAL_TOKENS)))
    assert set(tokenizer.all_special_tokens) == set(SPECIAL_TOKENS)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert ids(tokenizer, "<|user|>") == [SPECIAL_TOKENS.index("<|user|>")]


def test_smallest_size_is_plain_bytes():
    tokenizer = train_tokenizer(iter(CORPUS), MIN_VOCAB_SIZE, 64)
    assert len(tokenizer) == 261 == MIN_VOCAB_SIZE
    assert len(ids(tokenizer, "the ü")) == len("the ü".encode())


def test_too_small_a_size_is_refused():
    with pytest.raises(ConfigError, match="at least 261") as caught:
        train_tokenizer(iter(CORPUS), MIN_VOCAB_SIZE - 1, 64)
    assert caught.value.where == "model.vocab_size"


def test_same_texts_give_the_same_tokenizer():
    made = [train_tokenizer(iter(CORPUS), 320, 64).backend_tokenizer.to_str() for _ in range(3)]
    assert made[0] == made[1] == made[2]


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == DEFAULT_CHAT_TEMPLATE
    assert loaded.model_max_length == 64
    assert set(loaded.all_special_tokens) == set(SPECIAL_TOKENS)
    assert (loaded.pad_token_id, loaded.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    for text in TEXTS:
        assert ids(loaded, text) == ids(tokenizer, text)
        assert loaded.decode(ids(loaded, text)) == text
