"""A batch of sequences that grow by a token at a time. Legend: P prompts, B rows, T tokens so far, V vocabulary."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmscale.rollout.cache import roomy_cache


class RunningBatch:
    """Left-padded prompts and what follows them, `room` tokens at most."""

    def __init__(self, hf: PreTrainedModel, room: int):
        self._hf: Any = hf
        self._room = room
        self._cache: Any = roomy_cache(hf, room)

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The prompts, [P, T] each. Returns logits [P, V] of what follows them."""
        self._length = input_ids.shape[1]
        self._mask = torch.nn.functional.pad(attention_mask, (0, self._room), value=1)
        self._positions = attention_mask.sum(1)  # of the next token, [B]
        return self._logits(input_ids, (attention_mask.cumsum(1) - 1).clamp(min=0))

    def rearrange(self, rows: np.ndarray) -> None:
        """Row i goes on with what row `rows[i]` was; as many or as few as are named."""
        indexes = torch.from_numpy(rows).to(self._mask.device)
        self._cache.reorder_cache(indexes)
        self._mask, self._positions = self._mask[indexes], self._positions[indexes]

    def append(self, tokens: np.ndarray) -> Tensor:
        """One token a row, [B]. Returns logits [B, V] of the next."""
        input_ids = torch.from_numpy(tokens).to(self._mask.device).unsqueeze(1)
        self._length += 1
        positions, self._positions = self._positions.unsqueeze(1), self._positions + 1
        return self._logits(input_ids, positions)

    def _logits(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        output = self._hf(
            input_ids=input_ids,
            attention_mask=self._mask[:, : self._length],
            position_ids=position_ids,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]


def closed_up(going: np.ndarray) -> np.ndarray:
    """bool [B] -> int64: the rows that go on, in an order in which only those at the end move: into the gaps."""
    count = int(going.sum())
    rows = np.arange(count)
    rows[~going[:count]] = count + np.flatnonzero(going[count:])
    return rows
