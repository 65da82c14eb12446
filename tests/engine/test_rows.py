"""How attention is computed and whether sequences share rows: what goes together, and what is chosen where nothing is said."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig

from llmscale.engine.config import DeepSpeedConfig, EngineConfig, RowLayout, SingleConfig
from llmscale.engine.rows import settle_attention
from llmscale.errors import ConfigError, ModelError
from llmscale.models.attention import DOCUMENTS
from llmscale.models.config import Attention
from llmscale.models.loading import LanguageModel
from tests.tiny import VOCAB_SIZE, language_model

CPU = torch.device("cpu")
PACKED, PADDED = RowLayout.packed, RowLayout.padded


def without_positions() -> LanguageModel:
    """Of an architecture that knows no positions, and cannot tell documents apart."""
    config = BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=1, n_head=4)
    return LanguageModel(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize(
    "config, expected, attention",
    [
        (SingleConfig(), (True, True), DOCUMENTS),
        (SingleConfig(rows=PACKED), (True, True), DOCUMENTS),
        (SingleConfig(rows=PADDED), (False, False), "sdpa"),
        (SingleConfig(attention=Attention.by_document), (True, True), DOCUMENTS),
        (SingleConfig(attention=Attention.by_document, rows=PADDED), (False, False), DOCUMENTS),
        (SingleConfig(attention=Attention.sdpa), (False, False), "sdpa"),
        (SingleConfig(attention=Attention.sdpa, rows=PACKED), (True, False), "sdpa"),
        (SingleConfig(attention=Attention.eager), (False, False), "eager"),
        (SingleConfig(compile=True), (False, False), "sdpa"),
        (DeepSpeedConfig(sequence_parallel_size=2), (False, False), "sdpa"),
        (DeepSpeedConfig(), (True, True), DOCUMENTS),
    ],
)
def test_rows_follow_from_attention(config: EngineConfig, expected: tuple[bool, bool], attention: str):
    model = language_model()
    assert settle_attention(config, model, CPU) == expected
    assert model.hf.config._attn_implementation == attention


def test_an_architecture_that_cannot_has_padded_rows():
    model = without_positions()
    before = model.hf.config._attn_implementation
    assert settle_attention(SingleConfig(), model, CPU) == (False, False)
    assert model.hf.config._attn_implementation == before
    with pytest.raises(ConfigError, match="cannot attend by document"):
        settle_attention(SingleConfig(attention=Attention.by_document), model, CPU)
    with pytest.raises(ModelError, match="would see each other"):
        settle_attention(SingleConfig(rows=PACKED), model, CPU)


def test_a_gpu_keeps_to_padded_rows_where_flash_attn_is_missing():
    assert settle_attention(SingleConfig(), language_model(), torch.device("cuda")) == (False, False)
