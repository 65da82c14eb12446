"""The reference engine: ordinary PyTorch in one process. The other engines must equal it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmscale import distributed
from llmscale.batch import Batch
from llmscale.engine.accounting import (
    StepTotals,
    copied_to_cpu,
    parameter_buckets,
    require_finite,
    same_number_on_all_ranks,
)
from llmscale.engine.averaging import WeightAverage
from llmscale.engine.config import SingleConfig
from llmscale.engine.frozen import FrozenEngine
from llmscale.errors import ConfigError
from llmscale.models.export import SHARD_BYTES, save_hf
from llmscale.models.loading import Model
from llmscale.optim.build import build_optimizer, set_learning_rate
from llmscale.optim.config import OptimConfig
from llmscale.optim.schedule import learning_rate
from llmscale.phases import phase
from llmscale.protocols import Accept, Objective


class SingleEngine(FrozenEngine):
    """`llmscale.protocols.TrainEngine` on one device, with fp32 weights."""

    def __init__(self, config: SingleConfig, model: Model, optim: OptimConfig, total_steps: int):
        if distributed.world_size() > 1:
            raise ConfigError("one process only", where="engine=single", fix="Use engine=deepspeed for several ranks.")
        super().__init__(config, model)
        self.optim, self.total_steps = optim, total_steps
        if config.activation_checkpointing:
            self.model.hf.gradient_checkpointing_enable({"use_reentrant": False})
        if config.compile:
            self.model.compile(dynamic=True)
        self.optimizer = build_optimizer(optim, self.model)
        self.average = WeightAverage(optim.ema_decay, self.optimizer)
        self.num_steps = 0

    def step(
        self, micro_batches: Sequence[Batch], objective: Objective, accept: Accept = require_finite
    ) -> dict[str, float]:
        self.model.train()
        micro_batches = same_number_on_all_ranks(micro_batches, partial(objective.prepare, []))
        totals = StepTotals(micro_batches)
        for batch in micro_batches:
            with phase("forward"):
                loss = totals.add(objective.loss(self._forward, batch.to(self.device)))
            with phase("backward"):
                loss.backward()
        metrics = totals.metrics()
        with phase("optimizer"):
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.grad_clip or math.inf)
            metrics["grad_norm"] = float(norm)
            metrics["lr"] = learning_rate(self.optim, self.num_steps, self.total_steps)
            set_learning_rate(self.optimizer, metrics["lr"])
            if accept(metrics):
                self.optimizer.step()
                self.average.update(self.num_steps)
            self.optimizer.zero_grad(set_to_none=True)
        self.num_steps += 1
        return metrics

    def evaluate(self, micro_batches: Sequence[Batch], objective: Objective) -> dict[str, float]:
        with self.averaged():
            return super().evaluate(micro_batches, objective)

    def averaged(self) -> AbstractContextManager[None]:
        return self.average.swapped_in()

    def full_parameters(self, bucket_bytes: int) -> Iterator[dict[str, Tensor]]:
        for bucket in parameter_buckets(self.model, bucket_bytes):
            yield {name: parameter.detach() for name, parameter in bucket.items()}

    def snapshot(self) -> Callable[[Path], None]:
        weights = {name: p.detach().to("cpu", copy=True) for name, p in self.model.named_parameters()}
        optimizer = copied_to_cpu(self.optimizer.state_dict())
        num_steps = self.num_steps

        def write(directory: Path) -> None:
            save_file(weights, directory / "model.safetensors")
            torch.save({"optimizer": optimizer, "num_steps": num_steps}, directory / "optimizer.pt")

        return write

    def load(self, directory: Path) -> None:
        saved = load_file(directory / "model.safetensors", device=str(self.device))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(saved[name])
        state = torch.load(directory / "optimizer.pt", map_location=self.device, weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.num_steps = state["num_steps"]

    def export(self, directory: Path, tokenizer) -> None:
        with self.averaged():
            save_hf(self.model, tokenizer, directory, self.full_parameters(SHARD_BYTES))
