"""Records as prompts to sample completions from."""

from __future__ import annotations

from llmscale.batch import Prompt, TokenExample, as_text
from llmscale.data.chat import ChatRenderer
from llmscale.data.config import DataConfig, TooLong
from llmscale.data.conversations import question
from llmscale.data.convert import Draft
from llmscale.data.records import Record
from llmscale.data.report import Outcome
from llmscale.errors import ConfigError, DataError


def room_for_prompts(config: DataConfig, max_completion_tokens: int) -> int:
    """Tokens that a prompt can have.

    Raises: ConfigError when the context has no room for completions.
    """
    limit = config.max_seq_len - max_completion_tokens
    if limit < 1:
        what = f"{config.max_seq_len} tokens leave no room for a prompt beside {max_completion_tokens} of a completion"
        raise ConfigError(what, where="data.max_seq_len", fix="Raise it, or shorten the completions.")
    if config.too_long is TooLong.truncate:
        raise ConfigError("prompts cannot be truncated", where="data.too_long", fix="Choose error or drop.")
    return limit


def prompt_draft(record: Record, config: DataConfig, renderer: ChatRenderer, limit: int) -> Draft[Prompt]:
    """The record up to where the assistant would write; a last turn of the assistant's is left out.

    Raises: DataError for a malformed record; when finished, for one of more than `limit` tokens.
    """
    messages, shape = question(record, config)
    while messages[-1]["role"] == "assistant":
        messages.pop()
    text = as_text(messages)
    fields = {name: value for name, value in record.fields.items() if name != shape.question}

    def finish(sequences: list[TokenExample]) -> tuple[Prompt | None, Outcome]:
        token_ids = sequences[0].token_ids
        if len(token_ids) <= limit:
            return Prompt(token_ids, text, fields, tuple(messages)), Outcome(0)
        if config.too_long is TooLong.drop:
            return None, Outcome.TOO_LONG
        what = f"this prompt has {len(token_ids)} tokens, there is room for {limit}"
        what += f" (data.max_seq_len {config.max_seq_len} less {config.max_seq_len - limit} for the completion)"
        raise DataError(what, fix="Raise data.max_seq_len, or set data.too_long=drop.")

    return Draft(record.where, [renderer.pieces(messages, generation_prompt=True)], finish)
