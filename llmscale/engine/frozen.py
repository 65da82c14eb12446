"""A model that only looks: the reference policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmscale import distributed
from llmscale.batch import Batch
from llmscale.engine.config import EngineConfig, Precision
from llmscale.models.loading import Model
from llmscale.protocols import Forward


class FrozenEngine:
    """`forward` of `llmscale.protocols.TrainEngine` without optimizer state, in the precision of its neighbour."""

    def __init__(self, config: EngineConfig, model: Model):
        self.config, self.device = config, distributed.device()
        self.model = model.to(self.device).eval()

    @torch.no_grad()
    def forward(
        self, micro_batches: Sequence[Batch], compute: Callable[[Forward, Batch], dict[str, Tensor]]
    ) -> list[dict[str, Tensor]]:
        results = [compute(self._forward, batch.to(self.device)) for batch in micro_batches]
        return [{name: value.cpu() for name, value in result.items()} for result in results]

    def _forward(self, batch: Batch) -> Tensor:
        bf16 = self.config.precision is Precision.bf16
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            return self.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).float()
