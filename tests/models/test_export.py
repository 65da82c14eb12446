"""An export is what transformers itself would write, a file a bucket, and never holds more than a bucket."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from llmscale.engine.accounting import parameter_buckets
from llmscale.errors import NumericsError
from llmscale.models.export import persistent_buffers, save_hf
from llmscale.models.loading import LanguageModel, Model, load_language_model
from tests.tiny import language_model, scalar_model, tokenizer

IDS = torch.tensor([[3, 14, 15, 9, 2, 6]])
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {
    "mixtral": {"num_local_experts": 4},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
}


def new(architecture: str, **settings: Any) -> LanguageModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **(SIZES | EXPERTS.get(architecture, {}) | settings))
    return LanguageModel(AutoModelForCausalLM.from_config(config))


def with_buffer(model: LanguageModel) -> LanguageModel:
    model.hf.model.layers[0].register_buffer("offset", torch.zeros(3))
    return model


def buckets(model: Model, bucket_bytes: int = 1 << 30) -> Iterator[dict[str, Tensor]]:
    return ({n: p.detach() for n, p in bucket.items()} for bucket in parameter_buckets(model, bucket_bytes))


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name


MODELS = {
    "tied": lambda: language_model(tie=True),
    "untied": lambda: language_model(tie=False),
    "scalar": scalar_model,
    "bf16": lambda: language_model().to(torch.bfloat16),
    "gpt2": lambda: new("gpt2", n_positions=64),
    "qwen2": lambda: new("qwen2", tie_word_embeddings=True),
    "mixtral": lambda: new("mixtral"),  # its experts are fused in memory and apart on disk
    "deepseek_v3": lambda: new("deepseek_v3"),  # and it has a buffer to save
    "buffer": lambda: with_buffer(language_model()),
}


@pytest.mark.parametrize("kind", MODELS)
def test_an_export_is_what_transformers_writes(tmp_path: Path, kind: str):
    model = MODELS[kind]()
    for buffer in persistent_buffers(model).values():
        buffer.normal_()
    model.hf.save_pretrained(tmp_path / "theirs")
    for size in (1 << 30, 5000):
        save_hf(model, tokenizer(), tmp_path / "ours", buckets(model, size))
        assert_equal(weights(tmp_path / "ours"), weights(tmp_path / "theirs"))
        for name in ("config.json", "generation_config.json"):
            ours, theirs = (tmp_path / folder / name for folder in ("ours", "theirs"))
            assert ours.exists() == theirs.exists()
            assert not ours.exists() or json.loads(ours.read_text()) == json.loads(theirs.read_text())
        for file in (tmp_path / "ours").iterdir():
            file.unlink()


@pytest.mark.parametrize("tie", [True, False])
def test_shards_load_and_say_the_same(tmp_path: Path, tie: bool):
    model = language_model(tie=tie)
    save_hf(model, tokenizer(), tmp_path, buckets(model, 20_000))
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards == [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    index = json.loads((tmp_path / SAFE_WEIGHTS_INDEX_NAME).read_text())
    numel = sum(p.numel() for p in model.parameters())
    assert index["metadata"] == {"total_parameters": numel, "total_size": 4 * numel}
    assert index["weight_map"] == {n: shard for shard in shards for n in load_file(tmp_path / shard)}
    assert ("lm_head.weight" in index["weight_map"]) == (not tie)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(plain(IDS).logits, model(IDS, torch.arange(6)[None]))
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tie
    assert torch.equal(load_language_model(str(tmp_path))(IDS, torch.arange(6)[None]), plain(IDS).logits)


def test_how_it_generates_goes_with_it(tmp_path: Path):
    model = language_model()
    model.hf.generation_config = GenerationConfig(do_sample=True, temperature=0.7)
    save_hf(model, tokenizer(), tmp_path, buckets(model))
    assert GenerationConfig.from_pretrained(tmp_path).temperature == 0.7


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["untied", "mixtral"])
def test_a_weight_that_is_not_finite_is_refused(tmp_path: Path, broken: float, kind: str):
    model = MODELS[kind]()
    with torch.no_grad():
        model.hf.lm_head.weight[5, 7] = broken
    with pytest.raises(NumericsError, match=r"hf\.lm_head\.weight is not finite"):
        save_hf(model, tokenizer(), tmp_path, buckets(model, 5000))


def test_one_bucket_is_held_at_a_time(tmp_path: Path):
    """As under ZeRO-3, where each is gathered anew: nothing of one lives when the next comes."""
    model = language_model()
    arrays: list[weakref.ref] = []
    alive: list[int] = []

    def gathered() -> Iterator[dict[str, Tensor]]:
        for bucket in buckets(model, 5000):
            alive.append(sum(ref() is not None for ref in arrays))
            arrays.clear()
            copies = {name: value.numpy().copy() for name, value in bucket.items()}
            arrays.extend(weakref.ref(copy) for copy in copies.values())
            yield {name: torch.from_numpy(copy) for name, copy in copies.items()}
            del bucket, copies

    save_hf(model, tokenizer(), tmp_path, gathered())
    assert len(alive) > 5 and set(alive) == {0}
    assert_equal(weights(tmp_path), {n.removeprefix("hf."): p.detach() for n, p in model.named_parameters()})
