"""Scoring given tokens in the output layer: the same numbers and gradients as with all logits at once."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from llmscale.batch import Batch, token_tensors
from llmscale.functional import token_entropy, token_logprobs
from llmscale.models import head
from llmscale.models.forward import ModelForward
from llmscale.models.head import TokenHead
from llmscale.models.loading import LanguageModel
from tests.tiny import VOCAB_SIZE, language_model, token_examples

TEMPERATURE = 0.7


def example() -> tuple[Batch, torch.Tensor]:
    examples = token_examples([9, 4, 12])
    batch = Batch(token_tensors([e.token_ids for e in examples]))
    mask = torch.zeros(3, 12, dtype=torch.bool)
    for i, e in enumerate(examples):
        mask[i, 1 : len(e.loss_mask)] = torch.from_numpy(e.loss_mask[1:])
    return batch, mask


def gradient(model: LanguageModel, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


class Watching(TorchDispatchMode):
    """Notes the most rows of a matrix [n, rows_of] that any operation makes; [but, rows_of] is the weight."""

    def __init__(self, rows_of: int, but: int):
        super().__init__()
        self.rows_of, self.but, self.largest = rows_of, but, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (self.rows_of,):
                rows = tensor.numel() // self.rows_of
                self.largest = max(self.largest, rows) if rows != self.but else self.largest
        return made


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_in_parts_as_whole(monkeypatch: pytest.MonkeyPatch, tie: bool, rows: int):
    monkeypatch.setattr(head, "CHUNK_BYTES", rows * 4 * VOCAB_SIZE)
    model, (batch, mask) = language_model(tie=tie).double(), example()
    assert isinstance(model.hf.get_output_embeddings(), TokenHead)
    logits = model(batch["input_ids"], batch["position_ids"])
    expected = token_logprobs(logits, batch["input_ids"], TEMPERATURE), token_entropy(logits, TEMPERATURE)
    logprobs, entropy = ModelForward(model).logprobs(batch, mask, TEMPERATURE, "grad")
    for own, whole in zip((logprobs, entropy), expected, strict=True):
        assert torch.allclose(own[mask], whole[mask].float(), rtol=1e-5)
        assert not own[~mask].any()
    weights = torch.randn(mask.shape)
    ours = gradient(model, (weights * (logprobs + entropy))[mask].sum())
    again = model(batch["input_ids"], batch["position_ids"])
    theirs = token_logprobs(again, batch["input_ids"], TEMPERATURE) + token_entropy(again, TEMPERATURE)
    assert (ours - gradient(model, (weights * theirs)[mask].sum())).norm() < 1e-5 * ours.norm()


def test_logits_are_never_held_whole(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * 4 * VOCAB_SIZE)
    model, (batch, mask) = language_model(), example()
    with Watching(rows_of=VOCAB_SIZE, but=model.hf.config.hidden_size) as watching:
        logprobs, _ = ModelForward(model).logprobs(batch, mask)
        logprobs.sum().backward()
    assert 0 < watching.largest <= 4 < mask.sum()


def test_the_value_of_the_entropy_has_no_gradient():
    model, (batch, mask) = language_model(), example()
    _, entropy = ModelForward(model).logprobs(batch, mask, TEMPERATURE, "value")
    assert entropy[mask].min() > 0 and not entropy.requires_grad
    assert not ModelForward(model).logprobs(batch, mask, TEMPERATURE)[1].any()


def test_nothing_selected_still_leads_to_every_weight():
    model, (batch, mask) = language_model(), example()
    logprobs, _ = ModelForward(model).logprobs(batch, torch.zeros_like(mask))
    assert not gradient(model, logprobs.sum()).any()


@pytest.mark.parametrize(("architecture", "overrides"), [("gemma2", {"final_logit_softcapping": 1.0}), ("gpt2", {})])
def test_other_architectures(architecture: str, overrides: dict):
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
    model = LanguageModel(
        AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes, **heads, **overrides))
    )
    model.eval()
    capped = architecture == "gemma2"
    assert isinstance(model.hf.get_output_embeddings(), TokenHead) is not capped
    batch, mask = example()
    logits = model(batch["input_ids"], batch["position_ids"])
    logprobs, entropy = ModelForward(model).logprobs(batch, mask, TEMPERATURE, "value")
    assert torch.allclose(logprobs[mask], token_logprobs(logits, batch["input_ids"], TEMPERATURE)[mask], atol=1e-5)
    assert torch.allclose(entropy[mask], token_entropy(logits, TEMPERATURE)[mask], atol=1e-5)
