from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from llmscale.batch import TokenExample
from llmscale.data.config import DataConfig, Packing
from llmscale.data.splits import load_text
from llmscale.data.text import Blocks, block_index
from llmscale.errors import ModelError
from llmscale.objectives.causal_lm import CausalLM
from llmscale.objectives.config import CausalLMConfig
from tests.tiny import language_model


def blocks_of(lengths: list[int], max_seq_len: int, packing: Packing = Packing.cut) -> list[TokenExample]:
    """Blocks of documents whose tokens are consecutive numbers, so that a lost or doubled token shows."""
    ends = np.cumsum([0, *lengths])
    index = block_index(ends[:-1], np.array(lengths, dtype=np.int64), max_seq_len, packing)
    return list(Blocks(np.arange(ends[-1], dtype=np.int32), index, max_seq_len))


def test_positions_and_targets_restart_at_each_document():
    blocks = blocks_of([3, 4, 6], max_seq_len=5)
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
    blocks = blocks_of(lengths, max_seq_len)
    tokens = np.concatenate([b.token_ids for b in blocks])
    left_out = sum(lengths) % max_seq_len == 1  # a last block of one token has nothing to learn
    assert tokens.tolist() == list(range(sum(lengths) - left_out))
    assert all(len(b.token_ids) == max_seq_len for b in blocks[:-1])
    assert all(b.loss_mask.any() for b in blocks)


@pytest.mark.parametrize("packing", Packing)
def test_a_block_without_a_target_is_left_out(packing):
    assert [b.token_ids.tolist() for b in blocks_of([5], 4, packing)] == [[0, 1, 2, 3]]
    assert blocks_of([1, 1, 1], 3, packing) == []
    assert blocks_of([], 4, packing) == []
    assert [b.token_ids.tolist() for b in blocks_of([0, 2], 4, packing)] == [[0, 1]]


# ---------------------------------------------------------------- best fit


@pytest.mark.parametrize("max_seq_len", [3, 8, 50])
def test_best_fit_keeps_documents_whole(max_seq_len):
    """A document is cut only every max_seq_len tokens, and every piece is in one block, once."""
    rng = np.random.default_rng(1)
    lengths = [int(n) for n in rng.integers(2, 20, size=60)]
    pieces = []
    for block in blocks_of(lengths, max_seq_len, Packing.best_fit):
        assert len(block.token_ids) <= max_seq_len
        assert block.loss_mask.tolist() == (block.position_ids > 0).tolist()
        edges = [*np.flatnonzero(block.position_ids == 0), len(block.token_ids)]
        for a, b in pairwise(edges):
            assert block.position_ids[a:b].tolist() == list(range(b - a))
            pieces.append(block.token_ids[a:b].tolist())
    documents = [range(a, b) for a, b in pairwise(np.cumsum([0, *lengths]).tolist())]
    expected = [list(d[i : i + max_seq_len]) for d in documents for i in range(0, len(d), max_seq_len)]
    lost = [piece for piece in expected if piece not in pieces]
    assert sorted(pieces + lost) == sorted(expected)
    assert all(len(piece) == 1 for piece in lost), "a block of first tokens has nothing to learn"


def test_packing_says_what_is_cut_and_what_is_padding(write, tokenizer, cache):
    texts = ["x" * n for n in (7, 3, 3, 19)]  # documents of 8, 4, 4 and 20 tokens
    report = load(write, tokenizer, cache, texts, max_seq_len=8, packing=Packing.best_fit).report
    # [8] [4 4] [8] [8] [4 and 4 of padding]
    assert (report["tokens"], report["padding"], report["cut_documents"]) == (36, 4, 1)
    assert (report["padding_share"], report["cut_share"]) == (0.1, 0.25)
    report = load(write, tokenizer, cache, texts, max_seq_len=10).report
    # [8 2] [2 4 4] [10] [6]
    assert (report["padding"], report["cut_documents"], report["cut_share"]) == (0, 2, 0.5)


@pytest.mark.parametrize("packing", Packing)
def test_a_document_learns_in_a_block_what_it_learns_alone(write, tokenizer, cache, packing):
    """The losses of every token are those of its piece in a row of its own."""
    texts = ["the cat sat", "what is it? it is the cat and the dog on the log", "x", "the dog", "a mat, a log"]
    blocks = load(write, tokenizer, cache, texts, max_seq_len=16, packing=packing).train
    model = language_model(vocab_size=len(tokenizer)).double()
    objective = CausalLM(CausalLMConfig())

    def losses(rows: list[TokenExample]) -> list[list[float]]:
        batch = objective.prepare(rows)
        with torch.no_grad():
            logits = model.hf(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        logprobs = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
        return [row[mask].tolist() for row, mask in zip(-logprobs, batch["loss_mask"][:, 1:], strict=True)]

    num_pieces = 0
    for block, in_block in zip(blocks, losses(list(blocks)), strict=True):
        edges = [*np.flatnonzero(block.position_ids == 0), len(block.token_ids)]
        num_pieces += len(edges) - 1
        alone = [TokenExample(block.token_ids[a:b], np.ones(b - a, dtype=bool)) for a, b in pairwise(edges)]
        assert np.allclose(in_block, np.concatenate(losses(alone)), rtol=0, atol=1e-9)
    assert num_pieces > len(blocks) > 1


@pytest.mark.realdata
def test_web_pages_are_packed_without_waste(shared_data, tokenizer, cache):
    config = DataConfig(train=str(shared_data / "pretrain/c4_demo.jsonl"), max_seq_len=2048)
    cut = load_text(config, tokenizer, cache)
    config.packing = Packing.best_fit
    packed = load_text(config, tokenizer, cache)
    assert packed.train.lengths.sum() == cut.train.lengths.sum() == cut.report["tokens"]
    assert packed.report["padding_share"] < 0.01
    assert packed.report["cut_documents"] < cut.report["cut_documents"] / 2


# ---------------------------------------------------------------- through the loader


def load(write, tokenizer, cache, texts, **config):
    path = write("texts.jsonl", [{"text": text} for text in texts])
    return load_text(DataConfig(train=path, **config), tokenizer, cache)


def test_each_document_ends_with_eos_and_cannot_spell_it(write, tokenizer, cache):
    (block,) = load(write, tokenizer, cache, ["the cat", "", "a<|eos|>b"]).train
    eos = tokenizer.eos_token_id
    starts = [*np.flatnonzero(block.position_ids == 0), len(block.token_ids)]
    made = [block.token_ids[a:b] for a, b in pairwise(starts)]
    assert [int((ids == eos).sum()) for ids in made] == [1, 1, 1]
    assert all(ids[-1] == eos for ids in made)
    assert tokenizer.decode(made[2][:-1]) == "a<|eos|>b"


def test_many_documents_keep_their_order(write, tokenizer, cache):
    texts = [f"the cat {i}" for i in range(1200)]  # more than are tokenized at once
    blocks = load(write, tokenizer, cache, texts, max_seq_len=64).train
    assert tokenizer.decode(np.concatenate([b.token_ids for b in blocks])).split("<|eos|>")[:-1] == texts


def test_a_tokenizer_without_eos_is_refused(write, tokenizer, cache):
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="end-of-sequence"):
        load(write, tokenizer, cache, ["x"])
