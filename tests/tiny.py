"""Real parts, only small: models of two layers, a tokenizer of plain bytes, examples and trajectories from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from llmscale.batch import Prompt, TokenExample, Trajectory
from llmscale.data.tokenizer import MIN_VOCAB_SIZE, train_tokenizer
from llmscale.models.adapters import adapted
from llmscale.models.config import LoraConfig
from llmscale.models.loading import LanguageModel, ScalarModel
from llmscale.models.weights import pack, published_parameters
from llmscale.protocols import WeightBucket

VOCAB_SIZE = 64


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(iter(["the cat sat on the mat"]), MIN_VOCAB_SIZE, model_max_length=64)


def _llama(
    seed: int, vocab_size: int, tie: bool, max_position: int, kind: type, hidden_size: int = 32, **kwargs: Any
) -> Any:
    torch.manual_seed(seed)
    return kind(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=max_position,
            tie_word_embeddings=tie,
            initializer_range=0.1,  # the usual 0.02 makes every distribution of so small a model uniform
            **kwargs,
        )
    )


def language_model(
    seed: int = 0,
    *,
    vocab_size: int = VOCAB_SIZE,
    tie: bool = True,
    max_position: int = 64,
    head_dim: int = 8,
    hidden_size: int = 32,
) -> LanguageModel:
    shape = {"head_dim": head_dim, "hidden_size": hidden_size}
    return LanguageModel(_llama(seed, vocab_size, tie, max_position, LlamaForCausalLM, **shape))


def adapted_model(seed: int = 0, *, rank: int = 4, base: LanguageModel | None = None) -> LanguageModel:
    """The same base whatever the seed, with an adapter that says something: its B is not 0."""
    model = adapted(base or language_model(), LoraConfig(rank=rank, alpha=2 * rank), seed)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def scalar_model(seed: int = 0, *, vocab_size: int = VOCAB_SIZE) -> ScalarModel:
    kind = LlamaForSequenceClassification
    return ScalarModel(_llama(seed, vocab_size, False, 64, kind, num_labels=1, pad_token_id=0))


def token_examples(lengths: Sequence[int], seed: int = 0, vocab_size: int = VOCAB_SIZE) -> list[TokenExample]:
    """Documents of random tokens; three quarters of the tokens are targets."""
    rng = np.random.default_rng(seed)
    return [TokenExample(rng.integers(0, vocab_size, n), rng.random(n) < 0.75) for n in lengths]


def packed(examples: Sequence[TokenExample]) -> TokenExample:
    """The documents one after another in one row."""
    return TokenExample(
        np.concatenate([e.token_ids for e in examples]),
        np.concatenate([e.loss_mask for e in examples]),
        np.concatenate([np.arange(len(e.token_ids)) for e in examples]),
    )


def prompt(token_ids: Sequence[int], **fields: Any) -> Prompt:
    return Prompt(np.array(token_ids, dtype=np.int64), text="a prompt", fields=fields)


def trajectory(
    token_ids: Sequence[int],
    own: Sequence[int],
    *,
    draw_id: int = 0,
    sample_index: int = 0,
    completion: str = "",
    finished: bool = True,
    version: int = 0,
    **fields: Any,
) -> Trajectory:
    """One whose tokens at 1 in `own` are the policy's, of weights `version`; their rollout log-probability is -1."""
    mask = np.array(own, dtype=bool)
    return Trajectory(
        draw_id=draw_id,
        sample_index=sample_index,
        token_ids=np.array(token_ids, dtype=np.int64),
        loss_mask=mask,
        rollout_logprobs=np.where(mask, -1.0, 0.0).astype(np.float32),
        weight_versions=np.where(mask, version, -1).astype(np.int32),
        finished=finished,
        prompt=prompt(token_ids[: int(mask.argmax())], **fields),
        completion=completion,
    )


def published(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> list[WeightBucket]:
    """The model's weights in two buckets, or those of its adapter."""
    weights = [(name, p.detach()) for name, p in published_parameters(model).items()]
    return [pack(dict(part), dtype) for part in (weights[:5], weights[5:])]
