from __future__ import annotations

import numpy as np
import pytest

from llmscale.packing import balanced, best_fit, like_lengths


def reference(lengths: list[int], capacity: int) -> list[list[int]]:
    """As it is defined: for each, longest first, look through every row."""
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rooms = [capacity - sum(lengths[i] for i in row) for row in rows]
        fitting = [r for r in range(len(rows)) if rooms[r] >= lengths[index]]
        if fitting:
            rows[min(fitting, key=lambda r: rooms[r])].append(index)
        else:
            rows.append([index])
    return rows


@pytest.mark.parametrize("seed", range(50))
def test_it_is_best_fit_decreasing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 51, size=rng.integers(1, 41)).tolist()
    rows = best_fit(lengths, 50)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    filled = sorted(sum(lengths[i] for i in row) for row in rows)
    assert filled == sorted(sum(lengths[i] for i in row) for row in reference(lengths, 50))
    assert all(total <= 50 for total in filled)


def test_rows_are_nearly_full_on_lengths_like_those_of_documents() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 1, size=5000).astype(int).clip(1, 1024)
    rows = best_fit(lengths, 1024)
    assert lengths.sum() / (len(rows) * 1024) > 0.99


def test_what_is_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="51"):
        best_fit([3, 51], 50)


def test_nothing_needs_no_row() -> None:
    assert best_fit([], 8) == []


def test_balanced_parts_are_few_and_even() -> None:
    lengths = np.random.default_rng(0).integers(20, 200, size=100)
    parts = balanced(lengths, 1024, multiple=4)
    loads = [int(lengths[part].sum()) for part in parts]
    assert len(parts) == 4 * -(-int(lengths.sum()) // 4096)
    assert max(loads) <= 1024 and max(loads) - min(loads) < 30
    assert loads == sorted(loads, reverse=True)


@pytest.mark.parametrize("multiple", [1, 2, 3])
@pytest.mark.parametrize("seed", range(20))
def test_parts_of_like_lengths_fit_when_padded(seed: int, multiple: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.lognormal(4, 0.8, size=rng.integers(1, 80)).astype(int).clip(1, 256)
    parts = like_lengths(lengths, 512, multiple)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert len(parts) % multiple == 0
    areas = [len(part) * int(lengths[part].max()) for part in parts if part]
    assert max(areas) <= 512
    padded = sum(areas)
    shuffled = [rng.permutation(len(lengths))[i : i + 4] for i in range(0, len(lengths), 4)]
    assert len(lengths) < 8 or padded < sum(len(part) * int(lengths[part].max()) for part in shuffled)
