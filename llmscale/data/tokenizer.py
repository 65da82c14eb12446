"""Training a tokenizer: byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909, over bytes), digits one by one.

No normalisation and all 256 bytes in the vocabulary, so any text comes back as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tokenizers
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llmscale.data.chat import DEFAULT_CHAT_TEMPLATE, ROLES
from llmscale.errors import ConfigError

PAD, EOS = "<|pad|>", "<|eos|>"
SPECIAL_TOKENS = [PAD, EOS, *(f"<|{role}|>" for role in ROLES)]
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)


def train_tokenizer(texts: Iterator[str], vocab_size: int, model_max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `vocab_size` tokens (fewer where the texts hold too few repeated pairs); the same texts
    give the same one. Token ids: special tokens, then bytes, then merges by frequency.

    Raises: ConfigError when `vocab_size` does not hold every byte and special token.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        what = (
            f"must be at least {MIN_VOCAB_SIZE} (256 bytes and {len(SPECIAL_TOKENS)} special tokens), is {vocab_size}"
        )
        raise ConfigError(what, where="model.vocab_size", fix=f"{MIN_VOCAB_SIZE} gives a tokenizer of plain bytes.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        additional_special_tokens=SPECIAL_TOKENS[2:],
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,  # it would turn " ." into "."
        chat_template=DEFAULT_CHAT_TEMPLATE,
    )


def identity(tokenizer: PreTrainedTokenizerFast) -> list[Any]:
    """Everything that decides which tokens it makes of a text or a conversation, as JSON values."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # of an earlier call, perhaps
    backend.no_padding()
    versions = [transformers.__version__, tokenizers.__version__]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return [backend.to_str(), special, tokenizer.chat_template, versions]


def token_dtype(tokenizer: PreTrainedTokenizerFast) -> type:
    """The smallest type that holds every token id."""
    return np.uint16 if max(tokenizer.get_vocab().values()) < 1 << 16 else np.int32
