"""An environment from the user's own file: the README's, and what is wrong with others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llmscale.config import build, check
from llmscale.errors import ConfigError
from llmscale.rollout.config import CalculatorConfig, ClassConfig
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()

METHODS = "    def reset(self, prompt, fields): ...\n    def step(self, said): ...\n"
COUNTING = """
from dataclasses import dataclass, field

@dataclass
class Counting:
    heard: list[str] = field(default_factory=list)

    def reset(self, prompt, fields):
        self.prompt = prompt

    def step(self, said):
        self.heard.append(said)
        return f"{self.prompt}: {len(self.heard)}", len(self.heard) > 1
"""


def test_the_one_of_the_readme(tmp_path: Path):
    block = next(
        b for b in re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE) if "class Guess" in b
    )
    (tmp_path / "games.py").write_text(block)
    game = build(ClassConfig(path=f"{tmp_path}/games.py:Guess"))
    game.reset("which number is it?", {"number": "7"})
    heard = [game.step(said) for said in ("I do not know", "9", " 7\n")]
    assert heard == [("higher", False, -0.1), ("lower", False, -0.1), ("", True, 1.0)]


def test_each_sample_has_an_object_of_its_own(tmp_path: Path):
    (tmp_path / "mine.py").write_text(COUNTING)
    config = ClassConfig(path=f"{tmp_path}/mine.py:Counting")
    first, second = build(config), build(config)
    first.reset("a", {})
    second.reset("b", {})
    assert [first.step("x"), first.step("y"), second.step("z")] == [("a: 1", False), ("a: 2", True), ("b: 1", False)]


@pytest.mark.parametrize(
    ("source", "name", "what"),
    [
        ("class Mine:\n    def reset(self, prompt, fields): ...\n", "Mine", "Mine has no method step"),
        ("class Mine: ...\n", "Mine", "Mine has no method reset and no method step"),
        (f"class Mine:\n    def __init__(self, x): ...\n{METHODS}", "Mine", "cannot make .*Mine: TypeError"),
        ("class Mine: ...\n", "Other", "defines no 'Other'"),
        ("class Mine(:\n", "Mine", "cannot run .*SyntaxError"),
    ],
)
def test_a_class_that_is_none_is_refused(tmp_path: Path, source: str, name: str, what: str):
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(ConfigError, match=what) as caught:
        build(ClassConfig(path=f"{tmp_path}/mine.py:{name}"))
    assert caught.value.where == "environment.path"


@pytest.mark.parametrize("limit", ["max_turns", "max_observation_tokens", "timeout_s"])
def test_limits_are_checked(limit: str):
    with pytest.raises(ConfigError) as caught:
        check(CalculatorConfig(**{limit: 0}))
    assert caught.value.where == limit and caught.value.fix


def test_a_path_without_a_class_is_refused():
    with pytest.raises(ConfigError, match=r"must be FILE\.py:CLASS"):
        check(ClassConfig(path="games.py"))
