"""Keys and values of what was generated so far, with room for what is to come.

transformers' own cache copies all of it for every new token, and on a CPU torch's attention takes several times as long for a
single query in bf16 as two products of matrices: together more than half the time of its `generate` with a small model.

Legend: B rows, H heads of keys and values, T tokens so far, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PRODUCTS = "products_for_single_queries"  # as transformers knows it


class RoomyLayer(DynamicLayer):
    """Rows have space for `room` tokens more than were known when it was made; a new one is written into its place."""

    keys: Tensor  # those known, [B, H, T, D]
    values: Tensor

    def __init__(self, room: int, across: bool):
        super().__init__()
        self.room = room
        self._across = across  # a key stands across the rows of memory, as the product with a query wants it
        self._held: tuple[Tensor, ...] = ()  # keys and values [B, H, T + room, D]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            # The first are those of prompts, which `reorder_cache` makes rows of.
            self._held = self._space(key_states, end, self._across), self._space(value_states, end)
        elif end > self._held[0].shape[2]:
            self._take(self.keys, self.values)
        for held, new in zip(self._held, (key_states, value_states), strict=True):
            held[: len(new), :, start:end] = new
        self._show(len(key_states), end)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i is what row `beam_idx[i]` was. A row that stays where it is costs nothing, unless they become more."""
        if len(beam_idx) > len(self._held[0]):
            self._take(self.keys[beam_idx], self.values[beam_idx])
        else:
            moved = (beam_idx != torch.arange(len(beam_idx), device=beam_idx.device)).nonzero().squeeze(1)
            for held, shown in zip(self._held, (self.keys, self.values), strict=True):
                held[moved, :, : shown.shape[2]] = shown[beam_idx[moved]]
        self._show(len(beam_idx), self.keys.shape[2])

    def _take(self, keys: Tensor, values: Tensor) -> None:
        """Move what is known to where there is room for more."""
        length = keys.shape[2]
        self._held = self._space(keys, length + self.room, self._across), self._space(values, length + self.room)
        for held, known in zip(self._held, (keys, values), strict=True):
            held[:, :, :length] = known

    @staticmethod
    def _space(like: Tensor, length: int, across: bool = False) -> Tensor:
        rows, heads, _, size = like.shape
        return like.new_empty(rows, heads, size, length).mT if across else like.new_empty(rows, heads, length, size)

    def _show(self, rows: int, length: int) -> None:
        self.keys, self.values = (held[:rows, :, :length] for held in self._held)


def roomy_cache(hf: PreTrainedModel, room: int) -> DynamicCache:
    """An empty cache for `hf`. Layers that keep a window or a state instead of every token stay transformers' own."""
    across = hf.config._attn_implementation == PRODUCTS
    cache = DynamicCache(config=hf.config)
    cache.layers = [RoomyLayer(room, across) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def attend_by_products(hf: PreTrainedModel) -> None:
    """On a CPU, where the architecture knows torch's attention and no other was asked for."""
    if hf.device.type == "cpu" and hf.config._attn_implementation == "sdpa":
        hf.set_attn_implementation(PRODUCTS)


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa, but for a single query. Heads that share keys and values are queries of one head there, so that
    nothing is repeated."""
    rows, heads, queries, size = query.shape
    if queries > 1 or settings.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key.contiguous(), value, attention_mask, **settings)
    scale = settings["scaling"] if settings.get("scaling") is not None else size**-0.5
    scores = (query * scale).view(rows, key.shape[1], -1, size) @ key.mT
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).view(rows, 1, heads, -1), None


AttentionInterface.register(PRODUCTS, _attention)
AttentionMaskInterface.register(PRODUCTS, sdpa_mask)
