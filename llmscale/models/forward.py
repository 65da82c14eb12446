"""How objectives see a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from llmscale.batch import Batch


class ModelForward:
    """`llmscale.protocols.Forward` of a model, or of what an engine wrapped around one."""

    def __init__(self, call: Callable[..., Any]):
        self._call = call

    def __call__(self, batch: Batch) -> Tensor:
        return self._call(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).float()

    def logprobs(
        self, batch: Batch, mask: Tensor, temperature: float = 1.0, entropy: str = "none"
    ) -> tuple[Tensor, Tensor]:
        return self._call(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            mask=mask,
            temperature=temperature,
            entropy=entropy,
        )
