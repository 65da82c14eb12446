"""How a model starts under ZeRO-3 that no rank but the first can hold: its weights come from rank 0, a bucket at a time, and
each rank keeps its part of them. The other ranks build the model on the meta device. So host memory holds one copy of the
model for the whole job instead of one a rank, and no device holds more than its part and a bucket.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmscale import distributed
from llmscale.engine.accounting import parameter_buckets
from llmscale.models.loading import LanguageModel, Model

BUCKET_BYTES = 1 << 30  # of fp32; one weight may be larger


def scatter(model: Model, device: torch.device, dtype: torch.dtype, cut: Callable[[nn.Module], object]) -> Model:
    """Collective: cut the weights of rank 0's model over the ranks, in place. Those of the others do not matter. `cut` is
    `deepspeed.zero.Init`: it broadcasts one parameter after another and leaves a part of each."""
    _agree_on_head(model)
    holders: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}  # a tied weight has several
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            holders.setdefault(parameter, []).append((module, name))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, _from_rank_0(buffer, device))
    buckets = list(parameter_buckets(model, BUCKET_BYTES))
    while buckets:  # each is let go when it has been cut
        arrived = nn.ParameterList()
        for parameter in buckets.pop(0).values():
            value = _empty(parameter, device, dtype) if parameter.is_meta else parameter.detach().to(device, dtype)
            arrived.append(nn.Parameter(value, requires_grad=parameter.requires_grad))
            for module, name in holders.pop(parameter):
                setattr(module, name, arrived[-1])
        cut(arrived)
    return model


def _agree_on_head(model: Model) -> None:
    """The ranks have to run the same modules, and only one has weights to try its head with."""
    if isinstance(model, LanguageModel):
        found = distributed.all_reduce({"has_token_head": float(model.has_token_head)}, op="max")["has_token_head"]
        if found and not model.has_token_head:
            model.use_token_head()


def _from_rank_0(buffer: Tensor, device: torch.device) -> Tensor:
    value = _empty(buffer, device, buffer.dtype) if buffer.is_meta else buffer.to(device)
    dist.broadcast(value, 0)
    return value


def _empty(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.empty(tensor.shape, device=device, dtype=dtype)
