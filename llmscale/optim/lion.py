"""Lion (Chen et al. 2023, "Symbolic discovery of optimization algorithms", algorithm 2): the sign of an interpolated
momentum, with decoupled weight decay. Every weight moves by lr, so lr is smaller than AdamW's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

PIECE = 1 << 17  # elements; weights, gradients and momenta of one piece stay in a core's cache from pass to pass


class Lion(torch.optim.Optimizer):
    """Elementwise, so that it is the same on whole weights and on ZeRO's flat partitions of them."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            held = [p for p in group["params"] if p.grad is not None]
            beta1, beta2 = group["betas"]
            shrink = 1 - group["lr"] * group["weight_decay"]
            for weights, gradients, momenta in _batches([(p, p.grad, self._momentum(p)) for p in held]):
                directions = torch._foreach_lerp(momenta, gradients, 1 - beta1)
                torch._foreach_sign_(directions)
                torch._foreach_mul_(weights, shrink)
                torch._foreach_add_(weights, directions, alpha=-group["lr"])
                torch._foreach_lerp_(momenta, gradients, 1 - beta2)

    def _momentum(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        return state["momentum"]


def _batches(held: list[tuple[Tensor, Tensor, Tensor]]) -> Iterator[list[list[Tensor]]]:
    """Lists of weights, gradients and momenta to update at once: all of them where a kernel takes a whole list, and
    pieces for the cache on the CPU, which is three times faster there."""
    if held and held[0][0].device.type != "cpu":
        yield [list(tensors) for tensors in zip(*held, strict=True)]
        return
    for tensors in held:
        rows = [torch.atleast_1d(t) for t in tensors]
        size = max(1, PIECE * len(rows[0]) // max(1, rows[0].numel()))
        for pieces in zip(*(t.split(size) for t in rows), strict=True):
            yield [[piece] for piece in pieces]
