"""What is installed and can run is chosen; what cannot is refused with what it needs."""

from __future__ import annotations

import pytest
import torch

from llmscale.errors import ConfigError
from llmscale.models.config import Attention
from llmscale.models.kernels import apply_liger, attention_implementation
from tests.tiny import language_model

CPU = torch.device("cpu")


def test_on_a_cpu_flash_is_not_chosen_and_refused_with_what_it_needs():
    assert attention_implementation(Attention.auto, CPU, bf16=True) is None
    with pytest.raises(
        ConfigError, match=r"engine\.attention: flash attention needs (the package flash-attn|a CUDA device)"
    ):
        attention_implementation(Attention.flash, CPU, bf16=True)


@pytest.mark.parametrize("wanted", [Attention.eager, Attention.sdpa])
def test_the_others_are_taken_at_their_word_and_agree(wanted: Attention):
    ids = torch.arange(1, 9).unsqueeze(0)
    positions = torch.arange(4).repeat(1, 2)
    model = language_model()
    expected = model(ids, positions)
    model.hf.set_attn_implementation(attention_implementation(wanted, CPU, bf16=False))
    assert model.hf.config._attn_implementation == wanted.name
    assert torch.allclose(model(ids, positions), expected, atol=1e-6)


def test_liger_needs_its_package_and_a_device():
    with pytest.raises(ConfigError, match=r"engine\.liger: .* liger-kernel and a CUDA device"):
        apply_liger(language_model(), CPU)
