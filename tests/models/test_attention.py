"""Attention by document: the numbers and gradients of each document by itself, branches included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, MistralConfig, Qwen2Config

from llmscale.batch import Branch, Layout, Rows
from llmscale.errors import ModelError
from llmscale.models import attention
from llmscale.models.attention import DOCUMENTS, attend_by_document, runs_of
from llmscale.models.loading import LanguageModel
from tests.tiny import VOCAB_SIZE, language_model, scalar_model

SMALL = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ONE_ROW = Rows(1000, branching=True)


def made(config) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(AutoModelForCausalLM.from_config(config).eval())


def sequences_of(rng: np.random.Generator) -> tuple[list[np.ndarray], list[Branch | None]]:
    """Three documents; the second has three branches, off different places, one of which takes all of its tokens."""
    first, trunk, last = (rng.integers(0, VOCAB_SIZE, n) for n in (7, 9, 1))
    shared = [6, 6, 9]
    branches = [
        np.concatenate([trunk[:n], rng.integers(0, VOCAB_SIZE, m)]) for n, m in zip(shared, (5, 1, 3), strict=True)
    ]
    return [first, trunk, *branches, last], [None, None, *(Branch(1, n) for n in shared), None]


def outputs(model: LanguageModel, sequences: list[np.ndarray], branches: list[Branch | None]) -> list[torch.Tensor]:
    """Logits of the tokens of every sequence, [T_i, V]."""
    layout = Layout([len(s) for s in sequences], ONE_ROW, branches)
    tensors = layout.tensors(sequences)
    logits = model(input_ids=tensors["input_ids"], position_ids=tensors["position_ids"])
    assert logits.shape[:2] == (1, sum(map(len, sequences)) - sum(b.shared for b in branches if b))
    return [torch.stack(by_token, -1) for by_token in zip(*map(layout.take, logits.unbind(-1)), strict=True)]


def alone(model: LanguageModel, sequences: list[np.ndarray]) -> list[torch.Tensor]:
    return [model(input_ids=torch.tensor(s)[None], position_ids=torch.arange(len(s))[None])[0] for s in sequences]


def gradients(model: LanguageModel, logits: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of something that every logit of every sequence weighs in, differently."""
    model.zero_grad()
    total = sum((x.log_softmax(-1).square() * (i + 1)).sum() for i, x in enumerate(logits))
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# llama and qwen2 take their norms in fp32, whatever the weights are.
@pytest.mark.parametrize("architecture, tolerance", [("gpt2", 1e-9), ("llama", 1e-6), ("qwen2", 1e-6)])
def test_a_row_of_documents_and_branches_equals_each_sequence_by_itself(architecture: str, tolerance: float):
    model = {
        "llama": language_model,
        "gpt2": lambda: made(GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
        "qwen2": lambda: made(Qwen2Config(**SMALL, intermediate_size=48, num_key_value_heads=2)),
    }[architecture]().double()
    sequences, branches = sequences_of(np.random.default_rng(0))
    expected = alone(model, sequences)
    by_weight = gradients(model, expected)
    assert attend_by_document(model)
    together = outputs(model, sequences, branches)
    for one, other in zip(expected, together, strict=True):
        torch.testing.assert_close(other, one, atol=1e-9, rtol=0)
    for name, gradient in gradients(model, together).items():
        assert (gradient - by_weight[name]).norm() <= tolerance * by_weight[name].norm(), name


def test_what_stands_in_another_document_changes_nothing_not_even_a_nan():
    model = language_model().double()
    attend_by_document(model)
    sequences, branches = sequences_of(np.random.default_rng(1))
    before = outputs(model, sequences, branches)
    sequences[0] = (sequences[0] + 1) % VOCAB_SIZE
    sequences[4][-1] = (sequences[4][-1] + 1) % VOCAB_SIZE  # the last token of a branch
    after = outputs(model, sequences, branches)
    same = [torch.equal(x, y) for x, y in zip(before, after, strict=True)]
    assert same == [False, True, True, True, False, True] and torch.equal(before[4][:-1], after[4][:-1])


def test_runs_begin_where_positions_do_not_count_on():
    runs = runs_of(torch.tensor([0, 1, 2, 2, 3, 2, 0, 1, 1]))
    assert [(r.length, r.document, r.seen) for r in runs] == [
        (3, None, 0),
        (2, 0, 2),
        (1, 0, 2),
        (2, None, 0),
        (1, 3, 1),
    ]
    assert runs[1].mask is not None and runs[1].mask.tolist() == [[True, True, True, False], [True] * 4]


def test_short_documents_are_attended_to_together_but_for_trunks(monkeypatch: pytest.MonkeyPatch):
    lengths = [3, 2, 40, 20, 70, 1, 1]
    positions = torch.cat([torch.arange(n) for n in lengths])
    runs = runs_of(torch.cat([positions, torch.tensor([0, 1, 2, 2, 3, 0, 0, 1])]))
    documents = [(45, None, False), (20, None, True), (70, None, True), (2, None, False)]
    shape = [(r.length, r.document, r.mask is None) for r in runs]
    assert shape == [*documents, (3, None, True), (2, 4, False), (3, None, False)]
    assert runs[3].mask is not None and runs[3].mask.tolist() == [[True, False], [False, True]]
    model, sequences = language_model().double(), [np.arange(n) for n in (3, 2, 9, 20)]
    attend_by_document(model)
    together = outputs(model, sequences, [None] * 4)
    monkeypatch.setattr(attention, "TOGETHER_TOKENS", 0)
    for one, other in zip(together, outputs(model, sequences, [None] * 4), strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=0)


def test_a_row_each_is_attended_to_as_a_whole():
    model = language_model()
    ids, positions = torch.arange(12).view(2, 6), torch.arange(6).repeat(2, 1)
    expected = model(input_ids=ids, position_ids=positions)
    assert attend_by_document(model)
    assert torch.equal(model(input_ids=ids, position_ids=positions), expected)


def test_in_bf16_it_is_no_further_from_fp32_than_sdpa():
    sequences, branches = sequences_of(np.random.default_rng(2))
    exact = alone(language_model(), sequences)
    model = language_model()
    with torch.autocast("cpu", torch.bfloat16):
        usual = alone(model, sequences)
        attend_by_document(model)
        own = outputs(model, sequences, branches)
    errors = [
        torch.cat([(x - y).flatten() for x, y in zip(exact, z, strict=True)]).square().mean() for z in (own, usual)
    ]
    assert 0 < errors[0] < 1.5 * errors[1]


def test_a_reward_model_attends_so_too():
    model = scalar_model()
    assert attend_by_document(model) and model.hf.config._attn_implementation == DOCUMENTS


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, sliding_window=4),  # a window
        BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=2, n_head=4),  # a bias by distance, no positions
    ],
    ids=["mistral", "bloom"],
)
def test_what_wants_another_attention_keeps_its_own(config):
    model = made(config)
    before = model.hf.config._attn_implementation
    assert not attend_by_document(model) and model.hf.config._attn_implementation == before
    ids = torch.arange(8)[None]
    model(input_ids=ids, position_ids=ids)  # works as before


def test_a_cache_is_refused():
    model = language_model()
    attend_by_document(model)
    with pytest.raises(ModelError, match="by document"):
        model.hf.generate(torch.arange(4)[None], max_new_tokens=2, do_sample=False)
