"""Word lists: what must not be said. The lists are the user's; this is only how a text is searched for them.

Text and list are folded alike, so that case, accents, full-width letters and invisible characters hide nothing: compatibility
decomposition (NFKD), marks and format characters away, case folded. Words are found whole ("class" does not hold "ass"); in a
script that does not part words by spaces (Han, Kana, Thai, Lao, Khmer, Myanmar) a listed word is found anywhere.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from llmscale.batch import Trajectory
from llmscale.errors import DataError
from llmscale.protocols import Score
from llmscale.rewards.config import SafetyConfig
from llmscale.rewards.rules import Rule

UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")


def fold(text: str) -> str:
    """The text as it is compared: "Ｃａｆé" -> "cafe"."""
    parts = (c for c in unicodedata.normalize("NFKD", text) if unicodedata.category(c) not in ("Mn", "Cf"))
    return unicodedata.normalize("NFC", "".join(parts).casefold())


def word_pattern(words: Iterable[str]) -> re.Pattern[str]:
    """Finds any of the words or phrases in folded text."""
    folded = sorted({" ".join(fold(w).split()) for w in words} - {""}, key=lambda w: (-len(w), w))
    return re.compile("|".join(_bounded(word) for word in folded) or r"(?!)")


def _bounded(word: str) -> str:
    left, right = ("" if _unspaced(c) else bound for c, bound in ((word[0], r"(?<!\w)"), (word[-1], r"(?!\w)")))
    return left + re.escape(word).replace(re.escape(" "), r"\s+") + right


def _unspaced(character: str) -> bool:
    return unicodedata.name(character, "").startswith(UNSPACED)


class SafetyReward(Rule[SafetyConfig]):
    """1.0 where no listed word is found."""

    def __init__(self, config: SafetyConfig, tokenizer: PreTrainedTokenizerFast):
        super().__init__(config, tokenizer)
        words = [*config.words, *(read_words(config.path) if config.path is not None else [])]
        self.pattern = word_pattern(words)

    def text(self, trajectory: Trajectory) -> str:
        return "\n".join(trajectory.said)

    def score(self, text: str, trajectory: Trajectory) -> Score:
        found = self.pattern.search(fold(text))
        return Score(float(found is None), why=f"{found[0]!r} is on the list" if found else "")


def read_words(path: str) -> list[str]:
    """One word or phrase a line; what follows # is a comment.

    Raises: DataError for a file that cannot be read, or that holds no word.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        what = f"cannot read {path}: {error}"
        raise DataError(what, where="reward.path", fix="Name a UTF-8 text file with one word a line.") from error
    words = [word for line in lines if (word := line.partition("#")[0].strip())]
    if not words:
        raise DataError(f"{path} holds no word", where="reward.path", fix="Put one word or phrase a line into it.")
    return words
