"""From records to examples, a batch of records at a time: a tokenizer uses its threads over many texts, and what is in
memory does not grow with the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from llmscale.batch import TokenExample
from llmscale.data.chat import Piece, tokenized
from llmscale.data.records import located
from llmscale.data.report import Outcome

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

E = TypeVar("E")

_RECORDS_AT_ONCE = 512
_CHARACTERS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Draft(Generic[E]):
    """An example before its texts are tokenized."""

    where: str  # of its record
    texts: Sequence[Sequence[Piece]]  # of each sequence that it has
    finish: Callable[[list[TokenExample]], tuple[E | None, Outcome]]  # from those sequences; no example: left out


def converted(drafts: Iterable[Draft[E]], tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[E | None, Outcome]]:
    """The example of each draft, in order, and what became of its record."""
    for batch in _batches(drafts):
        sequences = iter(tokenized(tokenizer, [pieces for draft in batch for pieces in draft.texts]))
        for draft in batch:
            with located(draft.where):
                made = draft.finish([next(sequences) for _ in draft.texts])
            yield made


def _batches(drafts: Iterable[Draft[E]]) -> Iterator[list[Draft[E]]]:
    batch: list[Draft[E]] = []
    characters = 0
    for draft in drafts:
        batch.append(draft)
        characters += sum(len(piece.text) for pieces in draft.texts for piece in pieces)
        if len(batch) == _RECORDS_AT_ONCE or characters >= _CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
