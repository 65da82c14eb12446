"""Attention over packed rows, one document after another: what stands in other documents is neither computed nor masked.

Positions say what sees what. They count up by one as long as a sequence goes on. One that begins at 0 is a document. One
that begins at p > 0 is a branch: it goes on after the first p tokens of the last document, as another sample
goes on after the same prompt, whose keys and values several samples share that way.

Legend: B rows, T tokens, H heads, D head size, Q tokens of a run, K tokens that its last one sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llmscale.errors import ModelError
from llmscale.models.loading import Model, isolates

DOCUMENTS = "by_document"  # as transformers knows it
NOT_HERE = ("sliding_window", "softcap", "s_aux", "position_bias")  # what some architectures do to attention besides
# Up to so many keys torch's attention on a CPU takes half the time in fp32 that it takes in bf16, and not more beyond.
WIDE_KEYS = 512
# Documents of few tokens are attended to together, under a mask: a call for each would cost more than it saves.
TOGETHER_TOKENS = 64


@dataclass(frozen=True)
class Run:
    """What one call attends to: a branch, a document, or several short ones in a row."""

    length: int  # Q
    document: int | None = None  # for a branch: the number of the run that it goes on from
    seen: int = 0  # how many tokens of that
    mask: Tensor | None = None  # bool [Q, K]; None: each token sees those before it


def runs_of(positions: Tensor) -> list[Run]:
    """What one row holds; positions: [T]."""
    starts = [0, *((positions.diff() != 1).nonzero().flatten() + 1).tolist()]
    seen = [0, *positions[starts[1:]].tolist()]  # how many tokens of a document each goes on from; 0: it is one itself
    is_trunk = [*(n > 0 for n in seen[1:]), False]
    runs: list[Run] = []
    first = document = 0  # where the last run begins; the number of the last that is no branch
    for number, (start, stop) in enumerate(pairwise([*starts, len(positions)])):
        if seen[number]:
            runs.append(
                Run(stop - start, document, seen[number], _of_branch(stop - start, seen[number], positions.device))
            )
        elif runs and runs[-1].document is None and stop - first <= TOGETHER_TOKENS and not is_trunk[number]:
            runs[-1] = Run(stop - first, mask=_of_several(positions[first:stop]))
            continue
        else:
            document = len(runs)
            runs.append(Run(stop - start))
        first = start
    return runs


def _of_branch(length: int, seen: int, device: torch.device) -> Tensor:
    """[Q, K]: all that was before, and its own tokens up to each."""
    return torch.ones(length, seen + length, dtype=torch.bool, device=device).tril(seen)


def _of_several(positions: Tensor) -> Tensor:
    """[Q, Q]: the tokens of the same document up to each."""
    document = (positions == 0).cumsum(0)
    return (document[:, None] == document).tril()


class ByDocument:
    """What transformers calls in each layer instead of its own sdpa."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, list[list[Run]]] | None = None

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **settings: Any
    ) -> tuple[Tensor, None]:
        """query: [B, H, T, D] -> [B, T, H, D]. Raises: ModelError where an architecture wants another attention."""
        positions = settings.pop("position_ids", None)
        unusual = not getattr(module, "is_causal", True) or any(settings.get(n) is not None for n in NOT_HERE)
        if positions is None or key.shape[2] != query.shape[2] or unusual:
            what = f"attention by document is not made for a {type(module).__name__}"
            raise ModelError(what, where="engine.attention", fix="Leave it at auto.")
        rows = self._runs(positions)
        if all(len(runs) == 1 and runs[0].mask is None for runs in rows):
            return _attend(module, query, key, value, None, **settings), None
        whole = zip(rows, query.split(1), key.split(1), value.split(1), strict=True)
        return torch.cat([_row(module, *row, **settings) for row in whole]), None

    def _runs(self, positions: Tensor) -> list[list[Run]]:
        if self._last is None or self._last[0] is not positions:  # the layers of one forward pass the same tensor
            self._last = positions, [runs_of(row) for row in positions]
        return self._last[1]


def attend_by_document(model: Model) -> bool:
    """Let a model attend so, if its architecture can; whether it does now."""
    if model.hf.config._attn_implementation != "sdpa":
        return False
    model.hf.set_attn_implementation(DOCUMENTS)
    try:
        works = isolates(model)
    except ModelError:
        works = False
    if not works:
        model.hf.set_attn_implementation("sdpa")
    return works


def _row(module: nn.Module, runs: list[Run], query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
    """[1, H, T, D] -> [1, T, H, D]."""
    # Split and not sliced: the gradient of a slice is as long as the row.
    lengths = [run.length for run in runs]
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
    done = []
    for number, run in enumerate(runs):
        k, v = keys[number], values[number]
        if run.document is not None:
            k, v = (torch.cat([of[run.document][:, :, : run.seen], x], 2) for of, x in ((keys, k), (values, v)))
        done.append(_attend(module, queries[number], k, v, run.mask, **settings))
    return torch.cat(done, dim=1)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any
) -> Tensor:
    narrow = value.dtype is torch.bfloat16 and value.device.type == "cpu" and key.shape[2] <= WIDE_KEYS
    if not narrow:
        return sdpa_attention_forward(module, query, key, value, mask, **settings)[0]
    with torch.autocast("cpu", enabled=False):  # it would make them bf16 again
        wide = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **settings)[0]
    return wide.to(value.dtype)


AttentionInterface.register(DOCUMENTS, ByDocument())
AttentionMaskInterface.register(DOCUMENTS, lambda *_, **__: None)
