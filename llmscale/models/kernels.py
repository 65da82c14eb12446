"""Faster implementations of a model's parts, where they are installed and the device can run them."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from llmscale.errors import ConfigError
from llmscale.models.config import Attention
from llmscale.models.loading import Model

FLASH = "flash_attention_2"


def attention_implementation(wanted: Attention, device: torch.device, bf16: bool) -> str | None:
    """transformers' name of how attention is computed; None: as it chooses itself (sdpa where the architecture has it).
    `auto` takes flash-attn where it is installed and can run. By document is not here: `llmscale.models.attention`.

    Raises: ConfigError when the choice cannot run here.
    """
    if wanted in (Attention.eager, Attention.sdpa):
        return wanted.name
    lacking = _flash_lacks(device, bf16)
    if wanted is Attention.flash and lacking:
        raise ConfigError(f"flash attention needs {lacking}", where="engine.attention", fix="Leave it at auto.")
    return None if lacking else FLASH


def apply_liger(model: Model, device: torch.device) -> None:
    """Liger's fused norms, rotary embeddings and MLPs (Hsu et al. 2024). Its fused cross-entropy is left out: tokens are
    scored by `llmscale.models.head`, which holds as little and gives each token's number.

    Raises: ConfigError when it is not installed, there is no CUDA device, or it does not know the architecture.
    """
    if find_spec("liger_kernel") is None or device.type != "cuda":
        what = "Liger's kernels need the package liger-kernel and a CUDA device"
        raise ConfigError(what, where="engine.liger", fix="Leave engine.liger=false.")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance

    if model.hf.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        what = f"Liger has no kernels for {model.hf.config.model_type}"
        raise ConfigError(what, where="engine.liger", fix="Leave engine.liger=false.")
    _apply_liger_kernel_to_instance(model.hf, fused_linear_cross_entropy=False, cross_entropy=False)


def _flash_lacks(device: torch.device, bf16: bool) -> str | None:
    if find_spec("flash_attn") is None:
        return "the package flash-attn (pip install 'llmscale[flash-attn]')"
    if device.type != "cuda":
        return "a CUDA device"
    return None if bf16 else "engine.precision=bf16"
