"""Which model: one by path, or a new one by size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from llmscale.config import Problem, at_least


class Attention(Enum):
    """How attention is computed; changes speed and memory, and numbers only by rounding."""

    auto = "auto"  # flash where it is installed and can run, else sdpa
    eager = "eager"  # plain matrix products
    sdpa = "sdpa"  # torch's scaled_dot_product_attention
    flash = "flash"  # flash-attn; CUDA and bf16 only


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

    def problems(self) -> Iterator[Problem]:
        sizes = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        yield from at_least(self, **dict.fromkeys(sizes, 1), max_position=2, dropout=0)
        if self.dropout >= 1:
            yield "dropout", f"must be below 1, is {self.dropout}", "0.1 drops a tenth."
        if self.path is not None:
            return
        if self.tokenizer is None and self.vocab_size < MIN_VOCAB_SIZE:
            what = f"must be at least {MIN_VOCAB_SIZE} (256 bytes and 5 special tokens), is {self.vocab_size}"
            yield "vocab_size", what, f"{MIN_VOCAB_SIZE} gives a tokenizer of plain bytes."
        if self.hidden_size % self.num_heads:
            what = f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            yield "num_heads", what, "Choose a divisor of hidden_size."
        elif (self.num_kv_heads or self.num_heads) and self.num_heads % (self.num_kv_heads or self.num_heads):
            what = f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            yield "num_kv_heads", what, "Choose a divisor of num_heads."
