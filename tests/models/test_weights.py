"""Weights that travel arrive bit for bit, and any damage is seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from llmscale.errors import WeightMismatchError
from llmscale.models.weights import fingerprint, load_buckets, pack
from llmscale.protocols import WeightBucket
from tests.tiny import language_model, published, scalar_model

DTYPES = [torch.float32, torch.bfloat16]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(torch.int32 if tensor.dtype is torch.float32 else torch.int16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [language_model, scalar_model])
def test_arrive_bit_for_bit(make: Callable, dtype: torch.dtype):
    sender, receiver = make(seed=1), make(seed=2).to(dtype)
    load_buckets(receiver, published(sender, dtype), "here")
    for (name, sent), (same, held) in zip(sender.named_parameters(), receiver.named_parameters(), strict=True):
        assert name == same and torch.equal(bits(sent.to(dtype)), bits(held))


def test_every_bit_pattern_survives():
    values = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, 3.4e38])
    for dtype in DTYPES:
        bucket = pack({"w": values}, dtype)
        model = torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.zeros(5, dtype=dtype))})
        load_buckets(model, [bucket], "here")
        assert torch.equal(bits(model["w"]), bits(values.to(dtype)))


def test_bf16_travels_as_uint16():
    bucket = pack({"w": torch.tensor([1.0, -2.0])}, torch.bfloat16)
    assert bucket.dtypes == {"w": "bfloat16"} and bucket.arrays["w"].tolist() == [0x3F80, 0xC000]


def test_read_only_arrays_are_taken():
    """As Ray's object store gives them."""
    buckets = published(language_model(seed=1))
    for bucket in buckets:
        for array in bucket.arrays.values():
            array.flags.writeable = False
    load_buckets(language_model(seed=2), buckets, "here")


def test_a_bucket_is_a_snapshot():
    """In one process no copy is made on the way: training on must not change what was published."""
    model = language_model()
    buckets = published(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    load_buckets(language_model(seed=2), buckets, "here")


def test_tied_weights_travel_once_and_stay_tied():
    model = language_model(seed=2)
    buckets = published(language_model(seed=1))
    assert sum("embed" in name or "lm_head" in name for bucket in buckets for name in bucket.arrays) == 1
    load_buckets(model, buckets, "here")
    assert model.hf.lm_head.weight is model.hf.model.embed_tokens.weight
    assert torch.equal(model.hf.lm_head.weight, language_model(seed=1).hf.lm_head.weight)


def flip_a_bit(bucket: WeightBucket) -> WeightBucket:
    name, array = next(iter(bucket.arrays.items()))
    damaged = array.copy()
    damaged.view(np.uint8).reshape(-1)[-1] ^= 1
    return replace(bucket, arrays=bucket.arrays | {name: damaged})


def leave_one_out(bucket: WeightBucket) -> WeightBucket:
    return replace(bucket, arrays=dict(list(bucket.arrays.items())[1:]))


def add_one(bucket: WeightBucket) -> WeightBucket:
    return replace(bucket, arrays=bucket.arrays | {"extra": np.zeros(1)}, dtypes=bucket.dtypes | {"extra": "float32"})


def swap_two(bucket: WeightBucket) -> WeightBucket:
    """The same bytes under the wrong names."""
    shapes = {name: array.shape for name, array in bucket.arrays.items()}
    first, second = next((a, b) for a in shapes for b in shapes if a < b and shapes[a] == shapes[b])
    return replace(bucket, arrays=bucket.arrays | {first: bucket.arrays[second], second: bucket.arrays[first]})


def reshape_one(bucket: WeightBucket) -> WeightBucket:
    name, array = next((n, a) for n, a in bucket.arrays.items() if a.ndim == 2)
    return replace(bucket, arrays=bucket.arrays | {name: np.ascontiguousarray(array[:-1])})


def wrong_digest(bucket: WeightBucket) -> WeightBucket:
    return replace(bucket, digest="0" * 32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("damage", [flip_a_bit, leave_one_out, add_one, swap_two, reshape_one, wrong_digest])
def test_damage_is_seen(damage: Callable[[WeightBucket], WeightBucket], dtype: torch.dtype):
    buckets = published(language_model(seed=1), dtype)
    load_buckets(language_model().to(dtype), buckets, "here")
    for index in range(2):
        damaged = [damage(bucket) if i == index else bucket for i, bucket in enumerate(buckets)]
        with pytest.raises(WeightMismatchError) as caught:
            load_buckets(language_model().to(dtype), damaged, "weights 7")
        assert caught.value.where == "weights 7"


def test_a_bucket_sent_twice_is_seen():
    buckets = published(language_model(seed=1))
    with pytest.raises(WeightMismatchError):
        load_buckets(language_model(), [*buckets, buckets[0]], "here")


def test_another_precision_is_seen():
    with pytest.raises(WeightMismatchError):
        load_buckets(language_model(), published(language_model(seed=1), torch.bfloat16), "here")


def test_the_fingerprint_sees_names_types_shapes_and_order():
    a, b = torch.arange(6.0), torch.ones(2)
    prints = [
        fingerprint({"a": a, "b": b}),
        fingerprint({"b": b, "a": a}),
        fingerprint({"a": a, "c": b}),
        fingerprint({"a": a.reshape(2, 3), "b": b}),
        fingerprint({"a": a.to(torch.float64), "b": b}),
    ]
    assert len(set(prints)) == len(prints)
    assert fingerprint({"a": a.reshape(2, 3).T.contiguous().T}) == fingerprint({"a": a.reshape(2, 3)})
