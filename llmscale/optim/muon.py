"""Muon (Jordan et al. 2024) for the matrices of the blocks and AdamW for every other weight, as one optimizer.

Muon's updates are scaled to the size of AdamW's (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2: by
0.2 sqrt(max(rows, columns))), so one learning rate and one weight decay serve both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class MuonWithAdamW(torch.optim.Optimizer):
    """Both parts act on this object's `param_groups` and `state`, so that it is saved, loaded and steered as one."""

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW):
        self.muon, self.adamw = muon, adamw
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        self.muon.step()
        self.adamw.step()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """`load_state_dict` ends here, with new groups and a new state."""
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        own = len(self.muon.param_groups)
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:own], self.param_groups[own:]
        self.muon.state = self.adamw.state = self.state


def block_matrices(model: nn.Module) -> list[Tensor]:
    """Matrices inside a decoder's stack of blocks, which is an nn.ModuleList in every architecture of transformers;
    embeddings and heads lie outside, for Muon is not meant for them (Jordan et al. 2024)."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    inside = {id(p): p for stack in stacks for p in stack.parameters()}
    return [p for p in inside.values() if p.requires_grad and p.ndim == 2]
