"""Weights that arrive damaged are found before they are used, and fetched again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmscale.cluster.intake import MAX_FETCHES, Intake, flipped
from llmscale.cluster.transports import Direct
from llmscale.errors import WeightMismatchError
from llmscale.models.weights import fingerprint, pack, published_parameters
from llmscale.protocols import WeightBucket
from llmscale.rollout.config import HFRolloutConfig
from llmscale.rollout.hf import HFRollout
from tests.tiny import language_model, tokenizer


class Counting(Direct):
    """Damages what is received the first `broken` times."""

    def __init__(self, broken: int = 0):
        self.broken, self.received = broken, 0

    def receive(self, version: int, parcel: list[WeightBucket]) -> list[WeightBucket]:
        self.received += 1
        return [flipped(parcel[0], 0.5), *parcel[1:]] if self.received <= self.broken else parcel


class Role(Intake):
    def __init__(self, broken: int = 0):
        self.engine = HFRollout(HFRolloutConfig(max_new_tokens=2), language_model(), tokenizer(), 0, [])
        self.carrier = Counting(broken)

    def held(self) -> str:
        return fingerprint(published_parameters(self.engine.model))


def parcel() -> tuple[list[WeightBucket], str]:
    model = language_model(seed=1)
    return [pack(published_parameters(model), torch.float32)], fingerprint(published_parameters(model))


@pytest.mark.parametrize("broken", range(MAX_FETCHES))
def test_what_is_damaged_is_fetched_again(broken: int) -> None:
    role, (sent, digest) = Role(broken), parcel()
    assert role.load_weights(1, sent) == broken and role.carrier.received == broken + 1
    assert role.held() == digest and role.engine.version == 1


def test_what_stays_damaged_is_never_held() -> None:
    role, (sent, _) = Role(MAX_FETCHES), parcel()
    before = role.held()
    with pytest.raises(WeightMismatchError, match="not those published"):
        role.load_weights(1, sent)
    assert role.held() == before and role.engine.version == 0 and role.carrier.received == MAX_FETCHES


def test_what_cannot_be_fetched_twice_is_not() -> None:
    role, (sent, _) = Role(1), parcel()
    role.carrier.keeps = False
    with pytest.raises(WeightMismatchError, match="not those published"):
        role.load_weights(1, sent)
    assert role.carrier.received == 1


@pytest.mark.parametrize("at", [0.0, 0.5, 0.999])
def test_a_fault_on_purpose_is_one_bit_of_one_worker_once(at: float, monkeypatch: pytest.MonkeyPatch) -> None:
    (sent,), digest = parcel()
    other = flipped(sent, at)
    assert other.digest == sent.digest
    bits = [np.unpackbits((a.view(np.uint8) ^ other.arrays[n].view(np.uint8)).ravel()) for n, a in sent.arrays.items()]
    assert sum(int(b.sum()) for b in bits) == 1
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    role = Role()
    role.flip_next("rollout 0", at)  # another one
    assert role.load_weights(1, [sent]) == 0
    role.flip_next("rollout 1", at)
    assert role.load_weights(2, [sent]) == 1 and role.held() == digest
    assert role.load_weights(3, [sent]) == 0
