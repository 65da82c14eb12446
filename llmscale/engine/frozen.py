"""Running a model without changing it: all that a reference policy does, and what every training engine does besides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmscale import distributed
from llmscale.batch import Batch
from llmscale.engine.accounting import StepTotals, empty_rows, require_finite, same_number_on_all_ranks
from llmscale.engine.config import EngineConfig, Precision
from llmscale.engine.rows import settle_attention
from llmscale.models.forward import ModelForward
from llmscale.models.kernels import apply_liger
from llmscale.models.loading import Model
from llmscale.phases import phase
from llmscale.protocols import Forward, Objective


class FrozenEngine:
    """`forward` and `evaluate` of `llmscale.protocols.TrainEngine`. bf16 is autocast over the weights as they are."""

    module: nn.Module  # what is called: the model itself, or what an engine wrapped around it

    def __init__(self, config: EngineConfig, model: Model):
        self.config, self.device = config, distributed.device()
        self.packed, self.branching = settle_attention(config, model, self.device)
        if config.liger:
            apply_liger(model, self.device)
        self.model = self._placed(model)
        self.module = self.model
        self._forward = ModelForward(self._call)

    def _placed(self, model: Model) -> Model:
        return model.to(self.device)

    def sleep(self) -> None:
        self._move(torch.device("cpu"))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # torch would keep what is free for itself

    def wake(self) -> None:
        self._move(self.device)

    def _move(self, device: torch.device) -> None:
        self.model.to(device)

    @torch.no_grad()
    def forward(
        self, micro_batches: Sequence[Batch], compute: Callable[[Forward, Batch], dict[str, Tensor]]
    ) -> list[dict[str, Tensor]]:
        self.module.eval()
        together = same_number_on_all_ranks(micro_batches, empty_rows)
        results = [compute(self._forward, batch.to(self.device)) for batch in together][: len(micro_batches)]
        return [{name: value.cpu() for name, value in result.items()} for result in results]

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Batch], objective: Objective) -> dict[str, float]:
        self.module.eval()
        micro_batches = same_number_on_all_ranks(micro_batches, partial(objective.prepare, []))
        totals = StepTotals(micro_batches)
        for batch in micro_batches:
            with phase("forward"):
                totals.add(objective.loss(self._forward, batch.to(self.device)))
        metrics = totals.metrics()
        require_finite(metrics)
        return metrics

    def _call(self, **inputs: Any) -> Any:
        bf16 = self.config.precision is Precision.bf16
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            return self.module(**inputs)
