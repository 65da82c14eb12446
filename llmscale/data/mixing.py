"""Several sources in one stream of samples, each at its rate.

Rates are given, or follow from sizes n: n^(1/T), temperature T (1: proportional), after an artificial limit K, min(n, K)
(Raffel et al. 2020, arXiv:1910.10683, section 3.5.2).

The stream is cut into blocks of 4096 positions. Every block has the same whole number of each source, in an order of its
own, and each source runs through one permutation of itself after the other. So which sample stands at a position is a
function of (sizes, rates, seed, position), and at the end of each block every source has had exactly its share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llmscale.data.config import DataConfig
from llmscale.data.loader import SampleOrder
from llmscale.errors import ConfigError
from llmscale.randomness import permutation

BLOCK = 4096


@dataclass(frozen=True)
class Mixture:
    """Sources that have examples one behind the other in one sequence; `sizes` in examples."""

    sizes: Mapping[str, int]
    quotas: Mapping[str, int]  # of the BLOCK positions

    @classmethod
    def of(cls, sizes: Mapping[str, int], config: DataConfig) -> Mixture:
        """Raises: ConfigError for more sources than positions in a block."""
        if len(sizes) > BLOCK:
            raise ConfigError(f"at most {BLOCK} sources can be mixed, these are {len(sizes)}", where="data.mixture")
        if config.mixture_weights:
            rates = np.array([config.mixture_weights[name] for name in sizes])
        else:
            capped = np.minimum(list(sizes.values()), config.mixture_cap or np.inf)
            rates = (capped / capped.max()) ** (1 / config.mixture_temperature)
        return cls(sizes, dict(zip(sizes, quotas(rates).tolist(), strict=True)))

    def plan(self, num_samples: int) -> dict[str, dict[str, float]]:
        """Of each source its size, its rate, and how often `num_samples` samples go through it."""
        rates = {name: quota / BLOCK for name, quota in self.quotas.items()}
        return {
            name: {
                "examples": size,
                "rate": round(rates[name], 4),
                "epochs": round(num_samples * rates[name] / size, 2),
            }
            for name, size in self.sizes.items()
        }


def quotas(rates: np.ndarray) -> np.ndarray:
    """int64 [sources], in all BLOCK: rates [sources] above 0 as whole numbers by largest remainder, at least 1 each."""
    is_small = np.zeros(len(rates), dtype=bool)  # gets 1, which is more than its share
    while True:
        exact = rates / rates[~is_small].sum() * (BLOCK - is_small.sum())
        more = ~is_small & (exact < 1 - 1e-9)
        if not more.any():
            break
        is_small |= more
    exact[is_small] = 1.0
    whole = np.floor(exact + 1e-9).astype(np.int64)
    rest = BLOCK - int(whole.sum())
    whole[np.argsort(whole - exact, kind="stable")[:rest]] += 1
    return whole


class MixedOrder:
    """Like SampleOrder, over the sources' examples one behind the other."""

    def __init__(self, mixture: Mixture, seed: int):
        sizes = list(mixture.sizes.values())
        self.seed = seed
        self._quotas = list(mixture.quotas.values())
        self._slots = np.repeat(np.arange(len(sizes)), self._quotas)
        self._firsts = np.cumsum([0, *sizes[:-1]]).tolist()
        self._orders = [SampleOrder(size, seed, stream) for stream, size in enumerate(sizes)]
        self._latest = (
            -1,
            np.empty(0, dtype=np.int64),
        )  # a block and its indexes; one pair, because threads may share this

    def batch(self, step: int, global_batch_size: int) -> list[int]:
        """Indexes of global batch `step`; steps count from 0."""
        start = step * global_batch_size
        return self.at(np.arange(start, start + global_batch_size)).tolist()

    def at(self, positions: np.ndarray) -> np.ndarray:
        """int64 [N] -> int64 [N]: the indexes of the samples at these positions of the stream."""
        blocks, within = np.divmod(positions, BLOCK)
        indexes = np.empty_like(within)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            indexes[here] = self._of_block(block)[within[here]]
        return indexes

    def _of_block(self, block: int) -> np.ndarray:
        known, indexes = self._latest
        if block != known:
            sources = self._slots[permutation(self.seed, "mixture", block, size=BLOCK)]
            drawn = [
                first + order.at(np.arange(block * quota, (block + 1) * quota))
                for first, quota, order in zip(self._firsts, self._quotas, self._orders, strict=True)
            ]
            indexes = np.empty(BLOCK, dtype=np.int64)
            indexes[np.argsort(sources, kind="stable")] = np.concatenate(drawn)
            self._latest = block, indexes
        return indexes
