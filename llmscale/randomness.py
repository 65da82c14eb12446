"""Randomness as a function of what it is for, instead of a stream: whoever asks, in whatever order, gets the same words."""

from __future__ import annotations

from zlib import crc32

import numpy as np

_WORD = 1 << 64


def random_words(seed: int, purpose: str, *counter: int, size: int) -> np.ndarray:
    """uint64 [size], a function of (seed, purpose, counter) alone; up to three numbers count.

    Philox 4x64 (Salmon et al. 2011) advances the lowest word of its counter by one for each four words that it gives, so
    that word stays 0 here: a number in it would give the next number's words once more, shifted. Raw words, because
    numpy promises those to stay the same from version to version, and what it makes of them not.
    """
    if len(counter) > 3:
        raise ValueError(f"at most three numbers count, got {len(counter)}")
    key = np.array([seed % _WORD, crc32(purpose.encode())], dtype=np.uint64)
    words = np.array([0, *(n % _WORD for n in counter), *([0] * (3 - len(counter)))], dtype=np.uint64)
    return np.random.Philox(key=key, counter=words).random_raw(size)


def permutation(seed: int, purpose: str, *counter: int, size: int) -> np.ndarray:
    """int64 [size]: 0 .. size - 1 in a random order."""
    return np.argsort(random_words(seed, purpose, *counter, size=size), kind="stable")
