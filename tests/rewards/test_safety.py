"""Word lists: what is found, and what only looks like it."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmscale.config import check
from llmscale.errors import ConfigError, LlmscaleError
from llmscale.rewards.config import SafetyConfig
from llmscale.rewards.safety import fold, word_pattern
from llmscale.rewards.weighted import build_reward
from tests.tiny import tokenizer, trajectory


@pytest.mark.parametrize(
    ("word", "text", "found"),
    [
        ("ass", "an ass.", True),
        ("ass", "a class", False),
        ("ass", "ASS!", True),
        ("ass", "ass_", False),
        ("cafe", "Café", True),
        ("Café", "CAFE", True),
        ("cafe", "ｃａｆｅ", True),
        ("cafe", "ca\u200bfe", True),  # an invisible space
        ("straße", "STRASSE", True),
        ("very bad", "a very\n  bad thing", True),
        ("very bad", "very good, bad", False),
        ("c++", "in C++ it", True),
        ("c++", "c++11", False),
        ("a.b", "axb", False),
        ("坏", "这是坏人", True),  # no spaces between words
        ("плохо", "Это ПЛОХО.", True),
        ("плохо", "неплохо", False),
        ("나쁜", "나쁜 말", True),
    ],
)
def test_words(word: str, text: str, found: bool):
    assert (word_pattern([word]).search(fold(text)) is not None) == found


def test_an_empty_list_finds_nothing():
    assert word_pattern(["", " "]).search("anything") is None


def score(config: SafetyConfig, completion: str):
    return build_reward(config, tokenizer(), "reward")([trajectory([1, 2], [0, 1], completion=completion)])[0]


def test_a_file_and_a_list(tmp_path: Path):
    file = tmp_path / "words.txt"
    file.write_text("\ufeff# mine\nFoo\n\nvery bad  # two words\n", encoding="utf-8")
    config = SafetyConfig(path=str(file), words=["bar"])
    assert [score(config, text).value for text in ("fine", "foo", "very bad", "BAR", "# mine")] == [
        1.0,
        0.0,
        0.0,
        0.0,
        1.0,
    ]
    assert "'very bad'" in score(config, "A very  bad one".replace("  ", " ")).why


@pytest.mark.parametrize("content", [None, b"", b"# only a comment\n", b"\xff\xfe\x00"])
def test_a_file_that_holds_no_words_is_refused(tmp_path: Path, content: bytes | None):
    file = tmp_path / "words.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(LlmscaleError) as caught:
        build_reward(SafetyConfig(path=str(file)), tokenizer(), "true_reward.parts.clean")
    assert caught.value.where == "true_reward.parts.clean.path" and "words.txt" in caught.value.what


@pytest.mark.parametrize(("config", "where"), [(SafetyConfig(), "path"), (SafetyConfig(words=["a", " "]), "words")])
def test_a_list_without_words_is_refused(config: SafetyConfig, where: str):
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert caught.value.where == where
