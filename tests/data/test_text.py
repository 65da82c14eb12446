from __future__ import annotations

import numpy as np
import pytest

from llmscale.data.text import cut_blocks, encode_documents
from llmscale.errors import ModelError


def documents(*lengths: int) -> list[np.ndarray]:
    """Consecutive numbers, so that a lost or doubled token shows."""
    ends = np.cumsum(lengths)
    return [np.arange(e - n, e, dtype=np.int32) for e, n in zip(ends, lengths, strict=True)]


def test_positions_and_targets_restart_at_each_document():
    blocks = cut_blocks(documents(3, 4, 6), max_seq_len=5)
    assert [b.token_ids.tolist() for b in blocks] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12]]
    # The second document goes on in the second block, the third in the third: as new segments.
    positions = [b.position_ids for b in blocks if b.position_ids is not None]
    assert [p.tolist() for p in positions] == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2], [0, 1, 2]]
    for block, own in zip(blocks, positions, strict=True):
        assert block.loss_mask.tolist() == [p > 0 for p in own.tolist()]
        assert (block.token_ids.dtype, block.loss_mask.dtype) == (np.int64, np.bool_)


@pytest.mark.parametrize("max_seq_len", [3, 7, 100])
def test_no_token_is_lost_or_doubled(max_seq_len):
    rng = np.random.default_rng(0)
    lengths = [int(n) for n in rng.integers(2, 20, size=50)]
    blocks = cut_blocks(documents(*lengths), max_seq_len)
    tokens = np.concatenate([b.token_ids for b in blocks])
    left_out = sum(lengths) % max_seq_len == 1  # a last block of one token has nothing to learn
    assert tokens.tolist() == list(range(sum(lengths) - left_out))
    assert all(len(b.token_ids) == max_seq_len for b in blocks[:-1])
    assert all(b.loss_mask.any() for b in blocks)


def test_blocks_share_one_array():
    blocks = cut_blocks(documents(10, 10), max_seq_len=8)
    assert blocks[0].token_ids.base is blocks[1].token_ids.base is not None


def test_a_block_without_a_target_is_left_out():
    assert [b.token_ids.tolist() for b in cut_blocks(documents(5), 4)] == [[0, 1, 2, 3]]
    assert cut_blocks([], 4) == []


def test_each_document_ends_with_eos_and_cannot_spell_it(tokenizer):
    made = encode_documents(["the cat", "", "a<|eos|>b"], tokenizer)
    eos = tokenizer.eos_token_id
    assert [int((ids == eos).sum()) for ids in made] == [1, 1, 1]
    assert all(ids[-1] == eos for ids in made)
    assert tokenizer.decode(made[2][:-1]) == "a<|eos|>b"


def test_many_documents_keep_their_order(tokenizer):
    texts = [f"the cat {i}" for i in range(600)]
    assert [tokenizer.decode(ids[:-1]) for ids in encode_documents(iter(texts), tokenizer)] == texts


def test_a_tokenizer_without_eos_is_refused(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="end-of-sequence"):
        encode_documents(["x"], tokenizer)
