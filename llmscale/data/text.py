"""Raw text for pretraining: documents one after the other, cut into blocks of equal length.

A block may hold several documents (or parts of them). Positions restart at each, which is how the model keeps them from
seeing one another, and the first token of each is no target, because nothing stands before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from llmscale.batch import TokenExample
from llmscale.data.chat import encode
from llmscale.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_TEXTS_AT_ONCE = 256  # enough to keep the tokenizer's threads busy


def encode_documents(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> list[np.ndarray]:
    """int32 token ids of each document, with the end-of-sequence token at its end."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ModelError("the tokenizer has no end-of-sequence token", fix="Set its eos_token and save it again.")
    remaining, documents = iter(texts), []
    while some := list(islice(remaining, _TEXTS_AT_ONCE)):
        documents += [np.asarray([*ids, eos], dtype=np.int32) for ids in encode(tokenizer, some, special_tokens=False)]
    return documents


def cut_blocks(documents: Sequence[np.ndarray], max_seq_len: int) -> list[TokenExample]:
    """Blocks of `max_seq_len` tokens, the last one shorter. They are views of one array of all tokens."""
    if not documents:
        return []
    token_ids = np.concatenate(documents, dtype=np.int64)
    is_first = np.zeros(len(token_ids), dtype=bool)
    is_first[np.cumsum([0, *map(len, documents[:-1])])] = True
    is_first[::max_seq_len] = True  # a document that goes on in the next block begins anew there
    index = np.arange(len(token_ids))
    position_ids = index - np.maximum.accumulate(np.where(is_first, index, 0))
    blocks = [slice(start, start + max_seq_len) for start in range(0, len(token_ids), max_seq_len)]
    return [TokenExample(token_ids[b], ~is_first[b], position_ids[b]) for b in blocks if not is_first[b].all()]
