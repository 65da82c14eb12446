"""Records as prompts to sample completions from."""

from __future__ import annotations

from collections.abc import Iterable

from llmscale.batch import Prompt
from llmscale.data.chat import ChatRenderer
from llmscale.data.config import DataConfig, TooLong
from llmscale.data.conversations import question
from llmscale.data.report import Report
from llmscale.data.sources import Record, located
from llmscale.errors import ConfigError, DataError


def prompts(
    records: Iterable[Record], config: DataConfig, renderer: ChatRenderer, report: Report, max_completion_tokens: int
) -> list[Prompt]:
    """One prompt a record, up to where the assistant would write; a last turn of the assistant's is left out.

    Raises: ConfigError when the context has no room for completions, DataError for a prompt that leaves too little.
    """
    limit = config.max_seq_len - max_completion_tokens
    if limit < 1:
        what = f"{config.max_seq_len} tokens leave no room for a prompt beside {max_completion_tokens} of a completion"
        raise ConfigError(what, where="data.max_seq_len", fix="Raise it, or shorten the completions.")
    if config.too_long is TooLong.truncate:
        raise ConfigError("prompts cannot be truncated", where="data.too_long", fix="Choose error or drop.")
    kept = []
    for record in records:
        report.records += 1
        with located(record):
            prompt = _prompt(record, config, renderer)
            length = len(prompt.token_ids)
            if length > limit and config.too_long is not TooLong.drop:
                what = f"this prompt has {length} tokens, there is room for {limit}"
                what += f" (data.max_seq_len {config.max_seq_len} less {max_completion_tokens} for the completion)"
                raise DataError(what, fix="Raise data.max_seq_len, or set data.too_long=drop.")
        if length > limit:
            report.dropped_too_long += 1
            continue
        report.tokens += length
        kept.append(prompt)
    return kept


def _prompt(record: Record, config: DataConfig, renderer: ChatRenderer) -> Prompt:
    messages, shape = question(record, config)
    while messages[-1]["role"] == "assistant":
        messages.pop()
    alone = len(messages) == 1
    text = messages[0]["content"] if alone else "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)
    fields = {name: value for name, value in record.fields.items() if name != shape.question}
    return Prompt(renderer.render_prompt(messages), text, fields)
