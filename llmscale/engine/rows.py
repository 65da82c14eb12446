"""How attention is computed, and whether sequences share rows: one follows from the other."""

from __future__ import annotations

import torch

from llmscale import distributed
from llmscale.engine.config import EngineConfig, Precision, RowLayout
from llmscale.errors import ConfigError
from llmscale.models.attention import DOCUMENTS, attend_by_document
from llmscale.models.config import Attention
from llmscale.models.kernels import FLASH, attention_implementation
from llmscale.models.loading import Model, check_isolation


def settle_attention(config: EngineConfig, model: Model, device: torch.device) -> tuple[bool, bool]:
    """Give the model its attention. Returns whether sequences are packed into rows, and whether they branch there.

    Left to itself (`auto`) a CPU attends by document: padding costs it as much as a token does, and torch's attention there
    computes what a mask hides. Collective: all ranks decide alike.

    Raises: ConfigError when the choices cannot go together; ModelError when documents of a row would see one another.
    """
    wanted = config.attention is Attention.by_document
    attention = (
        None if wanted else attention_implementation(config.attention, device, config.precision is Precision.bf16)
    )
    if attention == FLASH and config.rows is RowLayout.padded:  # it tells documents apart in a single row only
        fix = "Leave it at auto, or set engine.attention=sdpa."
        raise ConfigError("flash attention packs rows", where="engine.rows", fix=fix)
    if wanted or (attention is None and config.rows is not RowLayout.padded and _favours_documents(config, device)):
        attention = DOCUMENTS if _attends_by_document(model) else None
        if wanted and attention is None:
            what = f"a {type(model.hf).__name__} cannot attend by document"
            raise ConfigError(what, where="engine.attention", fix="Leave it at auto.")
    elif attention is not None:
        model.hf.set_attn_implementation(attention)
    made_for_it = attention in (FLASH, DOCUMENTS)
    packed = config.rows is RowLayout.packed or (made_for_it and config.rows is RowLayout.auto)
    if packed:
        check_isolation(model)
    return packed, packed and attention == DOCUMENTS


def _favours_documents(config: EngineConfig, device: torch.device) -> bool:
    """torch.compile would compile every layer again for each new number of documents."""
    return device.type == "cpu" and config.whole_sequences and not config.compile


def _attends_by_document(model: Model) -> bool:
    """On all ranks, or on none; one that has no weights cannot tell."""
    works = attend_by_document(model)
    everywhere = not distributed.all_reduce({"fails": float(not works)}, op="max")["fails"]
    if works and not everywhere:
        model.hf.set_attn_implementation("sdpa")
    return everywhere
