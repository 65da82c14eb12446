"""What parses and what does not: JSON, Python, and a grammar of one's own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from llmscale.config import check
from llmscale.errors import ConfigError
from llmscale.protocols import Score
from llmscale.rewards.config import GrammarConfig, Language, Parser
from llmscale.rewards.weighted import build_reward
from tests.tiny import tokenizer, trajectory

LIST = """
start: "[" [item ("," item)*] "]"
item: NUMBER | start
%import common.NUMBER
%ignore " "
"""


def score(config: GrammarConfig, text: str) -> Score:
    check(config)
    return build_reward(config, tokenizer(), "reward")([trajectory([1, 2], [0, 1], completion=text)])[0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": [1, 2.5, null]}', 1.0),
        (' "x" ', 1.0),
        ("```json\n[1]\n```", 1.0),
        ("```\n[1]\n```\n", 1.0),
        ("9" * 5000, 1.0),
        ("", 0.0),
        ("{'a': 1}", 0.0),
        ("[1,]", 0.0),
        ("NaN", 0.0),
        ("[-Infinity]", 0.0),
        ("[1] [2]", 0.0),
        ("Here: [1]", 0.0),
        ("```json\n[1]\n```\n```json\n[2]\n```", 0.0),
        ("[" * 50_000 + "]" * 50_000, 0.0),
    ],
)
def test_json(text: str, value: float):
    found = score(GrammarConfig(language=Language.json), text)
    assert found.value == value and bool(found.why) == (value == 0.0)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("x = 1\nprint(x)", 1.0),
        ("```python\ndef f():\n    return 1\n```", 1.0),
        ("'\\d'", 1.0),  # a warning of Python's, no error
        ("", 0.0),
        ("# a comment", 0.0),
        ("x = ", 0.0),
        ("\x00", 0.0),
        ("(" * 3000 + ")" * 3000, 0.0),
        ("-" * 20_000 + "1", 0.0),
    ],
)
def test_python(text: str, value: float):
    assert score(GrammarConfig(language=Language.python), text).value == value


def test_python_is_parsed_and_never_run(tmp_path: Path):
    assert score(GrammarConfig(language=Language.python), f"open({str(tmp_path / 'made')!r}, 'w')").value == 1.0
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("parser", Parser)
def test_lark(tmp_path: Path, parser: Parser):
    pytest.importorskip("lark", reason="needs the extra llmscale[grammar]")
    file = tmp_path / "list.lark"
    file.write_text(LIST)
    config = GrammarConfig(language=Language.lark, path=str(file), parser=parser)
    texts = ["[1, [2, 3]]", "[]", "```\n[1]\n```", "[1", "[1,]", "", "x", "[" * 500]
    assert [score(config, t).value for t in texts] == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("grammar", [None, "start: (", "other: A\nA: /a/"])
def test_a_grammar_that_is_none_is_refused(tmp_path: Path, grammar: str | None):
    pytest.importorskip("lark", reason="needs the extra llmscale[grammar]")
    file = tmp_path / "mine.lark"
    if grammar is not None:
        file.write_text(grammar)
    with pytest.raises(ConfigError) as caught:
        score(GrammarConfig(language=Language.lark, path=str(file)), "x")
    assert caught.value.where == "reward.path" and "mine.lark" in caught.value.what


def test_without_lark_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lark", None)
    with pytest.raises(ConfigError, match=r"llmscale\[grammar\]") as caught:
        score(GrammarConfig(language=Language.lark, path=str(tmp_path)), "x")
    assert caught.value.where == "reward.language"


@pytest.mark.parametrize("config", [GrammarConfig(language=Language.lark), GrammarConfig(path="x.lark")])
def test_a_grammar_file_belongs_to_lark(config: GrammarConfig):
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert caught.value.where == "path"
