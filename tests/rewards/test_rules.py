"""Rules about text: right answers, patterns, formats, lengths."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from llmscale.config import check
from llmscale.errors import ConfigError
from llmscale.protocols import Score
from llmscale.rewards.config import (
    AnswerConfig,
    FormatConfig,
    LengthConfig,
    Match,
    RegexConfig,
    RewardConfig,
    SafetyConfig,
    Unit,
)
from llmscale.rewards.rules import element, format_fault, length_score
from llmscale.rewards.weighted import build_reward
from tests.tiny import tokenizer, trajectory


def score(config: RewardConfig, completion: str, num_tokens: int = 1, **fields: object) -> Score:
    sample = trajectory([1] * (num_tokens + 1), [0] + [1] * num_tokens, completion=completion, **fields)
    return build_reward(config, tokenizer(), "reward")([sample])[0]


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("It is 1,200.", "1200", 1.0),
        ("It is 12.0", 12, 1.0),
        ("9 + 3 = 12", "9 + 3 = <<9+3=12>>12\n#### 12", 1.0),
        ("\\boxed{\\frac{3}{4}}", 0.75, 1.0),
        ("12 or 13", "12", 0.0),
        ("-12", "12", 0.0),
        ("twelve", "12", 0.0),
        ("1e-7", 1e-7, 1.0),
    ],
)
def test_number(completion: str, answer: object, right: float):
    assert score(AnswerConfig(match=Match.number), completion, answer=answer).value == right


def test_a_reference_without_a_number_is_no_score():
    """The record is at fault: a 0 would punish every completion of it."""
    found = score(AnswerConfig(match=Match.number), "12", answer="a dozen")
    assert found.value is None and "'a dozen'" in found.why


@pytest.mark.parametrize("match", Match)
@pytest.mark.parametrize("reference", [None, "", " "])
def test_an_empty_reference_is_no_score(match: Match, reference: str | None):
    found = score(AnswerConfig(match=match), "None", answer=reference)
    assert found.value is None and "answer is empty" in found.why


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [(" Paris\n", "Paris", 1.0), ("paris", "Paris", 0.0), ("Paris.", "Paris", 0.0), ("12", 12, 1.0), ("12.0", "12", 0.0)],
)  # fmt: skip
def test_exact(completion: str, answer: object, right: float):
    assert score(AnswerConfig(), completion, answer=answer).value == right


def test_within_an_element():
    config = AnswerConfig(within="answer")
    assert score(config, "hm <answer>no</answer> <answer> yes </answer>", answer="yes").value == 1.0
    missing = score(config, "yes", answer="yes")
    assert missing.value == 0.0 and "<answer>" in missing.why


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        *(("<a>1</a>", "1"), ("<a>1</a><a>2</a>", "2"), ("<a></a>", "")),
        *(("<a>1", None), ("1</a>", None), ("</a><a>", None), ("", None)),
    ],
)
def test_element(text: str, inside: str | None):
    assert element(text, "a") == inside


@pytest.mark.parametrize(
    ("pattern", "whole", "text", "value"),
    [
        (r"\d{4}-\d\d-\d\d", False, "on 2024-01-31.", 1.0),
        (r"\d{4}-\d\d-\d\d", True, "on 2024-01-31.", 0.0),
        (r"\d+", True, " 31\n", 1.0),
        ("(?i)YES", False, "well, yes", 1.0),
        ("YES", False, "well, yes", 0.0),
        (r"\p{Lu}", False, "Écoute", 1.0),
    ],
)
def test_regex(pattern: str, whole: bool, text: str, value: float):
    assert score(RegexConfig(pattern=pattern, whole=whole), text).value == value


def test_a_pattern_that_never_ends_is_no_score():
    started = time.monotonic()
    found = score(RegexConfig(pattern="(a|a)+$", timeout_s=0.2), "a" * 200 + "b")
    assert found.value is None and "0.2 s" in found.why
    assert time.monotonic() - started < 5


TAGS = ["think", "answer"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("<think>so</think><answer>7</answer>", ""),
        (" <think>\nso\n</think>\n\n<answer>7</answer>\n", ""),
        ("<think>a < b</think><answer>7</answer>", ""),
        ("", "<think> stands there 0 times"),
        ("<think>so</think>", "<answer> stands there 0 times"),
        ("<answer>7</answer><think>so</think>", "<think> does not stand where it should"),
        ("<think>so</think><answer>7</answer><answer>8</answer>", "<answer> stands there 2 times"),
        ("<think>so</think>7<answer>7</answer>", "<answer> does not stand where it should"),
        ("Well <think>so</think><answer>7</answer>", "<think> does not stand where it should"),
        ("<think>so</think><answer>7</answer> done", "there is text beside the elements"),
        ("<think> </think><answer>7</answer>", "<think>...</think> is empty"),
        ("<think>so<answer>7</answer></think>", "another element stands in <think>"),
        ("</think>so<think><answer>7</answer>", "<think> does not stand where it should"),
        ("<think>so<answer></think>7</answer>", "another element stands in <think>"),
    ],
)
def test_format(text: str, fault: str):
    assert format_fault(text, TAGS) == fault
    assert score(FormatConfig(), text) == Score(float(not fault), why=fault)


def test_length_is_a_trapezium():
    """The loop of its definition: 1 inside, a line of slope 1/slope outside, never below 0."""
    for shortest, longest, slope in [(5, 10, 4), (0, 3, 1), (2, None, 5), (5, 5, 0), (0, 7, 0)]:
        for length in range(30):
            value = 1.0
            for n in range(length, shortest):
                value -= 1 / slope if slope and n >= 0 else 1
            for n in range(length if longest is None else longest, length):
                value -= 1 / slope if slope and n >= 0 else 1
            assert length_score(length, shortest, longest, slope) == pytest.approx(max(0.0, value), abs=1e-9)


@pytest.mark.parametrize(("unit", "length"), [(Unit.tokens, 7), (Unit.words, 3), (Unit.characters, 13)])
def test_length_in_each_unit(unit: Unit, length: int):
    inside = LengthConfig(unit=unit, shortest=length, longest=length)
    found = score(inside, "one two  thré", num_tokens=7)
    assert found == Score(1.0, why=f"{length} {unit.name}")
    assert score(LengthConfig(unit=unit, shortest=length + 1), "one two  thré", num_tokens=7).value == 0.0


@pytest.mark.parametrize(
    ("config", "where"),
    [
        (RegexConfig(pattern="("), "pattern"),
        (RegexConfig(pattern="a", timeout_s=0), "timeout_s"),
        (RegexConfig(pattern="a", within="<a>"), "within"),
        (FormatConfig(tags=[]), "tags"),
        (FormatConfig(tags=["a", "a"]), "tags"),
        (FormatConfig(tags=["a b"]), "tags"),
        (LengthConfig(shortest=5, longest=4), "longest"),
        (LengthConfig(shortest=0), "longest"),
        (LengthConfig(slope=-1), "slope"),
        (AnswerConfig(within=""), "within"),
    ],
)
def test_what_makes_no_sense_is_refused(config: RewardConfig, where: str):
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert caught.value.where == where and caught.value.fix


# ---------------------------------------------------------------- several turns


def score_of_turns(config: RewardConfig, *contents: str, **fields: object) -> Score:
    """The policy, its environment, the policy again: two tokens each."""
    sample = trajectory([1] * 7, [0, 1, 1, 0, 0, 1, 1], completion="\n".join(contents), **fields)
    roles = ("assistant", "user", "assistant")
    turns = tuple({"role": role, "content": text} for role, text in zip(roles, contents, strict=True))
    return build_reward(config, tokenizer(), "reward")([replace(sample, messages=turns)])[0]


def test_the_answer_is_what_the_policy_says_last():
    """Neither what it was told nor what it asked for counts as said."""
    number = AnswerConfig(match=Match.number)
    assert score_of_turns(number, "calc 3*9", "27", "It is 27.", answer="27").value == 1
    assert score_of_turns(number, "calc 3*9", "27", "Well.", answer="27").value == 0
    assert score_of_turns(number, "27", "no", "28", answer="27").value == 0
    assert score_of_turns(AnswerConfig(), "calc 3*9", "27", " 27\n", answer="27").value == 1


@pytest.mark.parametrize(("unit", "length"), [(Unit.tokens, 4), (Unit.words, 3), (Unit.characters, 9)])
def test_the_length_is_that_of_all_that_the_policy_said(unit: Unit, length: int):
    found = score_of_turns(LengthConfig(unit=unit, longest=length), "ab cd", "long words in between", "true")
    assert (found.value, found.why) == (1, f"{length} {unit.name}")


@pytest.mark.parametrize(("contents", "safe"), [(("fine", "bad", "fine"), 1), (("bad", "fine", "fine"), 0)])
def test_safety_is_asked_of_every_turn_of_the_policys_own(contents: tuple[str, str, str], safe: float):
    assert score_of_turns(SafetyConfig(words=["bad"]), *contents).value == safe
