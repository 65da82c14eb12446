"""How objectives see a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

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
        # Token t-1 predicts token t. Moved here and not in the model, where a rank may hold a part of each row alone.
        targets, wanted = (pad(x[:, 1:], (0, 1)) for x in (batch["input_ids"], mask))
        scores = self._call(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            targets=targets,
            wanted=wanted,
            temperature=temperature,
            entropy=entropy,
        )
        logprobs, entropies = (pad(x[:, :-1], (1, 0)) for x in scores)
        return logprobs, entropies
