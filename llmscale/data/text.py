"""Raw text for pretraining: documents in blocks of one length.

A block may hold several documents (or parts of them). Positions restart at each, which is how the model keeps them from
seeing one another, and the first token of each is no target, because nothing stands before it. Which document goes where
follows from the lengths alone; a block is put together when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llmscale.batch import TokenExample
from llmscale.data.chat import Piece
from llmscale.data.config import DataConfig, Packing
from llmscale.data.convert import Draft
from llmscale.data.examples import Examples
from llmscale.data.records import Malformed, Record
from llmscale.data.report import Outcome
from llmscale.data.sources import read_items
from llmscale.packing import best_fit


def read_texts(config: DataConfig) -> Iterator[str]:
    """Every training text, to train a tokenizer on.

    Raises: DataError for a malformed record, unless those are skipped.
    """
    for source in config.sources.values():
        items = read_items(source, config.columns, config.max_records)
        yield from Malformed(config.on_corrupt).left_out(items, lambda record: record.string("text"))


def document_draft(record: Record, eos: int) -> Draft[np.ndarray]:
    """The column `text` with the end-of-sequence token `eos` behind it.

    Raises: DataError where there is no such column, or no text in it.
    """
    text = record.string("text")
    return Draft(
        record.where,
        [[Piece(text, is_content=True, is_target=True)]],
        lambda sequences: (np.append(sequences[0].token_ids, eos), Outcome(0)),
    )


@dataclass(frozen=True)
class BlockIndex:
    """Pieces of documents, block by block: P pieces in B blocks."""

    starts: np.ndarray  # int64 [P], the first token of each piece in the array of all tokens
    lengths: np.ndarray  # int64 [P]
    offsets: np.ndarray  # int64 [B + 1], the first piece of each block
    num_cut: int  # documents that do not stand whole in one block


def block_index(starts: np.ndarray, lengths: np.ndarray, max_seq_len: int, packing: Packing) -> BlockIndex:
    """Where every token of the documents at `starts` [N], of `lengths` [N], comes to stand. A block of first tokens alone has
    nothing to learn and is left out."""
    starts, lengths = starts[lengths > 0], lengths[lengths > 0]
    place = _cut if packing is Packing.cut else _best_fit
    document, within, piece_lengths, offsets = place(lengths, max_seq_len)
    num_cut = int(np.count_nonzero(np.bincount(document) > 1))
    longest = np.maximum.reduceat(piece_lengths, offsets[:-1]) if len(offsets) > 1 else offsets[:-1]
    if not (longest > 1).all():
        num_pieces = np.diff(offsets)
        taught = np.repeat(longest > 1, num_pieces)
        document, within, piece_lengths = document[taught], within[taught], piece_lengths[taught]
        offsets = np.append(0, np.cumsum(num_pieces[longest > 1]))
    return BlockIndex(starts[document] + within, piece_lengths, offsets, num_cut)


_Placed = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # document, start in it, length [P]; offsets [B + 1]


def _cut(lengths: np.ndarray, max_seq_len: int) -> _Placed:
    """One document after the other, cut where a block is full. A piece begins where a document or a block does."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    edges = np.union1d(ends - lengths, np.arange(0, total, max_seq_len))
    document = np.searchsorted(ends, edges, side="right")
    offsets = np.append(np.searchsorted(edges, np.arange(0, total, max_seq_len)), len(edges))
    return document, edges - (ends - lengths)[document], np.diff(edges, append=total), offsets


def _best_fit(lengths: np.ndarray, max_seq_len: int) -> _Placed:
    """Documents that are longer than a block in pieces of that length, then all pieces whole, by best-fit decreasing (Ding et
    al. 2024, "Fewer truncations improve language modeling")."""
    num_pieces = -(-lengths // max_seq_len)
    document = np.repeat(np.arange(len(lengths)), num_pieces)
    first = np.cumsum(num_pieces) - num_pieces
    within = (np.arange(len(document)) - first[document]) * max_seq_len
    piece_lengths = np.minimum(max_seq_len, lengths[document] - within)
    rows = best_fit(piece_lengths, max_seq_len)
    order = np.array([piece for row in rows for piece in row], dtype=np.int64)
    offsets = np.cumsum([0, *map(len, rows)])
    return document[order], within[order], piece_lengths[order], offsets


class Blocks(Examples[TokenExample]):
    """The blocks of `index` over `tokens` [T]."""

    def __init__(self, tokens: np.ndarray, index: BlockIndex, max_seq_len: int):
        num_blocks = len(index.offsets) - 1
        super().__init__(np.add.reduceat(index.lengths, index.offsets[:-1]) if num_blocks else index.offsets[:-1])
        self._tokens, self._index = tokens, index
        self._counting = np.arange(max_seq_len)

    def _example(self, index: int) -> TokenExample:
        own = slice(*self._index.offsets[index : index + 2].tolist())
        pieces = list(zip(self._index.starts[own].tolist(), self._index.lengths[own].tolist(), strict=True))
        token_ids = np.concatenate([self._tokens[start : start + n] for start, n in pieces], dtype=np.int64)
        position_ids = np.concatenate([self._counting[:n] for _, n in pieces])
        return TokenExample(token_ids, position_ids > 0, position_ids)
