"""Writing a model as a Hugging Face folder, in the memory of one bucket of weights beside the model itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from llmscale.errors import NumericsError
from llmscale.models.adapters import NAME, base_name, merged
from llmscale.models.loading import Model

SHARD_BYTES = 2 << 30  # of one file, and so of the weights that an export holds at a time


def save_hf(
    model: Model, tokenizer: PreTrainedTokenizerFast, directory: Path, buckets: Iterable[Mapping[str, Tensor]]
) -> None:
    """Write a folder that transformers, vLLM and PEFT load as it is. Each of `buckets` becomes a file as it comes; the
    weights are named as in `model`, whose own values do not matter, a tied one once. An adapter is merged into its base.

    Raises: NumericsError when a weight is not finite.
    """
    hf, buckets = model.hf, merged(model, buckets)
    directory.mkdir(parents=True, exist_ok=True)
    if _is_converted(model):
        # transformers holds these weights fused or under other names than its files do (most mixtures of experts), and a
        # weight of a file may need several of the model's: it converts all of them at once.
        weights = {n: v.to("cpu", copy=True) for bucket in buckets for n, v in _checked(bucket).items()}
        hf.save_pretrained(directory, state_dict=weights | persistent_buffers(model))
    else:
        dtype = _save_shards(directory, buckets, persistent_buffers(model))
        # As save_pretrained does.
        hf.config.dtype, hf.config.architectures = str(dtype).removeprefix("torch."), [type(hf).__name__]
        hf.config.save_pretrained(directory)
        if hf.can_generate():
            hf.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def save_adapter(model: Model, directory: Path, buckets: Iterable[Mapping[str, Tensor]]) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` loads on the base; `buckets` hold what is trained.

    Raises: NumericsError when a weight is not finite.
    """
    assert model.adapter is not None
    directory.mkdir(parents=True, exist_ok=True)
    weights = {n: v.to("cpu", copy=True) for bucket in buckets for n, v in _checked(bucket).items()}
    # PEFT's own name of the adapter is not in its files, and its model wraps that of transformers twice.
    named = {f"base_model.model.{name.replace(f'.{NAME}.', '.')}": value for name, value in weights.items()}
    save_file(named, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    model.adapter.save_config(directory)


def persistent_buffers(model: Model) -> dict[str, Tensor]:
    """What a saved model holds besides its parameters, such as the correction bias of DeepSeek-V3's router."""
    saved = model.hf.state_dict().keys()
    return {name: value for name, value in model.hf.named_buffers() if name in saved}


def _save_shards(
    directory: Path, buckets: Iterable[Mapping[str, Tensor]], in_first: Mapping[str, Tensor]
) -> torch.dtype:
    """One file a bucket, and an index where there are several. Returns the type of the first weight."""
    shards: list[dict[str, Tensor]] = []  # of each: what it holds, without the values
    for bucket in buckets:
        held = {name: value.contiguous() for name, value in _checked(bucket).items()} | (
            dict(in_first) if not shards else {}
        )
        save_file(held, directory / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append({name: value.to("meta") for name, value in held.items()})
        del bucket, held  # else they would still be there while the next one is gathered
    stem, suffix = SAFE_WEIGHTS_NAME.split(".")
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.{suffix}" for i in range(len(shards))]
    names = names if len(shards) > 1 else [SAFE_WEIGHTS_NAME]
    for i, name in enumerate(names):
        (directory / f"shard-{i}").rename(directory / name)
    every = [value for shard in shards for value in shard.values()]
    if len(shards) > 1:
        size = {"total_parameters": sum(v.numel() for v in every), "total_size": sum(v.nbytes for v in every)}
        index = {
            "metadata": size,
            "weight_map": {n: name for name, shard in zip(names, shards, strict=True) for n in shard},
        }
        (directory / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return every[0].dtype


def _checked(bucket: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The bucket with the names of the Hugging Face model."""
    for name, value in bucket.items():
        if not all(map(torch.isfinite, value.aminmax())):  # unlike isfinite over all of them, it allocates nothing
            raise NumericsError(f"the weight {name} is not finite", fix="Lower optim.lr; an earlier checkpoint may do.")
    return {name.removeprefix("hf."): value.detach() for name, value in bucket.items()}


def _is_converted(model: Model) -> bool:
    """Whether transformers would write other names or shapes than the model holds."""
    named = [(base_name(name), getattr(p, "ds_shape", p.shape)) for name, p in model.hf.named_parameters()]  # of ZeRO-3
    shapes = {name: torch.Size(shape) for name, shape in named if name is not None}
    written = revert_weight_conversion(model.hf, {name: torch.empty(s, device="meta") for name, s in shapes.items()})
    return {name: value.shape for name, value in written.items()} != shapes
