"""An adapter against what the paper says: W + alpha / rank * B A, of which only B and A are trained."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from llmscale.config import check
from llmscale.engine.accounting import parameter_buckets
from llmscale.errors import CheckpointError, ConfigError, ModelError, WeightMismatchError
from llmscale.functional import token_logprobs
from llmscale.models.adapters import FrozenBase, adapted, base_name, merged
from llmscale.models.config import LoraConfig
from llmscale.models.export import save_adapter, save_hf
from llmscale.models.loading import LanguageModel, load_language_model, num_parameters
from llmscale.models.weights import fingerprint, load_buckets, pack
from tests.tiny import adapted_model, language_model, published, tokenizer

IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
BUCKET_BYTES = 5000


def gpt2() -> LanguageModel:
    """Its weights are [in, out], and its layers have biases."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 64, "initializer_range": 0.1}
    return LanguageModel(GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)))


BASES = pytest.mark.parametrize("base", [language_model, gpt2])


def logits(model: torch.nn.Module) -> Tensor:
    return model(IDS, torch.arange(IDS.shape[1]).expand_as(IDS))


def weights_of(model: torch.nn.Module, trained_only: bool = False) -> list[Mapping[str, Tensor]]:
    buckets = parameter_buckets(model, BUCKET_BYTES, trained_only)
    return [{name: parameter.detach() for name, parameter in bucket.items()} for bucket in buckets]


def joined(buckets: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: value for bucket in buckets for name, value in bucket.items()}


# ---------------------------------------------------------------- what it computes


@BASES
def test_a_new_adapter_changes_no_bit_and_is_all_that_is_trained(base):
    plain, model = base(), adapted(base(), LoraConfig(rank=4), seed=0)
    assert torch.equal(logits(plain), logits(model))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".lora_" in name for name in trained)
    assert {base_name(name) for name, _ in model.named_parameters()} - {None} == {
        n for n, _ in plain.named_parameters()
    }


def test_the_seed_decides_and_other_randomness_is_left_alone():
    def drawn(seed: int) -> str:
        return fingerprint(joined(weights_of(adapted(language_model(), LoraConfig(), seed), trained_only=True)))

    assert drawn(0) == drawn(0) != drawn(1)
    model = language_model()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    adapted(model, LoraConfig(), seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_loss_and_gradient_are_those_of_the_definition():
    """In float64, with W + alpha / rank * B A put in the place of every W."""
    model, rank, alpha = adapted_model().double(), 4, 8
    loss = -token_logprobs(logits(model).double(), IDS).sum()
    loss.backward()

    plain = language_model().double()
    weights = dict(plain.named_parameters())
    factors = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}
    for name in [n for n in factors if ".lora_A." in n]:
        layer = name.partition(".lora_A.")[0]
        update = factors[name.replace("lora_A", "lora_B")] @ factors[name]
        weights[f"{layer}.weight"] = weights[f"{layer}.weight"].detach() + alpha / rank * update
    inputs = {"input_ids": IDS, "position_ids": torch.arange(IDS.shape[1]).expand_as(IDS)}
    expected = -token_logprobs(torch.func.functional_call(plain, weights, kwargs=inputs).double(), IDS).sum()
    expected.backward()

    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    for name, factor in factors.items():
        own = model.get_parameter(name).grad
        assert factor.grad.norm() > 0 and (own - factor.grad).norm() <= 1e-9 * factor.grad.norm(), name
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_the_full_rank_can_be_any_update():
    """B A = U S V' of a random change of every matrix."""
    model, plain = adapted_model(rank=32), language_model()
    torch.manual_seed(1)
    for name, b in model.named_parameters():
        if ".lora_B." in name:
            layer, a = name.partition(".lora_B.")[0], model.get_parameter(name.replace("lora_B", "lora_A"))
            weight = plain.get_parameter(f"{layer}.weight")
            change = 0.1 * torch.randn_like(weight)
            u, s, v = torch.linalg.svd(change / 2, full_matrices=False)  # alpha / rank is 2
            with torch.no_grad():
                b.zero_()[:, : len(s)] = u * s
                a.zero_()[: len(s)] = v
                weight += change
    assert (logits(model) - logits(plain)).abs().max() < 1e-4
    assert (logits(language_model()) - logits(plain)).abs().max() > 1


# ---------------------------------------------------------------- without it, and merged


@BASES
def test_off_is_the_base_and_then_all_is_as_before(base):
    plain, model = base(), adapted_model(base=base())
    before = logits(model).detach()
    assert (before - logits(plain)).abs().max() > 0.1
    with pytest.raises(KeyError), model.adapter.off():
        assert torch.equal(logits(model), logits(plain))
        raise KeyError
    logits(model).sum().backward()
    assert torch.equal(logits(model), before)
    assert all((p.grad is not None) == (".lora_" in name) for name, p in model.named_parameters())


@BASES
def test_merged_weights_make_the_base_say_what_the_adapted_model_says(base):
    model, plain = adapted_model(base=base()), base()
    buckets = [pack(bucket, torch.float32) for bucket in merged(model, weights_of(model))]
    assert len(buckets) > 2
    load_buckets(plain, buckets, "the receiver")
    assert (logits(plain) - logits(model)).abs().max() < 1e-5


def test_publishing_a_hundred_times_moves_no_bit():
    model = adapted_model()
    before, first = fingerprint(joined(weights_of(model))), fingerprint(joined([*merged(model, weights_of(model))]))
    for _ in range(100):
        assert fingerprint(joined([*merged(model, weights_of(model))])) == first
    assert fingerprint(joined(weights_of(model))) == before


def test_a_bf16_merge_is_rounded_once():
    exact, rounded = adapted_model(), adapted_model()
    for model in (exact, rounded):
        for p in model.parameters():
            p.data = p.data.bfloat16() if model is rounded else p.data.bfloat16().float()
    expected = joined([*merged(exact, weights_of(exact))])
    for name, value in joined([*merged(rounded, weights_of(rounded))]).items():
        assert value.dtype is torch.bfloat16 and torch.equal(value, expected[name].bfloat16()), name


def test_a_bucket_holds_all_of_a_layer():
    for bucket in parameter_buckets(adapted_model(), 1):
        layers = {name.partition(".base_layer.")[0].partition(".lora_")[0] for name in bucket}
        assert len(layers) == 1 and len(bucket) in (1, 3)


# ---------------------------------------------------------------- what travels and what is left


def test_an_adapter_alone_travels_to_one_who_has_the_base():
    sender, receiver = adapted_model(seed=0), adapted_model(seed=1)
    buckets = [pack(bucket, torch.float32) for bucket in weights_of(sender, trained_only=True)]
    sent = sum(array.nbytes for bucket in buckets for array in bucket.arrays.values())
    assert sent == 4 * num_parameters(sender, trained_only=True) < 4 * num_parameters(sender) / 2
    assert not torch.equal(logits(sender), logits(receiver))
    load_buckets(receiver, buckets, "the receiver")
    assert torch.equal(logits(sender), logits(receiver))
    with pytest.raises(WeightMismatchError, match="differ by name"):
        load_buckets(receiver, published(language_model()), "the receiver")
    damaged = copy.deepcopy(buckets)
    next(iter(damaged[0].arrays.values())).flat[0] += 1
    with pytest.raises(WeightMismatchError, match="are not those published"):
        load_buckets(receiver, damaged, "the receiver")


@BASES
def test_transformers_loads_the_merged_folder_and_peft_the_adapter(base, tmp_path: Path):
    model = adapted_model(base=base())
    save_hf(base(), tokenizer(), tmp_path / "base", weights_of(base()))
    save_hf(model, tokenizer(), tmp_path / "hf", weights_of(model))
    save_adapter(model, tmp_path / "adapter", weights_of(model, trained_only=True))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with_adapter = peft.PeftModel.from_pretrained(start, tmp_path / "adapter")
    assert torch.equal(with_adapter(IDS).logits, logits(model))
    assert (whole(IDS).logits - logits(model)).abs().max() < 1e-5
    assert not (tmp_path / "hf" / "adapter_config.json").exists(), "transformers would add the adapter once more"


# ---------------------------------------------------------------- what is refused


def test_every_linear_layer_of_the_blocks_or_those_named():
    assert set(adapted(language_model(), LoraConfig(), 0).adapter.peft_config.target_modules) == LLAMA
    assert set(adapted(gpt2(), LoraConfig(), 0).adapter.peft_config.target_modules) == {"c_attn", "c_proj", "c_fc"}
    model = adapted(language_model(), LoraConfig(rank=4, target_modules=["q_proj", "v_proj"]), 0)
    assert num_parameters(model, trained_only=True) == 2 * (4 * (32 + 32) + 4 * (32 + 16))  # two layers, two kv heads


@pytest.mark.parametrize("name", ["q_prj", "lm_head", "layers.0.self_attn.q_proj", ""])
def test_a_layer_that_is_not_there_is_named_with_those_that_are(name: str):
    with pytest.raises(ModelError, match=f"LlamaForCausalLM have no linear layer called {name}") as caught:
        adapted(language_model(), LoraConfig(target_modules=["q_proj", name]), 0)
    assert caught.value.where == "model.adapter.target_modules" and "q_proj" in str(caught.value.fix)


@pytest.mark.parametrize(("wrong", "path"), [({"rank": 0}, "rank"), ({"alpha": 0}, "alpha")])
def test_a_size_that_makes_no_adapter_is_refused(wrong: dict[str, int], path: str):
    with pytest.raises(ConfigError, match="must be at least 1") as caught:
        check(LoraConfig(**wrong))
    assert caught.value.where == path


def test_another_base_is_refused(tmp_path: Path):
    for seed, folder in enumerate(("one", "same", "other")):
        model = language_model(seed=seed // 2)
        save_hf(model, tokenizer(), tmp_path / folder, weights_of(model))
    state = FrozenBase(str(tmp_path / "one")).state_dict()
    FrozenBase(str(tmp_path / "same")).load_state_dict(state)
    with pytest.raises(CheckpointError, match="is not the one that this run's adapter was trained on") as caught:
        FrozenBase(str(tmp_path / "other")).load_state_dict(state)
    assert caught.value.where == str(tmp_path / "other")


def test_it_can_be_counted_without_weights(tmp_path: Path):
    model = adapted_model()
    save_hf(language_model(), tokenizer(), tmp_path, weights_of(language_model()))
    empty = adapted(load_language_model(str(tmp_path), empty=True), LoraConfig(rank=4), 0)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    for trained_only in (False, True):
        assert num_parameters(empty, trained_only) == num_parameters(model, trained_only)
