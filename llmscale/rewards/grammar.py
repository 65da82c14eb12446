"""Whether a text parses: JSON, Python, or a language of the user's own as a grammar for Lark. Nothing is ever run."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from transformers import PreTrainedTokenizerFast

from llmscale.batch import Trajectory
from llmscale.errors import ConfigError
from llmscale.protocols import Score
from llmscale.rewards.config import GrammarConfig, Language
from llmscale.rewards.rules import Rule

_FENCED = re.compile(r"\s*```[^\n`]*\n(?P<inside>.*?)\n?```\s*", re.DOTALL)


def json_fault(text: str) -> str:
    """Why the text is not one JSON value (RFC 8259); empty where it is."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        json.loads(text, parse_constant=refuse, parse_int=float)  # int() would refuse more than 4300 digits
    except (ValueError, RecursionError) as error:
        return _said(error)
    return ""


def python_fault(text: str) -> str:
    """Why the text is not Python of at least one statement; empty where it is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of "\d" and the like
            return "" if ast.parse(text).body else "there is no statement"
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: nested too deeply
        return _said(error)


def lark_fault(path: str, start: str, parser: str) -> Callable[[str], str]:
    """The same question for a grammar in a file.

    Raises: ConfigError for a missing package or file, and for a grammar that is none.
    """
    try:
        import lark
    except ImportError as error:
        fix = "pip install llmscale[grammar]"
        raise ConfigError("language=lark needs the package lark", where="reward.language", fix=fix) from error
    try:
        grammar = Path(path).read_text(encoding="utf-8")
        made = lark.Lark(grammar, start=start, parser=parser, import_paths=[str(Path(path).parent)])
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", where="reward.path", fix="Name a grammar file.") from error
    except lark.exceptions.LarkError as error:
        what = f"{path} is no grammar for {parser}: {_said(error)}"
        raise ConfigError(what, where="reward.path", fix="Mend it, or try another reward.parser.") from error

    def fault(text: str) -> str:
        try:
            made.parse(text)
        except (lark.exceptions.LarkError, RecursionError) as error:
            return _said(error)
        return ""

    return fault


class GrammarReward(Rule[GrammarConfig]):
    """1.0 where the text parses."""

    def __init__(self, config: GrammarConfig, tokenizer: PreTrainedTokenizerFast):
        super().__init__(config, tokenizer)
        if config.language is Language.lark:
            self.fault = lark_fault(str(config.path), config.start, config.parser.name)
        else:
            self.fault = json_fault if config.language is Language.json else python_fault

    def score(self, text: str, trajectory: Trajectory) -> Score:
        fenced = _FENCED.fullmatch(text)
        text = fenced["inside"] if fenced and "```" not in fenced["inside"] else text.strip()
        fault = self.fault(text)
        return Score(float(not fault), why=fault)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]
