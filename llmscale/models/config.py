"""Which model: one by path, or a new one by size; and what is trained of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from llmscale.config import Problem, at_least, option


class Attention(Enum):
    """How attention is computed; changes speed and memory, and numbers only by rounding."""

    auto = "auto"  # flash where it is installed and can run, else by document on a CPU, else sdpa
    eager = "eager"  # plain matrix products
    sdpa = "sdpa"  # torch's scaled_dot_product_attention
    by_document = "by_document"  # sdpa over each document of a packed row by itself: `llmscale.models.attention`
    flash = "flash"  # flash-attn; CUDA and bf16 only


@dataclass
class AdapterConfig:
    """A few trained weights in a model whose own stay as they are."""

    name: str = MISSING


@option("adapter", "lora", builds="llmscale.models.adapters:Lora")
@dataclass
class LoraConfig(AdapterConfig):
    """LoRA (Hu et al. 2021, arXiv:2106.09685, section 4.1): a matrix W acts as W + alpha / rank * B A, and only B and A are
    trained. B starts at 0, so that the adapted model starts as the model itself. There is no dropout: with it a policy would
    not be the one that sampled."""

    name: str = "lora"
    rank: int = 16  # columns of B and rows of A
    alpha: int = 32  # scales the change by alpha / rank; twice the rank is usual
    # The last names of the linear layers that are adapted, such as [q_proj,v_proj]; none given: every one of the blocks
    target_modules: list[str] = field(default_factory=list)

    def problems(self) -> Iterator[Problem]:
        yield from at_least(self, rank=1, alpha=1)


MIN_VOCAB_SIZE = 261  # of a tokenizer that we train: see llmscale.data.tokenizer


@dataclass
class ModelConfig:
    """A causal language model. With `path` it is loaded and the sizes below are not used."""

    path: str | None = None  # a run directory, a Hugging Face folder, or a hub name; None: a new model
    tokenizer: str | None = None  # the same for the tokenizer; None: the model's, or one trained on the data
    architecture: str = "llama"  # transformers model type of a new model
    vocab_size: int = 4096  # tokens of a tokenizer that is trained on the data; at least 261 (bytes and specials)
    hidden_size: int = 256
    intermediate_size: int = 704
    num_layers: int = 6
    num_heads: int = 4
    num_kv_heads: int | None = None  # None: as many as num_heads
    max_position: int = 1024  # longest sequence in tokens
    tie_embeddings: bool = True  # one matrix for input and output embeddings
    dropout: float = 0.0  # 0..1; anything above 0 breaks ratio = 1 in RLHF and equality over batch splits
    overrides: dict[str, Any] = field(default_factory=dict)  # further fields of the transformers config
    adapter: AdapterConfig | None = None  # what is trained instead of the model's own weights; null: those themselves

    def problems(self) -> Iterator[Problem]:
        sizes = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        yield from at_least(self, **dict.fromkeys(sizes, 1), max_position=2, dropout=0)
        if self.dropout >= 1:
            yield "dropout", f"must be below 1, is {self.dropout}", "0.1 drops a tenth."
        if self.path is not None:
            return
        if self.adapter is not None:
            what = "a new model has learned nothing yet that an adapter could start from"
            yield "adapter", what, "Set model.path, or leave it out."
        if self.tokenizer is None and self.vocab_size < MIN_VOCAB_SIZE:
            what = f"must be at least {MIN_VOCAB_SIZE} (256 bytes and 5 special tokens), is {self.vocab_size}"
            yield "vocab_size", what, f"{MIN_VOCAB_SIZE} gives a tokenizer of plain bytes."
        if self.hidden_size % self.num_heads:
            what = f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            yield "num_heads", what, "Choose a divisor of hidden_size."
        elif (self.num_kv_heads or self.num_heads) and self.num_heads % (self.num_kv_heads or self.num_heads):
            what = f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            yield "num_kv_heads", what, "Choose a divisor of num_heads."
