"""The arithmetic that makes one optimizer step independent of how its examples are split.

Each loss term is a sum over elements (tokens, sequences, pairs). Its count over the *whole* step, on all ranks, is
known before the first forward, and every partial sum is divided by it. So the loss and gradient are the same for any
micro-batch size and number of ranks; averaging means of unequal micro-batches would weight their tokens unequally.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from llmscale import distributed
from llmscale.batch import Batch, token_tensors
from llmscale.errors import NumericsError
from llmscale.models.adapters import layer_of
from llmscale.protocols import LossSums

DIVERGED = "Lower it, or look at the data."


def same_number_on_all_ranks(micro_batches: Sequence[Batch], empty: Callable[[], Batch]) -> list[Batch]:
    """Append empty micro-batches until every rank has as many as the busiest one, and at least one: collectives inside
    a forward or backward hang when a rank does not take part."""
    needed = int(distributed.all_reduce({"n": len(micro_batches)}, op="max")["n"])
    return [*micro_batches, *(empty() for _ in range(max(needed, 1) - len(micro_batches)))]


def empty_rows() -> Batch:
    """A batch without real tokens, for a forward that only takes part."""
    return Batch(token_tensors([]))


class StepTotals:
    """The counts of a whole step, and its sums as they come in."""

    def __init__(self, micro_batches: Sequence[Batch]):
        local = {"num_tokens": float(sum(b.num_tokens for b in micro_batches))}
        for batch in micro_batches:
            for term, count in batch.counts.items():
                local[f"count/{term}"] = local.get(f"count/{term}", 0.0) + count
        self.counts = distributed.all_reduce(local)
        self._sums: dict[str, tuple[Tensor, str]] = {}
        self._maxima: dict[str, Tensor] = {}

    def add(self, sums: LossSums) -> Tensor:
        """Take in one micro-batch; returns its part of the step's loss, to call backward on."""
        named = {f"loss/{term}": (value, term) for term, value in sums.terms.items()} | sums.metrics
        for name, (value, term) in named.items():
            before = self._sums[name][0] if name in self._sums else 0.0
            self._sums[name] = (before + value.detach().double(), term)
        for name, value in sums.maxima.items():
            self._maxima[name] = torch.maximum(value, self._maxima.get(name, value))
        parts = [value / self._count(term) for term, value in sums.terms.items()]
        return torch.stack(parts).sum()

    def metrics(self) -> dict[str, float]:
        """Means and maxima over the whole step, the same on every rank; `loss` is the sum of its terms."""
        local = {name: float(value) / self._count(term) for name, (value, term) in self._sums.items()}
        means = distributed.all_reduce(local)
        terms = [name for name in means if name.startswith("loss/")]
        means["loss"] = sum(means[name] for name in terms)
        if len(terms) == 1:
            del means[terms[0]]
        largest = {name: float(value) for name, value in self._maxima.items()}
        maxima = distributed.all_reduce(largest, op="max") if largest else {}
        return means | maxima | {"num_tokens": self.counts["num_tokens"]}

    def _count(self, term: str) -> float:
        # A term that counts nothing in the whole step has a sum of zero: any divisor gives zero.
        return self.counts[f"count/{term}"] or 1.0


def not_finite(metrics: Mapping[str, float]) -> str | None:
    """What about a step's numbers is not finite, if anything."""
    if not math.isfinite(metrics["loss"]):
        broken = [n for n, value in metrics.items() if n.startswith("loss/") and not math.isfinite(value)]
        return f"the loss is {metrics['loss']}" + (f" ({', '.join(broken)})" if broken else "")
    if not math.isfinite(metrics.get("grad_norm", 0.0)):
        return f"the gradient norm is {metrics['grad_norm']}"
    return None


def require_finite(metrics: Mapping[str, float]) -> bool:
    """What an engine's `step` accepts by default.

    Raises: NumericsError when the loss or the gradient norm is not finite.
    """
    if what := not_finite(metrics):
        raise NumericsError(what, where="optim.lr", fix=DIVERGED)
    return True


def parameter_buckets(
    model: nn.Module, bucket_bytes: int, trained_only: bool = False
) -> Iterator[dict[str, nn.Parameter]]:
    """Named weights in groups of at most `bucket_bytes` (or one weight, with what an adapter adds to it); a tied weight
    appears once."""
    bucket: dict[str, nn.Parameter] = {}
    size = 0
    wanted = [pair for pair in model.named_parameters() if pair[1].requires_grad or not trained_only]
    for _, layer in groupby(wanted, key=lambda pair: layer_of(pair[0])):
        together = dict(layer)
        num_bytes = sum(_whole_numel(p) * p.element_size() for p in together.values())
        if bucket and size + num_bytes > bucket_bytes:
            yield bucket
            bucket, size = {}, 0
        bucket |= together
        size += num_bytes
    if bucket:
        yield bucket


def _whole_numel(parameter: nn.Parameter) -> int:
    """Under ZeRO-3 a parameter's own storage is empty; `ds_numel` is its full size."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
