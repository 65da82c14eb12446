"""The arithmetic of one step: counts of the whole, sums as they come."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from llmscale.batch import Batch, token_tensors
from llmscale.engine.accounting import (
    StepTotals,
    empty_rows,
    parameter_buckets,
    require_finite,
    same_number_on_all_ranks,
)
from llmscale.errors import NumericsError
from llmscale.protocols import LossSums
from tests.tiny import language_model


def batches(*counts: dict[str, float]) -> list[Batch]:
    return [Batch(token_tensors([torch.arange(3).numpy()]), dict(count)) for count in counts]


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, requires_grad=True)


def test_each_term_is_divided_by_its_own_count_over_the_whole_step():
    totals = StepTotals(batches({"tokens": 4, "pairs": 1}, {"tokens": 6, "pairs": 1}))
    first, second = scalar(10.0), scalar(5.0)
    part = totals.add(LossSums({"tokens": first, "pairs": second}, {"seen": (torch.tensor(3.0), "pairs")}))
    assert part.item() == pytest.approx(10 / 10 + 5 / 2)
    part.backward()
    assert (first.grad, second.grad) == (pytest.approx(0.1), pytest.approx(0.5))
    totals.add(LossSums({"tokens": scalar(20.0), "pairs": scalar(1.0)}, {"seen": (torch.tensor(1.0), "pairs")}))
    assert totals.metrics() == pytest.approx(
        {"loss/tokens": 3.0, "loss/pairs": 3.0, "loss": 6.0, "seen": 2.0, "num_tokens": 6.0}
    )


def test_a_maximum_is_that_of_all_micro_batches():
    totals = StepTotals(batches({"tokens": 4}, {"tokens": 4}))
    for largest in (0.5, 2.0, 1.0):
        totals.add(LossSums({"tokens": scalar(2.0)}, maxima={"gap": torch.tensor(largest)}))
    assert totals.metrics()["gap"] == 2.0
    totals.add(LossSums({"tokens": scalar(2.0)}, maxima={"gap": torch.tensor(math.nan)}))
    assert math.isnan(totals.metrics()["gap"])


def test_one_term_is_called_the_loss():
    totals = StepTotals(batches({"tokens": 4}))
    totals.add(LossSums({"tokens": scalar(2.0)}))
    assert totals.metrics() == {"loss": 0.5, "num_tokens": 3.0}


def test_nothing_counted_is_a_loss_of_zero():
    totals = StepTotals(batches({"tokens": 0}))
    assert totals.add(LossSums({"tokens": scalar(0.0)})).item() == 0
    assert totals.metrics()["loss"] == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_term_is_named(value: float):
    totals = StepTotals(batches({"tokens": 4, "pairs": 1}))
    totals.add(LossSums({"tokens": scalar(2.0), "pairs": scalar(value)}))
    with pytest.raises(NumericsError, match=rf"the loss is {value} \(loss/pairs\)"):
        require_finite(totals.metrics())
    with pytest.raises(NumericsError, match=f"the gradient norm is {value}"):
        require_finite({"loss": 1.0, "grad_norm": value})
    assert require_finite({"loss": 1.0, "grad_norm": 1.0}) and require_finite({"loss": 1.0})


def test_sums_do_not_lose_small_parts():
    """A million micro-batches of the same size would drift in fp32."""
    totals = StepTotals(batches({"tokens": 1.0}))
    for value in (2.0**24, 1.0, 1.0):
        totals.add(LossSums({"tokens": torch.tensor(value)}))
    assert totals.metrics()["loss"] == 2**24 + 2


def test_one_process_gets_at_least_one_micro_batch():
    assert len(same_number_on_all_ranks([], empty_rows)) == 1
    own = batches({}, {})
    assert same_number_on_all_ranks(own, empty_rows) == own
    assert empty_rows().num_tokens == 0


@pytest.mark.parametrize("bucket_bytes", [1, 100, 40 * 4, 10**9])
def test_buckets_hold_each_weight_once_up_to_their_size(bucket_bytes: int):
    model = nn.ParameterDict({f"p{i}": nn.Parameter(torch.zeros(n)) for i, n in enumerate([10, 30, 5, 5, 50])})
    buckets = list(parameter_buckets(model, bucket_bytes))
    assert [name for bucket in buckets for name in bucket] == [name for name, _ in model.named_parameters()]
    for bucket, following in zip(buckets, [*buckets[1:], None], strict=True):
        size = sum(p.numel() * 4 for p in bucket.values())
        assert len(bucket) == 1 or size <= bucket_bytes
        if following is not None:  # no bucket is left half empty
            assert size + next(iter(following.values())).numel() * 4 > bucket_bytes


def test_bucket_sizes_count_the_bytes_of_the_type():
    model = language_model().to(torch.bfloat16)
    assert len(list(parameter_buckets(model, 5000))) < len(list(parameter_buckets(language_model(), 5000)))
