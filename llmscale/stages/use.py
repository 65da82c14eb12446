"""Using a trained model in the terminal: `generate` answers prompts, `chat` holds a conversation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from llmscale.batch import Prompt
from llmscale.config import build
from llmscale.data.chat import ChatRenderer, Message, encode
from llmscale.errors import DataError
from llmscale.models.loading import context_length, load_language_model, load_tokenizer
from llmscale.protocols import SamplingRequest
from llmscale.stages.answering_config import ChatConfig, GenerateConfig, UseConfig


class Speaker:
    """A model with its tokenizer and chat template."""

    def __init__(self, config: UseConfig):
        self.config = config
        self.tokenizer = load_tokenizer(config.model.path)
        self.renderer = ChatRenderer(self.tokenizer)
        self.model = load_language_model(config.model.path)
        self.num_answers = 0  # each answer draws its own randomness

    def room(self, token_ids: np.ndarray) -> int:
        """Tokens that the context leaves for an answer."""
        return context_length(self.model) - len(token_ids)

    def answer(self, token_ids: np.ndarray) -> str:
        """Sample a completion, as long as the config and the context allow.

        Raises: DataError when the prompt fills the context.
        """
        room = self.room(token_ids)
        if room < 1:
            what = f"the prompt has {len(token_ids)} tokens, the model's context {context_length(self.model)}"
            raise DataError(what, where="prompt", fix="Shorten it.")
        config = replace(self.config.rollout, max_new_tokens=min(self.config.rollout.max_new_tokens, room))
        engine = build(config, self.model, self.tokenizer, self.config.seed, self.renderer.stop_ids)
        request = SamplingRequest(Prompt(token_ids, ""), draw_id=self.num_answers, sample_index=0)
        self.num_answers += 1
        return engine.generate([request])[0].completion


def generate(config: GenerateConfig) -> None:
    """Print the answer to the prompt, or to each line of standard input."""
    speaker = Speaker(config)
    prompts = [config.prompt] if config.prompt is not None else (line.rstrip("\n") for line in sys.stdin)
    for prompt in prompts:
        if config.raw:
            ids = encode(speaker.tokenizer, [prompt], special_tokens=False)[0]
            token_ids = np.array(ids, dtype=np.int64)
        else:
            token_ids = speaker.renderer.render_prompt([*system(config), Message(role="user", content=prompt)])
        if not len(token_ids):
            raise DataError("the prompt is empty", where="prompt", fix="Give some text.")
        print(speaker.answer(token_ids), flush=True)


def chat(config: ChatConfig) -> None:
    """Answer line by line until the input ends. What no longer fits is forgotten, oldest turns first."""
    speaker = Speaker(config)
    turns: list[Message] = []
    for line in _lines():
        turns.append(Message(role="user", content=line))
        token_ids = speaker.renderer.render_prompt([*system(config), *turns])
        wanted = min(config.rollout.max_new_tokens, context_length(speaker.model) // 4)
        while speaker.room(token_ids) < wanted and len(turns) > 1:
            del turns[:2]
            token_ids = speaker.renderer.render_prompt([*system(config), *turns])
        reply = speaker.answer(token_ids)
        turns.append(Message(role="assistant", content=reply))
        print(reply, flush=True)


def system(config: UseConfig) -> list[Message]:
    return [Message(role="system", content=config.system_prompt)] if config.system_prompt else []


def _lines() -> Iterator[str]:
    """What the user writes; the prompt sign is shown to a person only."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line
