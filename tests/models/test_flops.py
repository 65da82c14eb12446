"""The arithmetic of a token, counted by hand for a small Llama."""

from __future__ import annotations

import pytest
import torch

from llmscale.models.flops import flops_per_token, peak_flops
from llmscale.models.loading import num_parameters
from tests.tiny import VOCAB_SIZE, adapted_model, language_model


@pytest.mark.parametrize("tie", [True, False])
def test_every_weight_that_multiplies_counts_once(tie: bool):
    model = language_model(tie=tie)
    config = model.hf.config
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    key_value = hidden * config.num_key_value_heads // config.num_attention_heads
    layer = 2 * hidden**2 + 2 * hidden * key_value + 3 * hidden * inner + 2 * hidden
    weights = layers * layer + hidden + VOCAB_SIZE * hidden  # the last norm, and the output layer
    assert flops_per_token(model, 10) == 6 * weights + 12 * layers * hidden * 10


def test_a_frozen_weight_costs_a_forward_and_the_gradient_of_its_inputs():
    adapted, plain = adapted_model(), language_model()
    added = num_parameters(adapted, trained_only=True)
    base = flops_per_token(plain, 0)
    assert flops_per_token(adapted, 0) == base * 4 / 6 + 6 * added


def test_a_device_without_a_data_sheet_is_measured():
    flops, source = peak_flops(torch.device("cpu"), bf16=False)
    assert 1e8 < flops < 1e14 and "matrix product" in source and "cpu" in source
