"""A LoRA adapter in a model (Hu et al. 2021, arXiv:2106.09685): PEFT's layers beside frozen matrices, and what base and
adapter make together, computed out of place.

PEFT holds an adapted layer `X` as `X.base_layer.weight` [out, in], `X.lora_A.default.weight` [rank, in] and
`X.lora_B.default.weight` [out, rank]; no other weight has another name than in the base.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmscale.config import build
from llmscale.errors import CheckpointError, ModelError
from llmscale.models.config import AdapterConfig, LoraConfig
from llmscale.models.loading import Model, weights_digest
from llmscale.protocols import State

M = TypeVar("M", bound=Model)
NAME = "default"  # PEFT's, of the only adapter


def adapted(model: M, config: AdapterConfig | None, seed: int) -> M:
    """The model with a new adapter, where one is configured: it says what it said before, and only the adapter is trained.
    The same seed gives the same adapter."""
    if config is not None:
        model.adapter = build(config, model, seed)
    return model


class Lora:
    """What was put into a model, and how to look at that model without it or at both as one."""

    def __init__(self, config: LoraConfig, model: Model, seed: int):
        """Raises: ModelError when the model lacks a layer that the config names."""
        import peft  # not before it is needed: seconds

        transposed = any(isinstance(module, Conv1D) for module in model.modules())  # GPT-2's weights are [in, out]
        self.peft_config = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            target_modules=_targets(config, model),
            fan_in_fan_out=transposed,
            task_type=peft.TaskType.CAUSAL_LM,
            base_model_name_or_path=model.hf.name_or_path,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(self.peft_config, model.hf, NAME)
        kind = peft.tuners.lora.LoraLayer
        self._layers: dict[str, Any] = {n: module for n, module in model.named_modules() if isinstance(module, kind)}

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the model is its base. Nothing may be trained or saved there."""
        self._switch(on=False)
        try:
            yield
        finally:
            self._switch(on=True)

    def _switch(self, on: bool) -> None:
        for layer in self._layers.values():
            layer.enable_adapters(on)

    @torch.no_grad()
    def merged(self, bucket: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """W + alpha / rank * B A for each adapted W, under the name that it has in the base; all other weights as they are.
        A bucket holds all of a layer or nothing, as `llmscale.engine.accounting.parameter_buckets` makes it."""
        weights = {}
        for name, value in bucket.items():
            plain, layer = base_name(name), layer_of(name)
            if plain is None:
                continue  # it is in the sum
            if plain != name and plain == f"{layer}.weight":
                a, b = (bucket[f"{layer}.lora_{factor}.{NAME}.weight"] for factor in "AB")
                value = self._sum(self._layers[layer], value, a, b)
            weights[plain] = value
        return weights

    def _sum(self, layer: Any, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """In fp32 where the weights are bf16, and rounded once."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        change = layer.scaling[NAME] * (b.to(wide) @ a.to(wide))
        return (weight.to(wide) + (change.T if layer.fan_in_fan_out else change)).to(weight.dtype)

    def save_config(self, directory: Path) -> None:
        """adapter_config.json, as PEFT reads it."""
        config = copy.copy(self.peft_config)
        config.inference_mode = True
        config.target_modules = sorted(config.target_modules or ())  # a set: its order differs from process to process
        config.save_pretrained(str(directory))


def merged(model: Model, buckets: Iterable[Mapping[str, Tensor]]) -> Iterator[Mapping[str, Tensor]]:
    """Whole weights [out, in] as the base names them, a bucket at a time; neither base nor adapter changes."""
    return map(model.adapter.merged, buckets) if model.adapter is not None else iter(buckets)


def base_name(name: str) -> str | None:
    """What a parameter is called in the base; None: it is the adapter's."""
    return None if ".lora_" in name else name.replace(".base_layer.", ".")


def layer_of(name: str) -> str:
    """The adapted layer that a parameter belongs to; of any other parameter its own name."""
    return name.partition(".base_layer.")[0].partition(".lora_")[0]


def _targets(config: LoraConfig, model: Model) -> list[str]:
    """Last names of the layers to adapt."""
    blocks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    inside = [pair for stack in blocks for pair in stack.named_modules()]
    known = sorted({name.rpartition(".")[2] for name, module in inside if isinstance(module, nn.Linear | Conv1D)})
    targets = list(config.target_modules) or known
    unknown = [name for name in targets if name not in known]
    if unknown or not targets:
        named = f" called {unknown[0]}" if unknown else ""
        what = f"the blocks of a {type(model.hf).__name__} have no linear layer{named}"
        raise ModelError(what, where="model.adapter.target_modules", fix=f"They have: {', '.join(known) or 'none'}.")
    return targets


class FrozenBase:
    """The base in a checkpoint that holds an adapter alone: not its weights, but which they are."""

    def __init__(self, path: str):
        self.path, self._digest = path, weights_digest(path)

    def state_dict(self) -> State:
        return {"digest": self._digest}

    def load_state_dict(self, state: State) -> None:
        """Raises: CheckpointError when the base is not the one that the adapter was trained on."""
        if state["digest"] != self._digest:
            raise CheckpointError(
                "the model there is not the one that this run's adapter was trained on",
                where=self.path,
                fix="Put the old one back in its place, or start a new run under another run.name.",
            )
