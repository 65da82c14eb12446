"""Clause structure, as in contracts and statutes: every level numbered in order from its first number, nothing skipped, no
clause without words, and no reference to a clause that is not there.

A clause begins a line with its number ("2.", "(b)", "(ii)"; "1. (a) ..." begins two). What level a number belongs to can be
open: (i) is the ninth letter or the first roman numeral, and only what follows tells. So all readings are followed at once,
and the one with the fewest faults counts. References are "clause 3", "section 2(a)(i)", "clauses 1 and 4", "paragraph (b)" (of
the clause that it stands in, or of one that holds that); "section 5 of the Companies Act" is somebody else's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmscale.batch import Trajectory
from llmscale.protocols import Score
from llmscale.rewards.config import LEVEL, ClausesConfig
from llmscale.rewards.rules import Rule

_DIGITS = {"1": r"\d{1,4}", "a": r"[a-z]{1,2}", "A": r"[A-Z]{1,2}", "i": r"[ivxlcdm]{1,9}", "I": r"[IVXLCDM]{1,9}"}
_ROMAN = ((1000, "m"), (900, "cm"), (500, "d"), (400, "cd"), (100, "c"), (90, "xc"), (50, "l"), (40, "xl"), (10, "x"),
          (9, "ix"), (5, "v"), (4, "iv"), (1, "i"))  # fmt: skip
_NUMBER = r"(?:\d+(?:\.\d+)*(?:\(\w{1,9}\))*|(?:\(\w{1,9}\))+)"
_REFERENCE = re.compile(
    rf"\b(?:sub-?)?(?:clause|section|paragraph|article)s?\s+({_NUMBER}(?:(?:\s*,\s*|\s+(?:and|or|to)\s+){_NUMBER})*)"
    r"(?!\w|\s+of\s+(?!this\b))",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Mark:
    """A number at the beginning of a clause."""

    line: int  # from 1
    text: str  # as it stands there
    readings: tuple[tuple[int, tuple[int, ...]], ...]  # (level from 0, its number; of 1.2.3 every number)
    is_empty: bool  # no words between it and the next mark
    words: str  # from it to the next mark


@dataclass(frozen=True)
class Reading:
    """What the marks so far are taken for."""

    path: tuple[int, ...]  # number of the open clause at each level
    faults: tuple[str, ...] = ()
    paths: tuple[tuple[int, ...], ...] = ()  # of every clause


def clause_faults(text: str, levels: Sequence[str]) -> tuple[int, int, list[str]]:
    """(clauses, different references in each, what is wrong with them). `levels`: how the first of each is numbered."""
    marks = list(_marks(text, levels))
    readings: dict[tuple[int, ...], Reading] = {(): Reading(())}
    for previous, mark in zip([None, *marks], marks, strict=False):
        after: dict[tuple[int, ...], Reading] = {}
        for reading in readings.values():
            for level, number in mark.readings:
                new = _followed(reading, mark, level, number, previous)
                if new.path not in after or len(new.faults) < len(after[new.path].faults):
                    after[new.path] = new
        readings = after
    best = min(readings.values(), key=lambda r: len(r.faults))
    faults = list(best.faults)
    if marks and marks[-1].is_empty:
        faults.append(_fault(marks[-1], "is empty"))
    named = {_address(path, levels) for path in best.paths}
    references = 0
    for mark, path in zip(marks, best.paths, strict=True):
        names = {name for group in _REFERENCE.findall(mark.words) for name in re.findall(_NUMBER, group)}
        references += len(names)  # each once: repeating a right one must not thin out the faults
        for name in sorted(names):
            if not any(_address(path[:depth], levels) + name in named for depth in range(len(path) + 1)):
                faults.append(_fault(mark, f"refers to {name}, which is not there"))
    return len(marks), references, faults


def _followed(reading: Reading, mark: Mark, level: int, number: tuple[int, ...], previous: Mark | None) -> Reading:
    """The reading with one more mark at that level, and what is wrong with it there."""
    path, what = reading.path, ""
    if level > len(path):
        what = "skips a level"
        path = path + (1,) * (level - len(path))
    elif len(number) > 1 and number[:-1] != path[:level]:
        what = "stands in another clause"
    expected = path[level] + 1 if level < len(path) else 1
    if number[-1] != expected and not what:  # one fault a mark
        what = f"is number {number[-1]} of its level, {expected} should follow"
    faults = [_fault(mark, what)] if what else []
    if level < len(reading.path) and previous is not None and previous.is_empty:
        faults.append(_fault(previous, "is empty"))
    path = (*path[:level], number[-1])
    return Reading(path, (*reading.faults, *faults), (*reading.paths, path))


def _marks(text: str, levels: Sequence[str]) -> Iterator[Mark]:
    patterns = [_pattern(level) for level in levels]
    found: list[tuple[int, int, str, tuple[tuple[int, tuple[int, ...]], ...]]] = []
    for line in re.finditer(r"^.*$", text, re.MULTILINE):
        at = line.start()
        while True:
            at += len(text[at : line.end()]) - len(text[at : line.end()].lstrip())
            matches = [(i, m) for i, p in enumerate(patterns) if (m := p.match(text, at, line.end()))]
            readings = tuple((i, n) for i, m in matches if (n := _numbers(m[1], levels[i])))
            if not readings:
                break
            longest = max(m.end() for _, m in matches)
            found.append((at, longest, text[at:longest].strip(), readings))
            at = longest
    for i, (start, end, name, readings) in enumerate(found):
        words = text[end : found[i + 1][0] if i + 1 < len(found) else len(text)]
        yield Mark(text.count("\n", 0, start) + 1, name, readings, not re.search(r"\w", words), words)


def _pattern(level: str) -> re.Pattern[str]:
    """Finds a clause's number, and whole: what follows is white space or the end of the line."""
    form = LEVEL.fullmatch(level)
    assert form is not None, level  # the config was checked
    number = r"\.".join(_DIGITS[part] for part in form["first"].split("."))
    dot = r"\.?" if "." in form["first"] else re.escape(form["right"])  # 1.1 and 1.1. are one style
    return re.compile(rf"{re.escape(form['left'])}({number}){dot}(?=\s|$)")


def _numbers(text: str, level: str) -> tuple[int, ...]:
    """1.2 -> (1, 2), c -> (3,), bb -> (28,), iv -> (4,); () for what is no number in this style."""
    style = level.strip("(.)")[0]
    if style == "1":
        return tuple(int(part) for part in text.split("."))
    text = text.lower()
    if style in "aA":
        return (ord(text[0]) - 96 + 26 * (len(text) - 1),) if len(set(text)) == 1 else ()
    value, rest = 0, text
    for worth, sign in _ROMAN:
        while rest.startswith(sign):
            value, rest = value + worth, rest.removeprefix(sign)
    return (value,) if not rest and _spelt(value, "i") == text else ()


def _spelt(number: int, style: str) -> str:
    if style == "1":
        return str(number)
    if style in "aA":
        text = chr(97 + (number - 1) % 26) * ((number - 1) // 26 + 1)
    else:
        text = ""
        for worth, sign in _ROMAN:
            text, number = text + sign * (number // worth), number % worth
    return text.upper() if style.isupper() else text


def _address(path: Sequence[int], levels: Sequence[str]) -> str:
    """As a reference names it: (3, 1, 2) -> 3(a)(ii), or 3.1.2."""
    address = ""
    for number, level in zip(path, levels, strict=False):
        bare = level.strip("(.)")
        spelt = _spelt(number, bare[0])
        if "." in bare:
            address = f"{address}.{spelt}"
        else:
            address += f"({spelt})" if address or level.startswith("(") else spelt
    return address


def _fault(mark: Mark, what: str) -> str:
    return f"line {mark.line}: {mark.text} {what}"


class ClausesReward(Rule[ClausesConfig]):
    """1.0 less the share of clauses and references that are at fault."""

    def score(self, text: str, trajectory: Trajectory) -> Score:
        clauses, references, faults = clause_faults(text, self.config.levels.split())
        if clauses < self.config.min_clauses:
            return Score(0.0, why=f"{clauses} clauses, {self.config.min_clauses} are wanted")
        return Score(max(0.0, 1.0 - len(faults) / (clauses + references)), why="; ".join(faults[:3]))
