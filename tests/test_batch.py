"""Ragged rows become tensors, and what is padding stays out of the way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmscale.batch import Batch, Branch, Layout, Rows, pad_rows, prompt_branches, token_tensors
from tests.tiny import trajectory


def test_rows_are_padded_on_the_right():
    rows = [np.array([1, 2, 3]), np.array([4])]
    assert pad_rows(rows, value=9).tolist() == [[1, 2, 3], [4, 9, 9]]
    assert pad_rows([np.array([0.5, 1.5], dtype=np.float32)]).dtype is torch.float32


def test_positions_of_packed_rows_go_on_into_the_padding():
    rows = [np.arange(5), np.arange(3), np.arange(2)]
    tensors = Layout([5, 3, 2]).tensors(rows, [np.array([0, 1, 0, 1, 2]), np.array([0, 0, 1]), None])
    assert tensors["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 0, 1, 2, 3], [0, 1, 2, 3, 4]]
    assert tensors["lengths"].tolist() == [5, 3, 2]
    assert Batch(tensors).num_tokens == 10


def test_sequences_share_rows_and_come_apart_again():
    sequences = [np.full(n, i + 1) for i, n in enumerate([3, 6, 2, 5])]
    layout = Layout([3, 6, 2, 5], Rows(8))
    tensors = layout.tensors(sequences)
    assert tensors["input_ids"].tolist() == [[2, 2, 2, 2, 2, 2, 3, 3], [4, 4, 4, 4, 4, 1, 1, 1]]
    assert tensors["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 0, 1], [0, 1, 2, 3, 4, 0, 1, 2]]
    assert tensors["lengths"].tolist() == [8, 8]
    assert tensors["input_ids"].flatten()[layout.ends].tolist() == [1, 2, 3, 4]
    for taken, sequence in zip(layout.take(tensors["input_ids"]), sequences, strict=True):
        assert taken.tolist() == sequence.tolist()


@pytest.mark.parametrize("seed", range(30))
def test_branches_stand_without_what_they_share_and_come_back_whole(seed: int):
    """Whatever the lengths, positions say of each run where it goes on from, and nothing is taken for more of another."""
    rng = np.random.default_rng(seed)
    sequences, branches = [], []
    for _ in range(4):
        trunk = rng.integers(0, 50, rng.integers(1, 6))
        for number in range(rng.integers(1, 5)):
            shared = int(rng.integers(0, len(trunk) + 1)) if number else 0
            branches.append(Branch(len(sequences) - number, shared) if shared else None)
            sequences.append(
                np.concatenate([trunk[:shared], rng.integers(0, 50, rng.integers(1, 4))]) if number else trunk
            )
    layout = Layout([len(s) for s in sequences], Rows(int(rng.integers(5, 60)), branching=True), branches)
    tensors = layout.tensors(sequences)
    for taken, sequence in zip(layout.take(tensors["input_ids"]), sequences, strict=True):
        assert taken.tolist() == sequence.tolist()
    assert tensors["input_ids"].flatten()[layout.ends].tolist() == [int(s[-1]) for s in sequences]
    contexts = [seen_by_last(tensors, int(end)) for end in layout.ends]
    assert contexts == [s.tolist() for s in sequences]
    apart = Layout([len(s) for s in sequences], Rows(), branches)
    assert [x.tolist() for x in apart.take(apart.tensors(sequences)["input_ids"])] == [s.tolist() for s in sequences]


def seen_by_last(tensors: dict[str, torch.Tensor], at: int) -> list[int]:
    """What the token at `at` sees, by the rule of `llmscale.models.attention`."""
    row, column = divmod(at, tensors["input_ids"].shape[1])
    ids, positions = (tensors[name][row][: column + 1].tolist() for name in ("input_ids", "position_ids"))
    start = max(i for i in range(len(ids)) if not i or positions[i] != positions[i - 1] + 1)
    document = max(i for i in range(start + 1) if not i or positions[i] == 0)
    return ids[document : document + positions[start]] + ids[start:]


def test_samples_branch_off_before_the_token_that_predicts_their_first():
    prompt = [7, 8, 9]
    samples = [trajectory([*prompt, 1, 2], [0, 0, 0, 1, 1]), trajectory([*prompt, 1], [0, 0, 0, 1])]
    samples += [trajectory([7, 8, 1], [0, 0, 1]), trajectory([*prompt, 5], [0, 0, 0, 1])]
    assert prompt_branches(samples) == [None, Branch(0, 2), None, Branch(0, 2)]


def test_a_sequence_longer_than_a_row_has_one_of_its_own_length():
    assert Layout([9, 3, 4], Rows(4)).shape == (2, 9)


def test_no_rows_give_one_without_tokens():
    batch = Batch(token_tensors([]))
    assert batch["input_ids"].shape == (1, 1) and batch["input_ids"].dtype is torch.int64
    assert batch.num_tokens == 0


def test_moving_a_batch_keeps_its_counts():
    batch = Batch(token_tensors([np.arange(3)]), {"tokens": 2.0}).to(torch.device("meta"))
    assert batch.counts == {"tokens": 2.0}
    assert {tensor.device.type for tensor in batch.tensors.values()} == {"meta"}


def test_completion_len_counts_the_policys_own_tokens():
    assert trajectory([5, 6, 7, 8, 9], [0, 1, 1, 0, 1]).completion_len == 3
