"""Ulysses sequence parallelism (Jacobs et al. 2023, arXiv 2309.14509): S ranks share each sequence.

Every layer but attention works on a rank's own T/S tokens. Attention needs whole sequences: an all-to-all turns [all
heads, own tokens] into [own heads, all tokens] before it, and another back after it. The ranks of a group are given the
same rows; each cuts out its tokens before the model and joins the outputs of all after it, so that an objective sees what
it would have seen. A rank takes the gradient of its own outputs alone: the sum over the group is the whole gradient.

DeepSpeed has an implementation of its own, which is not used because of what it did here (0.19.8, two ranks, fp32):
- with ZeRO-3 every gradient is half of what it should be: `stage3.py`, `__avg_scatter_grads` divides by all ranks, and
  not, as stages 1 and 2 do, by those that have other data;
- documents packed in one row see each other with sdpa: `ulysses_sp.py`, `uattn_wrapper` drops the mask (loss 4.367
  instead of 4.206 on a row of two);
- it takes the place of sdpa for every model of the process, and one number of rows for all micro-batches.
"""

from __future__ import annotations

from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmscale.errors import ModelError
from llmscale.models.loading import Model

CORE = "sdpa"  # the attention that each rank does over its heads
_names = (f"llmscale_ulysses_{i}" for i in count())


class SequenceParallel:
    """Makes a model share its sequences with `size` neighbouring ranks: calls to it stay as they are. Collective."""

    def __init__(self, model: Model, size: int):
        self.group, self.rank, self.size = _group_of(size), dist.get_rank() % size, size
        _check(model.hf.config, size)
        self._seen: tuple[Tensor, Tensor, Tensor | None] | None = None
        name = next(_names)  # of its own: another model of this process keeps its attention
        ALL_ATTENTION_FUNCTIONS.register(name, self.attention)
        model.hf.set_attn_implementation(name)
        self._length = 0
        model.register_forward_pre_hook(self._cut, with_kwargs=True)
        model.register_forward_hook(self._join)

    def _cut(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Each [B, T] -> this rank's [B, ceil(T / S)]; what is missing at the end is padding."""
        self._length = kwargs["input_ids"].shape[1]
        own = -(-self._length // self.size)
        padding = own * self.size - self._length
        cut = {}
        for name, value in kwargs.items():
            if not isinstance(value, Tensor):  # such as a temperature
                cut[name] = value
                continue
            if padding and name == "position_ids":  # goes on, so that it is not taken for another document
                more = value[:, -1:] + torch.arange(1, padding + 1, device=value.device)
                value = torch.cat([value, more], 1)
            elif padding:
                value = nn.functional.pad(value, (0, padding))
            cut[name] = value[:, self.rank * own : (self.rank + 1) * own]
        return args, cut

    def _join(self, model: nn.Module, args: tuple, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """[B, ceil(T / S), ...] of each rank -> [B, T, ...]."""
        if isinstance(output, tuple):
            return tuple(_Join.apply(part, self)[:, : self._length] for part in output)
        return _Join.apply(output, self)[:, : self._length]

    def attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """What transformers calls in each layer. [B, heads, T / S, D] -> [B, T / S, heads, D]."""
        positions, sees = self._whole(kwargs.pop("position_ids"))
        query, key, value = (self._exchange(x, split=1, join=2) for x in (query, key, value))
        whole, _ = ALL_ATTENTION_FUNCTIONS[CORE](
            module, query, key, value, sees, position_ids=positions, **kwargs
        )  # [B, T, heads / S, D]
        return self._exchange(whole, split=1, join=2), None

    def _whole(self, own: Tensor) -> tuple[Tensor, Tensor | None]:
        """Positions [B, T], and which token sees which where a row holds several documents, [B, 1, T, T]."""
        if self._seen is None or self._seen[0] is not own:  # the layers of one forward pass the same tensor
            positions = _gather(own, self)
            documents = (positions.diff(dim=1, prepend=positions[:, :1]) != 1).cumsum(1)  # 1 on the first token already
            mask = None
            if bool((documents > 1).any()):
                causal = torch.ones(2 * (positions.shape[1],), dtype=torch.bool, device=own.device).tril()
                mask = ((documents[:, :, None] == documents[:, None]) & causal)[:, None]
            self._seen = own, positions, mask
        return self._seen[1:]

    def _exchange(self, x: Tensor, split: int, join: int) -> Tensor:
        return _Exchange.apply(x, split, join, self)


def _all_to_all(x: Tensor, split: int, join: int, group: SequenceParallel) -> Tensor:
    """Give each rank its part of dimension `split`; the parts that come lie one after another in dimension `join`."""
    outgoing = torch.stack(x.chunk(group.size, split))
    incoming = torch.empty_like(outgoing)
    dist.all_to_all_single(incoming, outgoing, group=group.group)
    return torch.cat(incoming.unbind(), join)


def _gather(x: Tensor, group: SequenceParallel) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(group.size)]
    dist.all_gather(parts, x.contiguous(), group=group.group)
    return torch.cat(parts, 1)


class _Exchange(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split: int, join: int, group: SequenceParallel) -> Tensor:
        ctx.way_back = join, split, group
        return _all_to_all(x, split, join, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:  # type: ignore[override]
        return _all_to_all(gradient, *ctx.way_back), None, None, None


class _Join(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: SequenceParallel) -> Tensor:
        ctx.group = group
        return _gather(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:  # type: ignore[override]
        return gradient.chunk(ctx.group.size, 1)[ctx.group.rank], None


def _group_of(size: int) -> Any:
    """This rank's group of neighbouring ranks."""
    world = dist.get_world_size()
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
    return groups[dist.get_rank() // size]


def _check(config: Any, size: int) -> None:
    where, config = "engine.sequence_parallel_size", config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        if getattr(config, name, size) % size:
            what, fix = f"{size} ranks cannot share {getattr(config, name)} heads ({name})", "Choose a divisor of it."
            raise ModelError(what, where=where, fix=fix)
    if config._attn_implementation != CORE or getattr(config, "sliding_window", None):
        what = f"ranks can share full attention by {CORE} alone, and this model has another"
        raise ModelError(what, where=where, fix="Set it to 1.")
