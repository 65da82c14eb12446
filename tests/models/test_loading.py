"""Models and tokenizers come back from disk as they went, in this project and in plain transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from llmscale.config import check
from llmscale.errors import ConfigError, ModelError
from llmscale.models.config import ModelConfig
from llmscale.models.export import save_hf
from llmscale.models.loading import (
    LanguageModel,
    Model,
    ScalarModel,
    context_length,
    has_scalar_head,
    load_language_model,
    load_scalar_model,
    load_tokenizer,
    new_language_model,
    resolve,
)
from tests.tiny import language_model, scalar_model, tokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4, "max_position": 64}
IDS = torch.tensor([[3, 14, 15, 9, 2, 6]])
POSITIONS = torch.arange(6)[None]


def saved(model: Model, folder: Path) -> str:
    save_hf(model, tokenizer(), folder, [{name: p.detach() for name, p in model.named_parameters()}])
    return str(folder)


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    assert dict(one.named_parameters()).keys() == dict(other.named_parameters()).keys()
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


@pytest.mark.parametrize("tie", [True, False])
def test_a_language_model_comes_back(tmp_path: Path, tie: bool):
    model = language_model(tie=tie)
    folder = saved(model, tmp_path / "m")
    loaded = load_language_model(folder)
    assert_same_weights(model, loaded)
    assert torch.equal(model(IDS, POSITIONS), loaded(IDS, POSITIONS))
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(plain(IDS).logits, model(IDS, POSITIONS))
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tie
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer().get_vocab()
    assert not has_scalar_head(folder)


def test_a_scalar_model_comes_back_with_its_head(tmp_path: Path):
    model = scalar_model()
    folder = saved(model, tmp_path / "m")
    assert has_scalar_head(folder)
    loaded = load_scalar_model(folder, seed=5)
    assert_same_weights(model, loaded)
    assert torch.equal(model(IDS, POSITIONS), loaded(IDS, POSITIONS))
    plain = AutoModelForSequenceClassification.from_pretrained(folder)  # reads the last token
    assert plain(IDS).logits.item() == pytest.approx(model(IDS, POSITIONS)[0, -1].item(), abs=1e-6)


def test_a_language_model_gets_a_new_head_from_the_seed(tmp_path: Path):
    config = ModelConfig(**(SIZES | {"hidden_size": 512, "num_layers": 1}))
    folder = saved(new_language_model(config, tokenizer(), seed=0), tmp_path / "m")
    first, same, other = (load_scalar_model(folder, seed=seed) for seed in (1, 1, 2))
    assert_same_weights(first, same)
    head = first.hf.score.weight
    assert not torch.equal(head, other.hf.score.weight)
    assert torch.equal(first.hf.model.embed_tokens.weight, other.hf.model.embed_tokens.weight)
    assert head.std().item() == pytest.approx(513**-0.5, rel=0.15)  # Stiennon et al. 2020
    assert first.hf.config.num_labels == 1


def test_a_scalar_model_says_one_number_a_token_and_looks_only_back():
    model = scalar_model()
    out = model(IDS, POSITIONS)
    assert out.shape == IDS.shape
    assert torch.allclose(model(IDS[:, :4], POSITIONS[:, :4]), out[:, :4], atol=1e-6)


def test_a_new_model_is_a_function_of_its_seed():
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    one, same, other = (new_language_model(ModelConfig(**SIZES), tokenizer(), seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)  # nobody else's randomness moves
    assert_same_weights(one, same)
    assert not torch.equal(one.hf.lm_head.weight, other.hf.lm_head.weight)


def test_a_new_model_has_the_configured_size():
    config = ModelConfig(**SIZES, num_kv_heads=2, tie_embeddings=False, overrides={"rope_theta": 5000.0})
    model = new_language_model(config, tokenizer(), seed=0)
    hf = model.hf.config
    assert (hf.num_hidden_layers, hf.hidden_size, hf.num_key_value_heads) == (2, 32, 2)
    assert model(IDS, POSITIONS).shape == (1, 6, len(tokenizer()))
    assert model.hf.lm_head.weight is not model.hf.model.embed_tokens.weight
    assert context_length(model) == 64 and hf.eos_token_id == tokenizer().eos_token_id
    assert hf.rope_parameters["rope_theta"] == 5000.0


def test_dropout_of_a_saved_model_is_what_is_asked_for(tmp_path: Path):
    model = language_model()
    model.hf.config.attention_dropout = 0.5
    folder = saved(model, tmp_path / "m")
    assert load_language_model(folder).hf.config.attention_dropout == 0
    assert load_language_model(folder, dropout=0.25).hf.config.attention_dropout == 0.25


def test_weights_are_fp32_whatever_was_saved(tmp_path: Path):
    model = language_model().to(torch.bfloat16)
    loaded = load_language_model(saved(model, tmp_path / "m"))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", [LanguageModel, ScalarModel])
def test_packed_documents_do_not_see_each_other(kind: type):
    model = language_model() if kind is LanguageModel else scalar_model()
    together = model(torch.cat([IDS, IDS.flip(1)], 1), torch.cat([POSITIONS, POSITIONS], 1))
    apart = torch.cat([model(IDS, POSITIONS), model(IDS.flip(1), POSITIONS)], 1)
    assert (together - apart).abs().max() < 1e-5


def test_an_empty_model_is_like_the_whole_one_but_for_its_values(tmp_path: Path):
    """Gemma's embedding keeps a buffer in the type of the weights, and ranks that start empty receive it."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 16,
    }
    config = AutoConfig.for_model("gemma3_text", vocab_size=64, num_key_value_heads=1, **sizes)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    whole, empty = (load_language_model(str(tmp_path), empty=empty) for empty in (False, True))

    def held(model: LanguageModel) -> dict[str, tuple]:
        tensors = [*model.named_parameters(), *model.named_buffers()]
        return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors}

    assert held(whole) == held(empty)
    assert "hf.model.embed_tokens.embed_scale" in held(empty) and all(p.is_meta for p in empty.parameters())


@pytest.mark.parametrize("empty", [False, True])
def test_a_model_of_pictures_is_refused(tmp_path: Path, empty: bool):
    AutoConfig.for_model("vit").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot load a model"):
        load_language_model(str(tmp_path), empty=empty)


def test_resolve_finds_the_model_of_a_run_directory(tmp_path: Path):
    saved(language_model(), tmp_path / "run" / "hf")
    assert resolve(str(tmp_path / "run")) == str(tmp_path / "run" / "hf")
    assert resolve(str(tmp_path / "run" / "hf")) == str(tmp_path / "run" / "hf")
    assert resolve("organisation/model") == "organisation/model"
    load_language_model(str(tmp_path / "run"))
    load_tokenizer(str(tmp_path / "run"))


def test_a_folder_without_a_model_is_refused(tmp_path: Path):
    with pytest.raises(ModelError, match=r"no config\.json") as caught:
        resolve(str(tmp_path))
    assert caught.value.where == str(tmp_path) and caught.value.fix


@pytest.mark.parametrize("path", ["/no/such/folder", "./runs/mine", "a/b/c"])
def test_a_path_that_is_no_hub_name_is_refused(path: str):
    with pytest.raises(ModelError, match="no such model folder") as caught:
        load_language_model(path)
    assert caught.value.where == path


@pytest.mark.parametrize("load", [load_language_model, load_scalar_model, load_tokenizer])
def test_a_hub_name_that_cannot_be_had_is_refused(load):
    with pytest.raises(ModelError, match="cannot load") as caught:
        load("nobody/nothing")
    assert caught.value.where == "nobody/nothing" and "\n" not in caught.value.what


@pytest.mark.parametrize("content", ["{}", '{"model_type": "unheard_of"}', "not json"])
def test_a_broken_config_is_refused(tmp_path: Path, content: str):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match="cannot load a model"):
        load_language_model(str(tmp_path))


def test_a_folder_without_weights_is_refused(tmp_path: Path):
    folder = Path(saved(language_model(), tmp_path / "m"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot load a model"):
        load_language_model(str(folder))


@pytest.mark.parametrize("load", [load_language_model, load_scalar_model])
def test_truncated_weights_are_refused(tmp_path: Path, load):
    weights = Path(saved(language_model(), tmp_path / "m")) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot load a model"):
        load(str(tmp_path / "m"))


def test_a_reward_model_is_no_language_model(tmp_path: Path):
    """It has no output embeddings: as a policy it would speak at random."""
    reward_model = saved(scalar_model(), tmp_path)
    with pytest.raises(ModelError) as caught:
        load_language_model(reward_model)
    assert caught.value.where == reward_model


@pytest.mark.parametrize("load", [load_language_model, load_scalar_model])
def test_a_weight_that_is_missing_is_never_drawn_at_random(tmp_path: Path, load):
    weights = {name: p.detach() for name, p in language_model().named_parameters()}
    del weights["hf.model.norm.weight"]
    save_hf(language_model(), tokenizer(), tmp_path, [weights])
    with pytest.raises(ModelError, match=r"lack weights.*norm"):
        load(str(tmp_path))


def test_a_classifier_of_two_labels_is_no_reward_model(tmp_path: Path):
    model = scalar_model()
    model.hf.config.num_labels = 2
    two = type(model.hf)(model.hf.config)
    two.save_pretrained(tmp_path)
    with pytest.raises(ModelError):
        load_scalar_model(str(tmp_path))


def test_a_reward_model_from_the_hub_keeps_its_head(tmp_path: Path):
    """As the hub's client keeps it on disk."""
    name, model = "someone/reward", scalar_model()
    cached = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    saved(model, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    assert has_scalar_head(name)
    assert_same_weights(load_scalar_model(name, seed=5), model)


def test_a_tokenizer_pads_with_its_end_token_where_it_has_no_other(tmp_path: Path):
    tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["pad_token"]
    file.write_text(json.dumps(settings))
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token_id == loaded.eos_token_id == tokenizer().eos_token_id
    del settings["eos_token"]
    file.write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        load_tokenizer(str(tmp_path))


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ModelError) as caught:
        new_language_model(ModelConfig(**SIZES, architecture="unheard_of"), tokenizer(), seed=0)
    assert caught.value.where == "model.architecture"


@pytest.mark.parametrize(
    ("settings", "where"),
    [({"num_heads": 5}, "num_heads"), ({"num_kv_heads": 3}, "num_kv_heads"), ({"num_layers": 0}, "num_layers")],
)
def test_impossible_sizes_are_refused(settings: dict, where: str):
    check(ModelConfig(**SIZES))
    with pytest.raises(ConfigError) as caught:
        check(ModelConfig(**(SIZES | settings)))
    assert caught.value.where == where
