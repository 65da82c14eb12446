"""Decoding against plain forwards, whatever the architecture keeps of what it has read; and what it costs: which rows each
forward has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from llmscale.batch import token_tensors
from llmscale.functional import token_logprobs
from llmscale.models.config import ModelConfig
from llmscale.models.loading import LanguageModel, cast_parameters, new_language_model
from llmscale.protocols import SamplingRequest
from llmscale.rollout.cache import RoomyLayer
from llmscale.rollout.config import HFRolloutConfig
from llmscale.rollout.decoding import closed_up
from llmscale.rollout.hf import HFRollout
from tests.tiny import language_model, prompt, tokenizer

PROMPTS = [[7], [7, 8, 9], [20, 21, 22, 23, 24, 25, 26], [3, 1, 4, 1, 5], [60, 61]]
# No, some and all heads share keys and values; a window of 4 tokens in all layers or in every other one, soft-capped logits.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_key_value_heads": 4}),
    "grouped": ("llama", {}),
    "one_head": ("qwen2", {"num_key_value_heads": 1}),
    "gpt2": ("gpt2", {}),
    "window": ("mistral", {"sliding_window": 4}),
    "hybrid": ("gemma2", {"sliding_window": 4, "head_dim": 8}),
}


def of(name: str) -> LanguageModel:
    architecture, overrides = ARCHITECTURES[name]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    config = ModelConfig(
        architecture=architecture, max_position=64, overrides={"initializer_range": 0.1} | overrides, **sizes
    )
    return new_language_model(config, tokenizer(), seed=0)


def requests(group_size: int = 3) -> list[SamplingRequest]:
    return [SamplingRequest(prompt(p), d, s) for d, p in enumerate(PROMPTS) for s in range(group_size)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_equals_plain_forwards(name: str):
    model = of(name)
    stops = list(range(0, len(tokenizer()), 8))  # rows end at any time
    made = HFRollout(HFRolloutConfig(max_new_tokens=12), model, tokenizer(), 0, stops).generate(requests())
    assert len({t.completion_len for t in made}) > 2
    model.hf.set_attn_implementation("eager")
    batch = token_tensors([t.token_ids for t in made])
    with torch.no_grad():
        plain = token_logprobs(model(batch["input_ids"], batch["position_ids"]), batch["input_ids"]).numpy()
    for row, t in zip(plain, made, strict=True):
        assert np.abs(row[: len(t.token_ids)] - t.rollout_logprobs)[t.loss_mask].max() < 1e-4


def test_bf16_is_as_close_to_fp32_as_transformers_generate():
    model, rounded = language_model(), language_model()
    cast_parameters(rounded, torch.bfloat16)
    reference = language_model()
    cast_parameters(reference, torch.bfloat16)
    made = HFRollout(HFRolloutConfig(max_new_tokens=20), rounded, tokenizer(), 0, [250]).generate(requests())
    errors: dict[str, list[float]] = {"ours": [], "transformers": []}
    for t in made:
        ids = torch.from_numpy(t.token_ids)[None]
        start = len(t.prompt.token_ids)
        with torch.no_grad():
            exact = token_logprobs(model(ids, torch.arange(ids.shape[1])[None]), ids)[0, start:]
            cache, steps = DynamicCache(config=reference.hf.config), [ids[:, :start], *ids[:, start:].split(1, dim=1)]
            logits = torch.cat([reference.hf(s, past_key_values=cache).logits for s in steps], dim=1)
        errors["ours"] += (torch.from_numpy(t.rollout_logprobs[start:]) - exact).tolist()
        errors["transformers"] += (token_logprobs(logits, ids)[0, start:] - exact).tolist()
    ours, theirs = (float(np.std(values)) for values in errors.values())
    assert 0 < ours < 1.25 * theirs


def test_a_prompt_is_read_once_and_finished_rows_leave():
    model = language_model()
    shapes: list[tuple[int, ...]] = []
    model.hf.register_forward_pre_hook(
        lambda _, __, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    made = HFRollout(HFRolloutConfig(max_new_tokens=20), model, tokenizer(), 0, [5, 6, 7, 8]).generate(requests(8))
    lengths = np.array([t.completion_len for t in made])
    assert shapes[0] == (len(PROMPTS), 7)  # of the longest prompt
    assert shapes[1:] == [((lengths > position).sum(), 1) for position in range(1, lengths.max())]
    assert lengths.min() < lengths.max()


def test_rows_close_up_from_the_end():
    assert closed_up(np.array([True, False, True, True, False, True])).tolist() == [0, 5, 2, 3]
    assert closed_up(np.array([False, True])).tolist() == [1]
    rng = np.random.default_rng(0)
    for _ in range(50):
        going = rng.random(rng.integers(1, 20)) < 0.6
        assert sorted(closed_up(going)) == np.flatnonzero(going).tolist()


@pytest.mark.parametrize("across", [False, True])
def test_a_cache_with_room_holds_what_transformers_holds(across: bool):
    torch.manual_seed(0)
    own, plain = RoomyLayer(6, across), DynamicLayer()
    rows = 3
    for tokens, order in (
        (4, [0, 0, 1, 2, 2]),
        (1, None),
        (1, [0, 4, 2]),
        (2, [2, 1]),
        (1, [0, 1]),
        (6, None),
        (1, [1]),
    ):
        new = torch.randn(rows, 2, tokens, 5), torch.randn(rows, 2, tokens, 3)
        for held, expected in zip(own.update(*new), plain.update(*new), strict=True):
            torch.testing.assert_close(held, expected, rtol=0, atol=0)
        if order is not None:
            own.reorder_cache(torch.tensor(order))
            plain.reorder_cache(torch.tensor(order))
            rows = len(order)
        assert own.get_seq_length() == plain.get_seq_length()
    torch.testing.assert_close(own.keys, plain.keys, rtol=0, atol=0)
