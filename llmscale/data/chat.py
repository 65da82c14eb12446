"""The one place where conversations become tokens, for training, sampling and evaluation alike.

An assistant's turn is tokenized apart from what stands before it and appended, because that is what happens when a
model generates: it goes on from the prompt's tokens, and no merge crosses the boundary. So for every turn i of the
assistant's, `render(messages[: i + 1])` starts with exactly the tokens of `render_prompt(messages[:i])`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
from jinja2.exceptions import TemplateError

from llmscale.batch import TokenExample
from llmscale.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROLES = ("system", "user", "assistant")

DEFAULT_CHAT_TEMPLATE = """\
{%- if bos_token %}{{ bos_token }}{% endif %}
{%- for message in messages %}
{{- '<|' ~ message.role ~ '|>' ~ message.content ~ eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""


_OPEN, _CLOSE = "\ue000", "\ue001"  # private-use characters; content that has them is held back too
_PLACEHOLDER = rf"{_OPEN}\d+{_CLOSE}"
_ANSWER = _OPEN + _CLOSE  # stands for what the assistant wrote, where that is not to be read


Message = dict[str, str]  # `role`, one of ROLES or another that the template knows, and `content`

CUT = " [cut]"  # stands at the end of an observation that was too long


class Piece(NamedTuple):
    """A stretch of text that is tokenized by itself."""

    text: str
    is_content: bool  # names of special tokens in it are ordinary characters
    is_target: bool  # its tokens are learned


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], special_tokens: bool) -> list[list[int]]:
    """Token ids of each text, nothing added. Without `special_tokens`, their names in a text are ordinary characters:
    a web page that says <|eos|> does not end there."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # a tokenizer.json can ask for both
    backend.no_padding()
    backend.encode_special_tokens = not special_tokens
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def tokenized(tokenizer: PreTrainedTokenizerFast, sequences: Sequence[Sequence[Piece]]) -> list[TokenExample]:
    """The pieces of each sequence, one after the other. All are tokenized at once, and a piece that comes back (the prompt
    of every completion) only once."""
    ids: dict[tuple[str, bool], np.ndarray] = {}
    for is_content in (False, True):
        keys = list({(p.text, is_content): None for pieces in sequences for p in pieces if p.is_content == is_content})
        made = encode(tokenizer, [text for text, _ in keys], special_tokens=not is_content)
        ids |= zip(keys, (np.array(some, dtype=np.int64) for some in made), strict=True)
    return [_joined([ids[p.text, p.is_content] for p in pieces], [p.is_target for p in pieces]) for pieces in sequences]


def _joined(ids: list[np.ndarray], targets: list[bool]) -> TokenExample:
    return TokenExample(np.concatenate(ids), np.repeat(targets, [len(some) for some in ids]))


class ChatRenderer:
    """Renders conversations by the tokenizer's own chat template. A tokenizer that has none gets the default one, which
    is then saved with it.

    Raises: ModelError for a template that ends no assistant's turn with a special token, or that changes earlier turns
    when a later one is added (a mask could not tell what the model had written).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer
        if tokenizer.chat_template is None:
            if tokenizer.eos_token is None:
                raise ModelError("the tokenizer has neither a chat template nor an end-of-sequence token")
            tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
        self._special_tokens = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
        self.end_token = self._find_end_token()
        self.end_token_id = cast(int, tokenizer.convert_tokens_to_ids(self.end_token))

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end a completion: the template's end of turn and the tokenizer's end of sequence."""
        eos = self.tokenizer.eos_token_id
        return sorted({self.end_token_id, self.end_token_id if eos is None else cast(int, eos)})

    def render(self, messages: Sequence[Message]) -> TokenExample:
        """The whole conversation; targets are the assistant's tokens with the one that ends its turn."""
        return tokenized(self.tokenizer, [self.pieces(messages)])[0]

    def render_prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """int64 [T]: the conversation up to where the assistant begins to write."""
        return tokenized(self.tokenizer, [self.pieces(messages, generation_prompt=True)])[0].token_ids

    def pieces(self, messages: Sequence[Message], generation_prompt: bool = False) -> list[Piece]:
        """The conversation by turns, for `tokenized`. What a template puts after the token that ends the assistant's turn
        (often a newline) belongs to the next prompt."""
        messages, held_back = self._hold_back(messages)
        pieces: list[Piece] = []
        done, start = "", 0  # the text that stands in `pieces`, and the first message that does not
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._text(messages[:i], generation_prompt=True)
            answer = _continued(prompt, self._text(messages[: i + 1], generation_prompt=False))
            written, end, _ = answer.rpartition(self.end_token)
            pieces += _separated(_continued(done, prompt), held_back, is_target=False)
            pieces += _separated(written + end, held_back, is_target=True)
            done, start = prompt + written + end, i + 1
        if generation_prompt or start < len(messages):
            rest = _continued(done, self._text(messages, generation_prompt))
            pieces += _separated(rest, held_back, is_target=False)
        return pieces

    def render_observation(
        self, messages: Sequence[Mapping[str, str]], text: str, *, role: str, max_tokens: int
    ) -> tuple[Message, np.ndarray]:
        """What follows a conversation that ends with the assistant's turn, when `role` says `text` and the assistant is to go
        on: the message, and its token ids to append, int64 [T]. They begin with what the template puts after the token that
        ended the turn, and end where the assistant begins to write: the tokens that `render` has between the two turns.

        Of the text `max_tokens` tokens are kept and `CUT` says so. A template may add something to earlier answers or forget
        their thoughts: what the assistant wrote plays no part. Raises: ModelError for a template that leaves its turn out when
        another one follows, DataError for one that does not know the role.
        """
        message = Message(role=role, content=self._shortened(text, max_tokens))
        safe, held_back = self._hold_back([*map(dict, messages), message])
        unread = [m | {"content": _ANSWER} if m["role"] == "assistant" else m for m in safe]
        _, answer, rest = self._text(unread, generation_prompt=True).rpartition(_ANSWER)
        _, end, between = rest.partition(self.end_token)
        if not answer or not end:
            what = "the chat template leaves the assistant's turn out when another one follows"
            raise ModelError(what, fix="Use a template that renders each turn once and for all.")
        return message, tokenized(self.tokenizer, [_separated(between, held_back, is_target=False)])[0].token_ids

    def _shortened(self, text: str, max_tokens: int) -> str:
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.encode_special_tokens = True
        offsets = backend.encode(text, add_special_tokens=False).offsets
        if len(offsets) <= max_tokens:
            return text
        # A character may take several tokens: the last is kept if all of them are.
        end = min(offsets[max_tokens - 1][1], offsets[max_tokens][0])
        return text[:end] + CUT

    def decode(self, token_ids: np.ndarray | list[int]) -> str:
        """Text without special tokens."""
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return cast(str, text)

    def _hold_back(self, messages: Sequence[Message]) -> tuple[list[Message], dict[str, str]]:
        """Content that spells a special token goes through the template as a placeholder and is tokenized as ordinary
        characters, so that no message can forge a turn. Placeholder -> content."""
        safe, held_back = [], {}
        for i, message in enumerate(messages):
            content = message["content"]
            if any(token in content for token in self._special_tokens) or _OPEN in content:
                placeholder = f"{_OPEN}{i}{_CLOSE}"
                held_back[placeholder] = content
                message = Message(role=message["role"], content=placeholder)
            safe.append(message)
        return safe, held_back

    def _text(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation_prompt
            )
            return cast(str, text)
        except TemplateError as error:
            raise DataError(f"the chat template refuses this conversation: {error}") from error

    def _find_end_token(self) -> str:
        question, answer = Message(role="user", content="a"), Message(role="assistant", content="b")
        prompt = self._text([question], generation_prompt=True)
        written = _continued(prompt, self._text([question, answer], generation_prompt=False))
        after = written.partition("b")[2]
        found = {after.find(token): token for token in self._special_tokens if token in after}
        if not found:
            what = "the chat template does not end the assistant's turn with a special token, so a model cannot stop"
            raise ModelError(what, fix="Add {{ eos_token }} after the assistant's content in the template.")
        return found[min(found)]


def _separated(text: str, held_back: Mapping[str, str], is_target: bool) -> list[Piece]:
    """The template's text and the content that was held back from it, apart."""
    parts = enumerate(re.split(f"({_PLACEHOLDER})", text))
    return [Piece(held_back.get(part, part), i % 2 == 1, is_target) for i, part in parts if part]


def _continued(before: str, text: str) -> str:
    """What `text` adds to `before`."""
    if not text.startswith(before):
        what = "the chat template changes earlier turns when a later one is added"
        raise ModelError(what, fix="Use a template that renders each turn once and for all.")
    return text[len(before) :]
