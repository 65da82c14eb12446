"""What a stage asks for: training and validation examples of one kind, and a report of what became of the records."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from llmscale.batch import Prompt, RankedExample, TokenExample
from llmscale.data.chat import ChatRenderer
from llmscale.data.config import DataConfig
from llmscale.data.conversations import conversation_examples
from llmscale.data.preferences import ranked_examples
from llmscale.data.prompts import prompts
from llmscale.data.report import Report
from llmscale.data.sources import Record, read_records
from llmscale.data.text import cut_blocks, encode_documents
from llmscale.errors import DataError
from llmscale.randomness import permutation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

E = TypeVar("E")
R = TypeVar("R")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split(Generic[E]):
    train: list[E]
    validation: list[E]  # empty where the config asks for none
    report: dict[str, int]  # the fields of Report; validation's with `validation_`


def load_text(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> Split[TokenExample]:
    """Blocks of raw text, from the column `text`. A single document is split too: its end is held out."""

    def documents(source: str) -> list[np.ndarray]:
        records = read_records(source, config.columns, config.max_records)
        return encode_documents((record.string("text") for record in records), tokenizer)

    def blocks(some: list[np.ndarray], report: Report) -> list[TokenExample]:
        report.records, report.tokens = len(some), sum(map(len, some))
        return cut_blocks(some, config.max_seq_len)

    train, validation = _sources(config, documents)
    if config.validation_fraction > 0 and not validation:
        start = len(train[0]) - max(1, round(len(train[0]) * config.validation_fraction))
        train, validation = [train[0][:start]], [train[0][start:]]
    return _split(config, train, validation, blocks)


def load_conversations(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> Split[TokenExample]:
    renderer = ChatRenderer(tokenizer)
    return _load(config, lambda records, report: conversation_examples(records, config, renderer, report))


def load_rankings(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> Split[RankedExample]:
    renderer = ChatRenderer(tokenizer)
    return _load(config, lambda records, report: ranked_examples(records, config, renderer, report))


def load_prompts(config: DataConfig, tokenizer: PreTrainedTokenizerFast, max_completion_tokens: int) -> Split[Prompt]:
    """Prompts that leave `max_completion_tokens` of the context (`max_seq_len`) to the completion."""
    renderer = ChatRenderer(tokenizer)
    return _load(config, lambda records, report: prompts(records, config, renderer, report, max_completion_tokens))


def _load(config: DataConfig, convert: Callable[[list[Record], Report], list[E]]) -> Split[E]:
    train, validation = _sources(config, lambda source: list(read_records(source, config.columns, config.max_records)))
    if config.validation_fraction > 0 and not validation:
        fix = "Set data.validation_fraction=0."
        raise DataError("a single record leaves nothing to hold out", where=config.train, fix=fix)
    return _split(config, train, validation, convert)


def _sources(config: DataConfig, read: Callable[[str], list[R]]) -> tuple[list[R], list[R]]:
    """What train and validation consist of, both in the order of the source. The records held out are the same in
    every run, so that runs of different seeds can be compared."""
    items = read(config.train)
    if config.validation is not None:
        return items, read(config.validation)
    if config.validation_fraction == 0 or len(items) == 1:
        return items, []
    num_held_out = max(1, round(len(items) * config.validation_fraction))
    held_out = set(permutation(0, "held out", size=len(items))[:num_held_out].tolist())
    return (
        [item for i, item in enumerate(items) if i not in held_out],
        [item for i, item in enumerate(items) if i in held_out],
    )


def _split(
    config: DataConfig, train: list[R], validation: list[R], convert: Callable[[list[R], Report], list[E]]
) -> Split[E]:
    report, validation_report = Report(), Report()
    examples, validation_examples = convert(train, report), convert(validation, validation_report)
    _warn(config.train, report, config.max_seq_len)
    _warn(config.validation or config.train, validation_report, config.max_seq_len)
    if not examples:
        what = f"none of the {report.records} records is left to train on: {report.dropped_too_long} are longer than "
        what += f"data.max_seq_len={config.max_seq_len} tokens, {report.dropped_empty} have no answer"
        raise DataError(what, where=config.train, fix="Raise data.max_seq_len, or set data.too_long=truncate.")
    counts = report.to_dict() | (validation_report.to_dict("validation_") if validation else {})
    return Split(examples, validation_examples, counts)


def _warn(source: str, report: Report, max_seq_len: int) -> None:
    if report.dropped_too_long or report.truncated:
        what = "%s: of %d records, %d longer than %d tokens were dropped and %d cut to that length"
        _logger.warning(what, source, report.records, report.dropped_too_long, max_seq_len, report.truncated)
    if report.dropped_empty:
        _logger.warning("%s: %d records without an answer were dropped", source, report.dropped_empty)
