"""Putting sequences of different lengths into rows of one capacity."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heapreplace

import numpy as np


def best_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit decreasing (Johnson 1973; for training data Ding et al. 2024): the longest first, each into the fullest row
    that still has room. Returns the indexes in each row; a pure function of its arguments. Needs at most 11/9 of the
    fewest rows possible, plus a constant; time O(n log capacity).

    Raises: ValueError when a sequence is longer than a row.
    """
    given = np.asarray(lengths, dtype=np.int64)
    if len(given) and given.max() > capacity:
        raise ValueError(f"a sequence of {given.max()} does not fit a row of {capacity}")
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # room left -> the rows that have it
    rooms: list[int] = []  # the keys of open_rows, ascending
    for index in np.argsort(-given, kind="stable").tolist():
        length = int(given[index])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[at]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[at]
        rows[row].append(index)
        if room > length:
            if room - length not in open_rows:
                insort(rooms, room - length)
                open_rows[room - length] = []
            open_rows[room - length].append(row)
    return rows


def balanced(lengths: Sequence[int] | np.ndarray, capacity: int, multiple: int = 1) -> list[list[int]]:
    """Parts of at most `capacity` each (or of one sequence), as few as that takes, their number a multiple of `multiple`, and
    nearly equal: the longest first, each to the lightest part (Graham 1969). The heaviest part comes first.

    For micro-batches: dealt out to `multiple` ranks in turn, all of them have as many, of nearly the same size.
    """
    given = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-given, kind="stable").tolist()
    count = 0
    while True:
        count = max(count + multiple, -(-int(np.minimum(given, capacity).sum()) // (capacity * multiple)) * multiple)
        lightest = [(0, part) for part in range(count)]
        parts: list[list[int]] = [[] for _ in range(count)]
        for index in order:
            load, part = lightest[0]
            parts[part].append(index)
            heapreplace(lightest, (load + int(given[index]), part))
        if all(len(parts[part]) <= 1 or load <= capacity for load, part in lightest):
            return [parts[part] for load, part in sorted(lightest, key=lambda p: (-p[0], p[1]))]


PART_TOKENS = 64  # what a part costs beside its tokens; about that of a small model on a CPU


def like_lengths(lengths: Sequence[int] | np.ndarray, capacity: int, multiple: int = 1) -> list[list[int]]:
    """As `balanced`, for sequences that are padded to the longest of their part: those of like length stand together, and
    the capacity is that of the padded part, its number of sequences times its longest.

    With `multiple` 1 the cheapest partition, each part costing its padded tokens and `PART_TOKENS`. For several ranks, which
    wait for each other, as few parts as fit, the largest of them as small as can be.
    """
    given = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-given, kind="stable").tolist()
    if multiple == 1:
        return _cheapest(given, order, capacity)
    count = -(-max(1, len(_cut(given, order, capacity))) // multiple) * multiple
    low, high = 0, capacity  # the smallest area that takes no more parts lies in (low, high]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_cut(given, order, middle)) <= count else (middle, high)
    parts = _cut(given, order, high)
    return parts + [[] for _ in range(count - len(parts))]


def _cheapest(lengths: np.ndarray, order: Sequence[int], capacity: int) -> list[list[int]]:
    """By dynamic programming over where the last part begins; O(n^2), vectorised."""
    longest = lengths[np.asarray(order, dtype=np.int64)]  # of a part that begins there
    cost, begins = np.zeros(len(order) + 1), [0]
    for end in range(1, len(order) + 1):
        sizes = np.arange(end, 0, -1)
        areas = longest[:end] * sizes
        fits = (areas <= capacity) | (sizes == 1)
        candidates = np.where(fits, cost[:end] + areas + PART_TOKENS, np.inf)
        begins.append(int(candidates.argmin()))
        cost[end] = candidates[begins[-1]]
    parts: list[list[int]] = []
    end = len(order)
    while end:
        parts.append(list(order[begins[end] : end]))
        end = begins[end]
    return parts[::-1] or [[]]


def _cut(lengths: np.ndarray, order: Sequence[int], area: int) -> list[list[int]]:
    """In this order, as few parts as fit `area` each."""
    parts: list[list[int]] = []
    for index in order:
        if not parts or int(lengths[parts[-1][0]]) * (len(parts[-1]) + 1) > area:
            parts.append([])
        parts[-1].append(index)
    return parts
