"""What a stage asks for: training and validation examples of one kind, and a report of what became of the records."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from llmscale.batch import Prompt, RankedExample, SteppedExample, TokenExample
from llmscale.data.chat import ChatRenderer
from llmscale.data.config import DataConfig
from llmscale.data.corpus import (
    Corpus,
    Part,
    open_conversations,
    open_rankings,
    open_solutions,
    open_text,
    read_prompts,
)
from llmscale.data.examples import Examples, joined
from llmscale.data.loader import SampleOrder
from llmscale.data.mixing import MixedOrder, Mixture
from llmscale.data.prompts import room_for_prompts
from llmscale.data.report import Report
from llmscale.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

E = TypeVar("E")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split(Generic[E]):
    train: Examples[E]
    validation: Examples[E]  # empty where the config asks for none
    report: dict[str, float]  # of all training sources, see Report; validation's with `validation_`
    mixture: Mixture | None = None  # of the sources in `train`, where there are several

    def order(self, seed: int) -> SampleOrder | MixedOrder:
        """Which of `train` each step takes."""
        return SampleOrder(len(self.train), seed) if self.mixture is None else MixedOrder(self.mixture, seed)


def load_text(config: DataConfig, tokenizer: PreTrainedTokenizerFast, cache_dir: Path) -> Split[TokenExample]:
    """Blocks of raw text, from the column `text`. A single document is split too: its end is held out.

    `cache_dir`, here and below: where tokenized data are kept, unless the config names another folder.
    """
    return _load(config, partial(open_text, config=config, tokenizer=tokenizer, cache_dir=cache_dir))


def load_conversations(config: DataConfig, tokenizer: PreTrainedTokenizerFast, cache_dir: Path) -> Split[TokenExample]:
    renderer = ChatRenderer(tokenizer)
    return _load(config, partial(open_conversations, config=config, renderer=renderer, cache_dir=cache_dir))


def load_rankings(config: DataConfig, tokenizer: PreTrainedTokenizerFast, cache_dir: Path) -> Split[RankedExample]:
    renderer = ChatRenderer(tokenizer)
    return _load(config, partial(open_rankings, config=config, renderer=renderer, cache_dir=cache_dir))


def load_solutions(config: DataConfig, tokenizer: PreTrainedTokenizerFast, cache_dir: Path) -> Split[SteppedExample]:
    renderer = ChatRenderer(tokenizer)
    return _load(config, partial(open_solutions, config=config, renderer=renderer, cache_dir=cache_dir))


def load_prompts(config: DataConfig, tokenizer: PreTrainedTokenizerFast, max_completion_tokens: int) -> Split[Prompt]:
    """Prompts that leave `max_completion_tokens` of the context (`max_seq_len`) to the completion; in memory."""
    limit = room_for_prompts(config, max_completion_tokens)
    return _load(config, partial(read_prompts, config=config, renderer=ChatRenderer(tokenizer), limit=limit))


def _load(config: DataConfig, open_source: Callable[[str], Corpus[E]]) -> Split[E]:
    train: dict[str, Part[E]] = {}
    validation: list[Part[E]] = []
    for name, source in config.sources.items():
        corpus = open_source(source)
        if config.validation_fraction > 0:
            train[name], held_out = corpus.divided(config.validation_fraction)
            validation.append(held_out)
        else:
            train[name] = corpus.whole()
        _note(corpus, config.max_seq_len, *(part.report for part in (train[name], *validation[-1:])))
        _check_not_empty(source, train[name], config.max_seq_len)
    if config.validation is not None:
        corpus = open_source(config.validation)
        validation.append(corpus.whole())
        _note(corpus, config.max_seq_len, validation[0].report)
    report = _sum(train.values()).to_dict()
    if validation:
        report |= _sum(validation).to_dict("validation_")
    sizes = {name: len(part.examples) for name, part in train.items()}
    return Split(
        joined([part.examples for part in train.values()]),
        joined([part.examples for part in validation]),
        report,
        Mixture.of(sizes, config) if config.mixture else None,
    )


def _sum(parts: Iterable[Part[E]]) -> Report:
    return sum((part.report for part in parts), start=Report())


def _check_not_empty(source: str, part: Part[E], max_seq_len: int) -> None:
    if not part.examples:
        report = part.report
        what = f"none of the {report.records} records is left to train on: {report.dropped_too_long} are longer than "
        what += f"data.max_seq_len={max_seq_len} tokens, {report.dropped_empty} have no answer"
        raise DataError(what, where=source, fix="Raise data.max_seq_len, or set data.too_long=truncate.")


def _note(corpus: Corpus[E], max_seq_len: int, *reports: Report) -> None:
    """Malformed records are counted in the first report; every loss of records is warned about."""
    malformed = corpus.malformed
    reports[0].skipped_corrupt = malformed.count
    if malformed.count:
        what = "%s: %d malformed records were skipped, the first at %s"
        _logger.warning(what, corpus.source, malformed.count, malformed.first)
    for report in reports:
        if report.dropped_too_long or report.truncated:
            what = "%s: of %d records, %d longer than %d tokens were dropped and %d cut to that length"
            counts = (report.records, report.dropped_too_long, max_seq_len, report.truncated)
            _logger.warning(what, corpus.source, *counts)
        if report.dropped_empty:
            _logger.warning("%s: %d records without an answer were dropped", corpus.source, report.dropped_empty)
