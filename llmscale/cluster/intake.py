"""Where published weights come in: fetched, checked by their fingerprints, and only then used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from llmscale import distributed
from llmscale.cluster.transports import Carrier
from llmscale.errors import DamagedWeightsError
from llmscale.protocols import RolloutEngine, WeightBucket

MAX_FETCHES = 3  # of one version


class Intake:
    """The receiving end of a role."""

    engine: RolloutEngine
    carrier: Carrier
    flip_at: float | None = None

    def load_weights(self, version: int, parcel: Any) -> int:
        """Take weights up. Those that are not what was sent are fetched again; returns how often that was needed.

        Raises: DamagedWeightsError when they never are, or cannot be fetched twice.
        """
        for again in range(MAX_FETCHES):
            try:
                self.engine.load_weights(version, self._flipped(self.carrier.receive(version, parcel)))
                return again
            except DamagedWeightsError:
                if again == MAX_FETCHES - 1 or not self.carrier.keeps:
                    raise
        raise AssertionError("unreachable")

    def flip_next(self, where: str, at: float) -> None:
        """A fault on purpose: in this worker (`rollout 1`) one bit of what arrives next is flipped, once. `at`: where in its
        first bucket, 0..1."""
        if where == f"rollout {distributed.world_from_environment().rank}":
            self.flip_at = at

    def _flipped(self, buckets: Sequence[WeightBucket]) -> Sequence[WeightBucket]:
        if self.flip_at is None:
            return buckets
        at, self.flip_at = self.flip_at, None
        return [flipped(buckets[0], at), *buckets[1:]]


def flipped(bucket: WeightBucket, at: float) -> WeightBucket:
    """A copy with one other bit; `at` is the share of its arrays that come before the one that has it, 0..1."""
    name = list(bucket.arrays)[int(at * len(bucket.arrays))]
    array = bucket.arrays[name].copy()
    array.reshape(-1).view(np.uint8)[-1] ^= 1
    return replace(bucket, arrays={**bucket.arrays, name: array})
