"""Records of instruction data, in the shapes they are published in, as conversations and then as training examples."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from llmscale.batch import TokenExample
from llmscale.data.chat import ROLES, ChatRenderer, Message
from llmscale.data.config import DataConfig, TooLong
from llmscale.data.convert import Draft
from llmscale.data.records import Record, columns_hint
from llmscale.data.report import Outcome
from llmscale.errors import DataError

ROLE_NAMES = {"human": "user", "gpt": "assistant", "tool": "tool", **{role: role for role in ROLES}}


class Shape(NamedTuple):
    """The columns of one way to write a conversation down. Without `answer`, `question` holds every turn."""

    question: str
    answer: str | None


SHAPES = (
    Shape("messages", None),  # [{role, content}]
    Shape("conversations", None),  # [{from, value}]
    Shape("instruction", "output"),  # and perhaps `input`
    Shape("prompt", "completion"),
    Shape("question", "answer"),
)


def conversation_draft(record: Record, config: DataConfig, renderer: ChatRenderer) -> Draft[TokenExample]:
    """Every assistant's turn of it is learned.

    Raises: DataError for a malformed record.
    """
    messages = conversation(record, config)
    if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        return Draft(record.where, [], lambda _: (None, Outcome.EMPTY))
    return Draft(record.where, [renderer.pieces(messages)], lambda sequences: fitted(sequences[0], config))


def fitted(example: TokenExample, config: DataConfig) -> tuple[TokenExample | None, Outcome]:
    """The example if it is short enough, else what `too_long` makes of it."""
    length, limit = len(example.token_ids), config.max_seq_len
    if length <= limit:
        return example, Outcome(0)
    if config.too_long is TooLong.error:
        raise too_long_error(length, limit)
    if config.too_long is not TooLong.truncate or not example.loss_mask[:limit].any():
        return None, Outcome.TOO_LONG
    return TokenExample(example.token_ids[:limit], example.loss_mask[:limit]), Outcome.TRUNCATED


def too_long_error(length: int, limit: int) -> DataError:
    fix = "Raise data.max_seq_len, or set data.too_long=drop (or truncate)."
    return DataError(f"this record has {length} tokens, data.max_seq_len is {limit}", fix=fix)


def conversation(record: Record, config: DataConfig) -> list[Message]:
    """All turns up to the assistant's last, the configured system message first.

    Raises: DataError where no known shape fits.
    """
    shape = find_shape(record, config.columns, with_answer=True)
    messages = _question(record, shape, config.system_prompt)
    if shape.answer is not None:
        return [*messages, Message(role="assistant", content=record.string(shape.answer))]
    while messages and messages[-1]["role"] != "assistant":  # a question that nobody answered
        messages.pop()
    return messages


def question(record: Record, config: DataConfig) -> tuple[list[Message], Shape]:
    """The turns before an answer that is not there, or not in this column, and the shape they were found in."""
    shape = find_shape(record, config.columns, with_answer=False)
    messages = _question(record, shape, config.system_prompt)
    if not any(m["role"] == "user" for m in messages):
        raise DataError(f"column {shape.question!r} has no user's turn", where=record.where)
    return messages, shape


def find_shape(record: Record, mapped: Collection[str], with_answer: bool) -> Shape:
    """The first shape whose columns are there; shapes that the user mapped columns to come first."""
    for shape in sorted(SHAPES, key=lambda s: s.question not in mapped):
        if shape.question in record.fields and (not with_answer or not shape.answer or shape.answer in record.fields):
            return shape
    wanted = [f"{s.question}+{s.answer}" if with_answer and s.answer else s.question for s in SHAPES]
    present = next((s.answer for s in SHAPES if s.answer and s.question in record.fields), None)
    near = present or next((s.question for s in SHAPES if s.question in mapped), "prompt")
    what = f"no conversation in this record: it needs one of {', '.join(wanted)}"
    raise DataError(what, where=record.where, fix=columns_hint(near, record.fields))


def _question(record: Record, shape: Shape, system_prompt: str | None) -> list[Message]:
    value = record.value(shape.question)
    if shape.answer is None or isinstance(value, list):
        messages = turns(record, shape.question)
    else:
        text = record.string(shape.question)
        extra = record.fields.get("input") if shape.question == "instruction" else None
        messages = [Message(role="user", content=f"{text}\n\n{record.string('input')}" if extra else text)]
    system = record.string("system") if record.fields.get("system") else system_prompt
    if system and messages[0]["role"] != "system":
        messages.insert(0, Message(role="system", content=system))
    return messages


def turns(record: Record, column: str) -> list[Message]:
    value = record.value(column)
    if not isinstance(value, list) or not value:
        raise DataError(f"column {column!r} must be a list of turns and not empty", where=record.where)
    return [turn(item, record, f"{column}[{i}]") for i, item in enumerate(value)]


def turn(item: Any, record: Record, name: str) -> Message:
    """{role, content} or {from, value} as a message. `name` says in an error which turn it was."""
    for role_key, content_key in (("role", "content"), ("from", "value")):
        if isinstance(item, dict) and role_key in item and content_key in item:
            role, content = item[role_key], item[content_key]
            break
    else:
        raise DataError(f"{name} must be {{role, content}} or {{from, value}}", where=record.where)
    if role not in ROLE_NAMES:
        fix = f"Roles are {', '.join(ROLE_NAMES)}."
        raise DataError(f"{name} has the role {role!r}", where=record.where, fix=fix)
    if not isinstance(content, str):
        raise DataError(f"{name} has {content_key} {content!r:.40}, which is not text", where=record.where)
    return Message(role=ROLE_NAMES[role], content=content)
