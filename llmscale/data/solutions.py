"""Records of solutions whose steps were judged one by one, as sequences for a process reward model.

A record has a prompt in any of the known shapes, `steps` (a list of texts) and `labels` (one for each step: true or false, a
probability such as the share of continuations that got there, or null where nobody judged it). That is what the published
forms of PRM800K and Math-Shepherd become with data.columns.steps=completions. A line break inside a step becomes a space.
"""

from __future__ import annotations

import math

import numpy as np

from llmscale.batch import SteppedExample, TokenExample
from llmscale.data.chat import ChatRenderer, Message
from llmscale.data.config import DataConfig, TooLong
from llmscale.data.conversations import question, too_long_error
from llmscale.data.convert import Draft
from llmscale.data.records import Record
from llmscale.data.report import Outcome
from llmscale.errors import DataError
from llmscale.steps import END, StepFinder


def solution_draft(
    record: Record, config: DataConfig, renderer: ChatRenderer, finder: StepFinder
) -> Draft[SteppedExample]:
    """Raises: DataError for a malformed record."""
    messages, _ = question(record, config)
    steps, labels = _steps(record), _labels(record)
    if len(steps) != len(labels):
        what = f"there are {len(steps)} steps and {len(labels)} labels"
        raise DataError(what, where=record.where, fix="Give one label to each step, null where nobody judged it.")
    if all(math.isnan(label) for label in labels):
        return Draft(record.where, [], lambda _: (None, Outcome.EMPTY))
    answer = Message(role="assistant", content=END.join(steps))
    pieces = renderer.pieces([*messages, answer])
    return Draft(record.where, [pieces], lambda sequences: _fitted(sequences[0], labels, config, finder))


def _fitted(
    sequence: TokenExample, labels: list[float], config: DataConfig, finder: StepFinder
) -> tuple[SteppedExample | None, Outcome]:
    own = sequence.loss_mask & (np.arange(len(sequence.loss_mask)) > _last_of_prompt(sequence.loss_mask))
    ends = finder.ends(sequence.token_ids, own)
    if len(ends) != len(labels):
        what = f"its {len(labels)} steps are {len(ends)} lines once rendered"
        raise DataError(what, fix="Look at what the chat template does to line breaks.")
    placed = np.full(len(sequence.token_ids), np.nan, dtype=np.float32)
    placed[ends] = labels
    length, limit = len(placed), config.max_seq_len
    if length <= limit:
        return SteppedExample(sequence.token_ids, placed), Outcome(0)
    if config.too_long is TooLong.error:
        raise too_long_error(length, limit)
    if config.too_long is not TooLong.truncate or np.isnan(placed[:limit]).all():
        return None, Outcome.TOO_LONG
    return SteppedExample(sequence.token_ids[:limit], placed[:limit]), Outcome.TRUNCATED


def _last_of_prompt(mask: np.ndarray) -> int:
    """The position before the last turn of the assistant's."""
    end = int(np.flatnonzero(mask)[-1])
    before = np.flatnonzero(~mask[:end])
    return int(before[-1]) if len(before) else -1


def _steps(record: Record) -> list[str]:
    steps = record.value("steps")
    if not isinstance(steps, list) or not steps or not all(isinstance(step, str) for step in steps):
        raise DataError("column 'steps' must be a list of texts and not empty", where=record.where)
    lines = [" ".join(line.strip() for line in step.splitlines() if line.strip()) for step in steps]
    if "" in lines:
        raise DataError(f"steps[{lines.index('')}] is empty", where=record.where, fix="Drop it and its label.")
    return lines


def _labels(record: Record) -> list[float]:
    labels = record.value("labels")
    if not isinstance(labels, list):
        raise DataError("column 'labels' must be a list", where=record.where)
    for label in labels:
        if not (label is None or (isinstance(label, bool | int | float) and 0 <= label <= 1)):
            fix = "Of the ratings -1, 0 and 1, -1 is false, 1 is true, and 0 (neutral) is null or true."
            what = f"labels must be true, false, null, or from 0 to 1; one is {label!r:.40}"
            raise DataError(what, where=record.where, fix=fix)
    return [math.nan if label is None else float(label) for label in labels]
