"""Optimizers and their parameter groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llmscale.errors import ConfigError
from llmscale.optim.config import OptimConfig, Optimizer
from llmscale.optim.lion import Lion
from llmscale.optim.muon import MuonWithAdamW, block_matrices

Groups = list[dict[str, Any]]
BETAS = {Optimizer.adamw: (0.9, 0.95), Optimizer.lion: (0.9, 0.99), Optimizer.muon: (0.9, 0.95)}


def parameter_groups(model: nn.Module, weight_decay: float) -> Groups:
    """Matrices decay, embeddings among them (a tied one is the output head too); biases and norms do not. A tied weight
    appears once."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if _is_matrix(p)], "weight_decay": weight_decay},
        {"params": [p for p in trained if not _is_matrix(p)], "weight_decay": 0.0},
    ]


def _is_matrix(parameter: nn.Parameter) -> bool:
    return len(getattr(parameter, "ds_shape", parameter.shape)) >= 2  # ZeRO-3 leaves a vector in its place


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The configured optimizer over the weights of `model` that are trained, on the device where they are.

    Raises: ConfigError when muon finds no matrix to work on.
    """
    groups = parameter_groups(model, config.weight_decay)
    beta1, beta2 = config.betas or BETAS[config.optimizer]
    if config.optimizer is Optimizer.lion:
        return Lion(_filled(groups), lr=config.lr, betas=(beta1, beta2))
    if config.optimizer is Optimizer.adamw:
        return _adamw(config, groups)
    matrices = block_matrices(model)
    if not matrices:
        raise ConfigError(
            "muon updates the matrices of a stack of blocks, and this model has no such stack",
            where="optim.optimizer",
            fix="Choose adamw or lion.",
        )
    muon = torch.optim.Muon(matrices, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
    taken = {id(p) for p in matrices}
    rest = [group | {"params": [p for p in group["params"] if id(p) not in taken]} for group in groups]
    return MuonWithAdamW(muon, _adamw(config, rest))


def _adamw(config: OptimConfig, groups: Groups) -> torch.optim.AdamW:
    """Fused: one pass over the memory instead of a dozen, on CUDA and on the CPU alike."""
    beta1, beta2 = config.betas or BETAS[Optimizer.adamw]
    return torch.optim.AdamW(_filled(groups), lr=config.lr, betas=(beta1, beta2), eps=config.eps, fused=True)


def _filled(groups: Groups) -> Groups:
    return [group for group in groups if group["params"]]


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
