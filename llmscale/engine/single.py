"""The reference engine: ordinary PyTorch in one process. The other engines must equal it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from llmscale import distributed
from llmscale.batch import Batch
from llmscale.engine import state
from llmscale.engine.accounting import (
    StepTotals,
    parameter_buckets,
    require_finite,
    same_number_on_all_ranks,
)
from llmscale.engine.averaging import WeightAverage
from llmscale.engine.config import SingleConfig
from llmscale.engine.frozen import FrozenEngine
from llmscale.errors import ConfigError
from llmscale.models.export import SHARD_BYTES, save_adapter, save_hf
from llmscale.models.loading import Model
from llmscale.optim.build import build_optimizer, set_learning_rate
from llmscale.optim.config import OptimConfig
from llmscale.optim.schedule import learning_rate
from llmscale.phases import phase
from llmscale.protocols import Accept, Digests, Objective


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

    def full_parameters(self, bucket_bytes: int, trained_only: bool = False) -> Iterator[dict[str, Tensor]]:
        for bucket in parameter_buckets(self.model, bucket_bytes, trained_only):
            yield {name: parameter.detach() for name, parameter in bucket.items()}

    def snapshot(self) -> Callable[[Path], Digests]:
        return state.snapshot(self._pieces(), self.num_steps, state.Part())

    def load(self, directory: Path) -> None:
        self._make_state()
        self.average.begin()
        self.num_steps = state.load(directory, self._pieces(), self.model, state.Part())

    def export(self, directory: Path, tokenizer) -> None:
        with self.averaged():
            save_hf(self.model, tokenizer, directory, self.full_parameters(SHARD_BYTES))

    def export_adapter(self, directory: Path) -> None:
        with self.averaged():
            save_adapter(self.model, directory, self.full_parameters(SHARD_BYTES, trained_only=True))

    def _move(self, device: torch.device) -> None:
        super()._move(device)
        for held in self.optimizer.state.values():  # each beside its weight: the optimizers are fused, or our own
            held |= {name: value.to(device) for name, value in held.items() if isinstance(value, Tensor)}

    def _pieces(self) -> list[state.Piece]:
        return [
            state.Piece(name, tuple(p.shape), 0, p.detach().view(-1), self.optimizer.state.get(p, {}))
            for name, p in self.model.named_parameters()
            if p.requires_grad
        ]

    def _make_state(self) -> None:
        """Let the optimizer make its state now and not in its first step: by a step of nothing."""
        set_learning_rate(self.optimizer, 0.0)
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
