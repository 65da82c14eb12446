"""One source as examples, and what became of each of its records. What a stage trains on is tokenized once into the cache;
prompts stay in memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from llmscale.batch import Prompt, RankedExample, SteppedExample, TokenExample
from llmscale.config import to_dict
from llmscale.data.cache import FORMAT, ArrayWriter, Stored, content_digest, digest, stored_once
from llmscale.data.chat import ChatRenderer
from llmscale.data.config import DataConfig, OnCorrupt, Packing
from llmscale.data.conversations import conversation_draft
from llmscale.data.convert import Draft, converted
from llmscale.data.examples import Examples, ListedExamples, RankedExamples, SteppedExamples, TokenExamples
from llmscale.data.preferences import ranking_draft
from llmscale.data.prompts import prompt_draft
from llmscale.data.records import Malformed, Record
from llmscale.data.report import NUM_OUTCOMES, Outcome, Report
from llmscale.data.solutions import solution_draft
from llmscale.data.sources import content_of, read_items
from llmscale.data.text import Blocks, block_index, document_draft
from llmscale.data.tokenizer import identity, token_dtype
from llmscale.errors import DataError, ModelError
from llmscale.randomness import permutation
from llmscale.steps import StepFinder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

E = TypeVar("E")


class Part(NamedTuple, Generic[E]):
    examples: Examples[E]
    report: Report


class Corpus(ABC, Generic[E]):
    """A source whose well-formed records can be divided."""

    def __init__(self, source: str, num_records: int, malformed: Malformed):
        self.source, self.num_records, self.malformed = source, num_records, malformed

    def whole(self) -> Part[E]:
        return self.part(np.ones(self.num_records, dtype=bool))

    def divided(self, fraction: float) -> tuple[Part[E], Part[E]]:
        """Without the held-out records, and those alone. They are the same in every run, so that runs of different seeds can
        be compared.

        Raises: DataError where there is nothing to divide.
        """
        if self.num_records == 1:
            fix = "Set data.validation_fraction=0."
            raise DataError("a single record leaves nothing to hold out", where=self.source, fix=fix)
        held_out = np.zeros(self.num_records, dtype=bool)
        num_held_out = max(1, round(self.num_records * fraction))
        held_out[permutation(0, "held out", size=self.num_records)[:num_held_out]] = True
        return self.part(~held_out), self.part(held_out)

    @abstractmethod
    def part(self, chosen: np.ndarray) -> Part[E]:
        """chosen: bool [records], which of them."""
        ...


class RecordCorpus(Corpus[E]):
    """At most one example a record. `outcomes` uint8 [records]: flags of `Outcome`; `select`: index -> those examples."""

    def __init__(
        self, source: str, outcomes: np.ndarray, malformed: Malformed, select: Callable[[np.ndarray], Examples[E]]
    ):
        super().__init__(source, len(outcomes), malformed)
        self._outcomes, self._select = outcomes, select

    def part(self, chosen: np.ndarray) -> Part[E]:
        is_kept = self._outcomes & Outcome.LEFT_OUT == 0
        examples = self._select(np.flatnonzero(chosen[is_kept]))
        outcomes = np.bincount(self._outcomes[chosen], minlength=NUM_OUTCOMES)
        return Part(examples, Report.of(outcomes, int(examples.lengths.sum())))


class TextCorpus(Corpus[TokenExample]):
    """Documents in blocks."""

    def __init__(self, source: str, stored: Stored, malformed: Malformed, config: DataConfig):
        self._tokens, self._offsets = stored.arrays["tokens"], stored.arrays["offsets"]
        self._config = config
        super().__init__(source, len(self._offsets) - 1, malformed)

    def divided(self, fraction: float) -> tuple[Part[TokenExample], Part[TokenExample]]:
        """A single document is divided too: its end is held out."""
        if self.num_records > 1:
            return super().divided(fraction)
        end = int(self._offsets[-1])
        held_out = max(1, round(end * fraction))
        return self._blocks([0], [end - held_out]), self._blocks([end - held_out], [held_out])

    def part(self, chosen: np.ndarray) -> Part[TokenExample]:
        return self._blocks(self._offsets[:-1][chosen], np.diff(self._offsets)[chosen])

    def _blocks(self, starts: ArrayLike, lengths: ArrayLike) -> Part[TokenExample]:
        starts, lengths = np.asarray(starts), np.asarray(lengths)
        max_seq_len, packing = self._config.max_seq_len, self._config.packing
        index = block_index(starts, lengths, max_seq_len, packing)
        blocks = Blocks(self._tokens, index, max_seq_len)
        report = Report(records=len(starts), tokens=int(lengths.sum()), cut_documents=index.num_cut)
        if packing is Packing.best_fit:
            report.padding = len(blocks) * max_seq_len - int(blocks.lengths.sum())
        return Part(blocks, report)


# ---------------------------------------------------------------- opening


def open_text(
    source: str, config: DataConfig, tokenizer: PreTrainedTokenizerFast, cache_dir: Path
) -> Corpus[TokenExample]:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ModelError("the tokenizer has no end-of-sequence token", fix="Set its eos_token and save it again.")
    stored, malformed = _stored(_TEXT, source, config, tokenizer, cache_dir, lambda r: document_draft(r, eos))
    return TextCorpus(source, stored, malformed, config)


def open_conversations(
    source: str, config: DataConfig, renderer: ChatRenderer, cache_dir: Path
) -> Corpus[TokenExample]:
    def draft(record: Record) -> Draft[TokenExample]:
        return conversation_draft(record, config, renderer)

    stored, malformed = _stored(_CONVERSATIONS, source, config, renderer.tokenizer, cache_dir, draft)
    arrays = stored.arrays
    return RecordCorpus(source, arrays["outcomes"], malformed, lambda index: TokenExamples(arrays, index))


def open_rankings(source: str, config: DataConfig, renderer: ChatRenderer, cache_dir: Path) -> Corpus[RankedExample]:
    def draft(record: Record) -> Draft[RankedExample]:
        return ranking_draft(record, config, renderer)

    stored, malformed = _stored(_RANKINGS, source, config, renderer.tokenizer, cache_dir, draft)
    arrays = stored.arrays
    return RecordCorpus(source, arrays["outcomes"], malformed, lambda index: RankedExamples(arrays, index))


def open_solutions(source: str, config: DataConfig, renderer: ChatRenderer, cache_dir: Path) -> Corpus[SteppedExample]:
    finder = StepFinder(renderer.tokenizer)

    def draft(record: Record) -> Draft[SteppedExample]:
        return solution_draft(record, config, renderer, finder)

    stored, malformed = _stored(_SOLUTIONS, source, config, renderer.tokenizer, cache_dir, draft)
    arrays = stored.arrays
    return RecordCorpus(source, arrays["outcomes"], malformed, lambda index: SteppedExamples(arrays, index))


def read_prompts(source: str, config: DataConfig, renderer: ChatRenderer, limit: int) -> Corpus[Prompt]:
    """`limit`: tokens of a prompt."""
    malformed = Malformed(config.on_corrupt)
    drafts = malformed.left_out(
        read_items(source, config.columns, config.max_records), lambda r: prompt_draft(r, config, renderer, limit)
    )
    kept: list[Prompt] = []
    outcomes: list[int] = []
    for prompt, outcome in converted(drafts, renderer.tokenizer):
        outcomes.append(outcome)
        if prompt is not None:
            kept.append(prompt)

    def select(index: np.ndarray) -> Examples[Prompt]:
        return ListedExamples([kept[i] for i in index.tolist()], lambda prompt: len(prompt.token_ids))

    return RecordCorpus(source, np.array(outcomes, dtype=np.uint8), malformed, select)


# ---------------------------------------------------------------- the cache


@dataclass(frozen=True)
class _Kind(Generic[E]):
    """How examples lie in the cache: `tokens`, `offsets` [sequences + 1], `outcomes` [records], and arrays of its own."""

    name: str
    write: Callable[[ArrayWriter, E], None]
    dtypes: dict[str, type]
    depends_on: tuple[str, ...]  # fields of DataConfig


def _write_sequence(writer: ArrayWriter, token_ids: np.ndarray) -> None:
    writer.append("tokens", token_ids)
    writer.append("offsets", [writer.sizes["tokens"]])


def _write_conversation(writer: ArrayWriter, example: TokenExample) -> None:
    _write_sequence(writer, example.token_ids)
    writer.append("mask", example.loss_mask)


def _write_ranking(writer: ArrayWriter, example: RankedExample) -> None:
    for sequence in example.sequences:
        _write_sequence(writer, sequence)
    writer.append("ranks", example.ranks)
    writer.append("ratings", example.ratings or [np.nan] * len(example.ranks))
    writer.append("groups", [writer.sizes["ranks"]])


def _write_solution(writer: ArrayWriter, example: SteppedExample) -> None:
    _write_sequence(writer, example.token_ids)
    writer.append("labels", example.labels)


_READ = ("columns", "max_records", "on_corrupt")
_RENDERED = (*_READ, "max_seq_len", "too_long", "system_prompt")
_TEXT: _Kind[np.ndarray] = _Kind("text", _write_sequence, {}, _READ)
_CONVERSATIONS = _Kind("conversations", _write_conversation, {"mask": np.bool_}, _RENDERED)
_RANKINGS = _Kind("rankings", _write_ranking, {"ranks": np.int64, "ratings": np.float64, "groups": np.int64}, _RENDERED)
_SOLUTIONS = _Kind("solutions", _write_solution, {"labels": np.float32}, _RENDERED)


def _stored(
    kind: _Kind[E],
    source: str,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    cache_dir: Path,
    draft: Callable[[Record], Draft[E]],
) -> tuple[Stored, Malformed]:
    """The source in the cache, by what its tokens follow from and nothing else."""

    def build(directory: Path) -> None:
        malformed = Malformed(config.on_corrupt)
        drafts = malformed.left_out(read_items(source, config.columns, config.max_records), draft)
        dtypes = {"tokens": token_dtype(tokenizer), "offsets": np.int64, "outcomes": np.uint8, **kind.dtypes}
        outcomes = [0] * NUM_OUTCOMES
        with closing(ArrayWriter(directory, dtypes)) as writer:
            for name in {"offsets", "groups"} & dtypes.keys():
                writer.append(name, [0])
            for example, outcome in converted(drafts, tokenizer):
                outcomes[outcome] += 1
                writer.append("outcomes", [outcome])
                if example is not None:
                    kind.write(writer, example)
            report = Report.of(outcomes, writer.sizes["tokens"])
            report.skipped_corrupt = malformed.count
            writer.finish({"kind": kind.name, "report": report.to_dict(), "first_malformed": malformed.first})

    cache_dir = Path(config.cache_dir or cache_dir)
    values = to_dict(config)
    settings = {name: values[name] for name in kind.depends_on}
    named, files = content_of(source)
    if config.on_corrupt is OnCorrupt.skip:
        named = source  # the place of the first malformed record names its file
    content = [[path.suffix, content_digest(path, cache_dir)] for path in files]
    key = digest(FORMAT, kind.name, named, content, identity(tokenizer), settings)
    stored = stored_once(cache_dir, key, build, source)
    facts = stored.facts
    return stored, Malformed(config.on_corrupt, facts["report"]["skipped_corrupt"], facts["first_malformed"])
