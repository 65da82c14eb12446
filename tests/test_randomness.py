"""Words that are a function of what they are for."""

from __future__ import annotations

import numpy as np
import pytest

from llmscale.randomness import permutation, random_words


def test_the_words_are_pinned():
    """Runs that resume under a later version must meet the same samples."""
    assert permutation(1, "epoch", 0, size=8).tolist() == [1, 4, 0, 6, 7, 2, 5, 3]


def test_every_part_of_the_address_counts():
    addresses = [
        (0, "a", 0, 0, 0),
        (1, "a", 0, 0, 0),
        (0, "b", 0, 0, 0),
        (0, "a", 1),
        (0, "a", 0, 1),
        (0, "a", 0, 0, 1),
    ]
    assert len({tuple(random_words(*address, size=4).tolist()) for address in addresses}) == len(addresses)
    assert (random_words(0, "a", -1, size=4) != random_words(0, "a", 1, size=4)).any()


def test_neighbouring_addresses_share_no_words():
    """A number in Philox's own counter word would give the next one's words, shifted by four."""
    rows = [random_words(0, "a", n, size=64) for n in range(4)]
    assert len(np.unique(np.concatenate(rows))) == 4 * 64


def test_more_words_begin_with_the_same():
    assert (random_words(3, "a", 1, size=100)[:7] == random_words(3, "a", 1, size=7)).all()


def test_too_many_numbers():
    with pytest.raises(ValueError, match="at most three"):
        random_words(0, "a", 1, 2, 3, 4, size=1)
