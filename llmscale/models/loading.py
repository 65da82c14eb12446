"""Loading models and tokenizers, and making new ones.

A model here is an `nn.Module` called with `input_ids` and `position_ids` [B, T] that returns one tensor: logits
[B, T, V] (`LanguageModel`) or one scalar per token [B, T] (`ScalarModel`: reward models and critics).
"""

from __future__ import annotations

import hashlib
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from llmscale.errors import ModelError
from llmscale.models.config import ModelConfig
from llmscale.models.head import has_plain_head, install_token_head, score_logits, scored

if TYPE_CHECKING:
    from llmscale.models.adapters import Lora

transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()


class LanguageModel(nn.Module):
    """A Hugging Face decoder as a function of token ids and positions."""

    adapter: Lora | None = None  # what is trained of it, where that is not the model itself

    def __init__(self, hf: PreTrainedModel):
        super().__init__()
        self.hf: Any = hf  # its attributes differ from architecture to architecture
        self.has_token_head = False
        if has_plain_head(hf):
            self.use_token_head()

    def use_token_head(self) -> None:
        """Score tokens without the logits of all of them."""
        install_token_head(self.hf)
        self.has_token_head = True

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        targets: Tensor | None = None,
        wanted: Tensor | None = None,
        temperature: float = 1.0,
        entropy: str = "none",
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [B, T, V]; or, of `targets` [B, T] as what follows each token, log-probability and entropy [B, T] where
        they are `wanted` [B, T]: see `llmscale.protocols.Forward.logprobs`."""
        # use_cache=False in the call: with a cache transformers does not detect packed rows and lets documents leak.
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
        if targets is None or wanted is None:
            return self.hf(**inputs).logits
        if self.has_token_head:
            hidden = self.hf.base_model(**inputs).last_hidden_state
            return scored(self.hf.get_output_embeddings(), hidden, targets, wanted, temperature, entropy)
        return scored(score_logits, self.hf(**inputs).logits, targets, wanted, temperature, entropy)


class ScalarModel(nn.Module):
    """A Hugging Face sequence classifier with one label, read out at every token instead of the last.

    Scores are standardised by the mean and deviation that the reward stage measured and noted in the model's config (0
    and 1 before that): only their differences mean something, and RLHF wants rewards, and a critic, of a known scale.
    """

    adapter: Lora | None = None

    def __init__(self, hf: PreTrainedModel):
        super().__init__()
        self.hf: Any = hf  # its attributes differ from architecture to architecture

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        hidden = self.hf.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        config = self.hf.config
        return (self.hf.score(hidden).squeeze(-1) - getattr(config, "score_mean", 0.0)) / getattr(
            config, "score_std", 1.0
        )


Model = LanguageModel | ScalarModel


def resolve(path: str, holds: str = "config.json") -> str:
    """The Hugging Face folder of a run directory, a folder itself, or a hub name.

    Raises: ModelError when it is none of these.
    """
    local = Path(path)
    for folder in (local, local / "hf"):
        if (folder / holds).is_file():
            return str(folder)
    if local.exists():
        raise ModelError(
            f"this folder holds no model (no {holds}, no hf/{holds})",
            where=str(path),
            fix="Name a finished run directory or a Hugging Face folder.",
        )
    if path.count("/") > 1 or path.startswith(("/", ".")):
        raise ModelError("no such model folder", where=path, fix="Name a finished run directory or a hub name.")
    return path


def load_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder or hub name; one without a padding token pads with its end token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(path, "tokenizer_config.json"), trust_remote_code=False)
    except (OSError, ValueError) as error:
        fix = "Name a finished run, a Hugging Face folder or a hub name; offline, a local folder."
        raise ModelError(f"cannot load a tokenizer: {_first_line(error)}", where=path, fix=fix) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError("this tokenizer has no fast version", where=path, fix="Convert it to tokenizer.json.")
    if tokenizer.eos_token_id is None:
        raise ModelError("this tokenizer has no end-of-sequence token", where=path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def new_language_model(
    config: ModelConfig, tokenizer: PreTrainedTokenizerFast, seed: int, *, empty: bool = False
) -> LanguageModel:
    """A randomly initialised decoder of the configured size; the same seed gives the same weights. `empty`: without them,
    on the meta device."""
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if config.architecture not in CONFIG_MAPPING:
        what = f"transformers has no model type {config.architecture!r}"
        raise ModelError(what, where="model.architecture", fix="Try llama or qwen2.")
    try:
        hf_config = AutoConfig.for_model(config.architecture, **(sizes | config.overrides))
        with torch.random.fork_rng(devices=[]), torch.device("meta") if empty else nullcontext():
            torch.manual_seed(seed)
            return LanguageModel(AutoModelForCausalLM.from_config(_with_dropout(hf_config, config.dropout)))
    except (ValueError, TypeError, RuntimeError, StrictDataclassError) as error:
        raise ModelError(
            f"no {config.architecture} model can be made of these sizes: {_first_line(error)}",
            where="model",
            fix="Look at the sizes and at model.overrides.",
        ) from error


def load_language_model(path: str, dropout: float = 0.0, *, empty: bool = False) -> LanguageModel:
    """A decoder in fp32 from a run directory, a Hugging Face folder or a hub name. `empty`: without its weights, which are
    on the meta device: for who has others."""
    if has_scalar_head(path):
        raise ModelError(
            "this is a reward model, not a language model", where=path, fix="Name a run of pretrain, sft or rlhf."
        )
    load = _without_weights if empty else _from_pretrained
    return LanguageModel(load(AutoModelForCausalLM, path, dropout))


def load_scalar_model(
    path: str, dropout: float = 0.0, seed: int = 0, zero_head: bool = False, *, empty: bool = False
) -> ScalarModel:
    """A decoder with a scalar head, in fp32. A reward model keeps its own head. A language model gets a new one: of
    zeros for a critic, whose first values would else be noise, or N(0, 1 / (hidden_size + 1)) as in Stiennon et al. 2020,
    drawn from `seed`. `empty`: see `load_language_model`."""
    if empty:
        return ScalarModel(_without_weights(AutoModelForSequenceClassification, path, dropout, num_labels=1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hf: Any = _from_pretrained(AutoModelForSequenceClassification, path, dropout, num_labels=1)
        if not has_scalar_head(path):
            nn.init.normal_(hf.score.weight, std=0.0 if zero_head else (hf.config.hidden_size + 1) ** -0.5)
    return ScalarModel(hf)


def cast_parameters(model: Model, dtype: torch.dtype) -> None:
    """Cast the weights alone: `model.to(dtype)` would cast the rotary frequencies too, and with them late positions."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def num_parameters(model: Model, trained_only: bool = False) -> int:
    """Weights of the model and its adapter, a tied one once; or those of them that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained_only)


def has_scalar_head(path: str) -> bool:
    """Whether the saved model is a reward model (a sequence classifier) rather than a language model."""
    architectures = _read_config(path).architectures or []
    return any("SequenceClassification" in name for name in architectures)


def check_isolation(model: Model) -> None:
    """Raises: ModelError where `isolates` does not hold."""
    if not isolates(model):
        raise ModelError(
            f"documents packed in one row would see each other in a {type(model.hf).__name__}",
            where="model.architecture",
            fix="Use an architecture that reads position_ids, such as llama, qwen2 or gpt2, or engine.rows=padded.",
        )


@torch.no_grad()
def isolates(model: Model) -> bool:
    """Whether two documents in one row cannot see each other. That restarting positions keep them apart is up to the
    architecture: some ignore them, and would learn from the wrong context without a word. An empty model is not asked: the
    rank that has the weights is."""
    if next(model.parameters()).is_meta:
        return True
    ids = torch.arange(1, 9, device=next(model.parameters()).device).unsqueeze(0)
    positions = torch.arange(4, device=ids.device).unsqueeze(0)
    packed = model(input_ids=ids, position_ids=positions.repeat(1, 2))
    alone = model(input_ids=ids[:, 4:], position_ids=positions)
    return torch.allclose(packed[:, 4:], alone, atol=1e-4)


def context_length(model: Model) -> int:
    """Longest sequence in tokens; a model with relative positions only has no such limit."""
    return _context_length(model.hf.config)


def saved_context_length(path: str) -> int:
    """The same, read from the config alone."""
    return _context_length(_read_config(path))


def weights_digest(path: str) -> str:
    """Of the files with a folder's weights; of a model of the hub its commit."""
    folder = Path(resolve(path))
    if not folder.is_dir():
        return hub_commit(path)
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "blake2b").digest())
    return digest.hexdigest()


def hub_commit(path: str) -> str:
    """Which version of a model of the hub is here."""
    return str(_read_config(path)._commit_hash)


def _context_length(config: PretrainedConfig) -> int:
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 62)


def _from_pretrained(auto: type, path: str, dropout: float, **kwargs: object) -> PreTrainedModel:
    config = _with_dropout(_read_config(path, **kwargs), dropout)
    try:
        hf, report = auto.from_pretrained(  # type: ignore[attr-defined]
            resolve(path),
            config=config,
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _not_loaded(error, path) from error
    # transformers would draw them at random; only a new scalar head may be.
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("score."))
    if missing:
        raise ModelError(
            f"its files lack weights of a {type(hf).__name__}: {', '.join(missing[:3])}",
            where=path,
            fix="Name a language model: a run of pretrain, sft or rlhf.",
        )
    return hf


def _without_weights(auto: Any, path: str, dropout: float, **kwargs: object) -> PreTrainedModel:
    config = _with_dropout(_read_config(path, **kwargs), dropout)
    try:
        with torch.device("meta"):
            hf = auto.from_config(config, dtype=torch.float32)  # else as saved
    except ValueError as error:
        raise _not_loaded(error, path) from error
    if hf.can_generate():
        with suppress(OSError):  # there is none: it keeps that of its config
            hf.generation_config = GenerationConfig.from_pretrained(resolve(path))
    return hf


def _read_config(path: str, **kwargs: object) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(resolve(path), trust_remote_code=False, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        raise _not_loaded(error, path) from error


def _not_loaded(error: Exception, path: str) -> ModelError:
    fix = "Check the name; offline, give a local folder."
    return ModelError(f"cannot load a model: {_first_line(error)}", where=path, fix=fix)


def _with_dropout(config: PretrainedConfig, dropout: float) -> PretrainedConfig:
    for name in ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout"):
        if hasattr(config, name):
            setattr(config, name, dropout)
    return config


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
