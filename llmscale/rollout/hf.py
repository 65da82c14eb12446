"""Rollouts by forwards of the Hugging Face model itself: runs everywhere, and is the reference for other engines.

The batch is one forward a token, as in transformers' `generate`, but a prompt is read once for all its samples, what is
known of it is never copied, and a row leaves the batch with its last token. It can be interrupted between two tokens.

Legend: P different prompts, B rows (a request each), T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from llmscale import distributed
from llmscale.batch import Trajectory
from llmscale.models.loading import LanguageModel, context_length
from llmscale.models.weights import load_buckets
from llmscale.protocols import SamplingRequest, WeightBucket
from llmscale.rollout.cache import attend_by_products
from llmscale.rollout.completion import Completion, check_newer, check_room, check_weights
from llmscale.rollout.config import HFRolloutConfig
from llmscale.rollout.decoding import RunningBatch, closed_up
from llmscale.rollout.sampling import sample


class HFRollout:
    """`llmscale.protocols.RolloutEngine`. One call of `generate` is one batch: the same requests give the same bits."""

    def __init__(
        self,
        config: HFRolloutConfig,
        model: LanguageModel,
        tokenizer: PreTrainedTokenizerFast,
        seed: int,
        stop_ids: Sequence[int],
    ):
        self.config, self.tokenizer, self.seed, self.stop_ids = config, tokenizer, seed, list(stop_ids)
        self.model = model.to(distributed.device()).eval()
        self.version = 0  # of the weights held; 0 are those that it was built with
        self.announced = 0  # the newest version that is known of
        attend_by_products(self.model.hf)

    @torch.no_grad()
    def generate(self, requests: Sequence[SamplingRequest]) -> list[Trajectory]:
        check_weights(requests, self.version)
        check_room(requests, self.config.max_new_tokens, context_length(self.model))
        completions = [Completion.begun(request) for request in requests]
        if self.announced > self.version:
            return [
                completion.trajectory(self.stop_ids, self.tokenizer, interrupted=True) for completion in completions
            ]
        prefixes = [completion.prefix for completion in completions]
        numbers: dict[bytes, int] = {}  # prefixes in the order in which they appear
        number_of = np.array([numbers.setdefault(prefix.tobytes(), len(numbers)) for prefix in prefixes])
        _, first = np.unique(number_of, return_index=True)
        batch = RunningBatch(self.model.hf, self.config.max_new_tokens)
        logits = batch.read(**self._left_padded([prefixes[int(i)] for i in first]))[number_of]
        batch.rearrange(number_of)
        going = np.arange(len(requests))  # the request that each row of the batch goes on with
        while len(going) and self.announced <= self.version:
            rows = [completions[int(i)] for i in going]
            positions = [len(row.token_ids) for row in rows]
            tokens, chosen = sample(logits, [row.request for row in rows], positions, self.config, self.seed)
            for row, token, logprob in zip(rows, tokens.tolist(), chosen.tolist(), strict=True):
                row.add(token, logprob, self.version)
            at_limit = np.array(positions) + 1 == self.config.max_new_tokens
            kept = closed_up(~at_limit & ~np.isin(tokens, self.stop_ids))
            if 0 < len(kept) < len(going):
                tokens = tokens[kept]
                batch.rearrange(kept)
            going = going[kept]
            if len(going):
                logits = batch.append(tokens)
        broken_off = set(going.tolist())
        return [c.trajectory(self.stop_ids, self.tokenizer, i in broken_off) for i, c in enumerate(completions)]

    def interrupt(self, version: int) -> None:
        """What `generate` is about comes back as it is after the next token, and so does whatever else is asked for, until
        weights of this version are here."""
        self.announced = max(self.announced, version)

    def load_weights(self, version: int, buckets: Sequence[WeightBucket]) -> None:
        check_newer(version, self.version)
        load_buckets(self.model, buckets, source=f"weights {version}")
        self.version = version

    def sleep(self) -> None:
        self.model.to("cpu")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # torch would keep what is free for itself

    def wake(self) -> None:
        self.model.to(distributed.device())

    def _left_padded(self, prompts: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` [B, T]; padding stands on the left, for generation continues at the right."""
        width = max(len(p) for p in prompts)
        input_ids = np.full((len(prompts), width), self.tokenizer.pad_token_id)
        attention_mask = np.zeros((len(prompts), width), dtype=np.int64)
        for i, prompt in enumerate(prompts):
            input_ids[i, width - len(prompt) :] = prompt
            attention_mask[i, width - len(prompt) :] = 1
        arrays = {"input_ids": input_ids, "attention_mask": attention_mask}
        return {name: torch.from_numpy(array).to(distributed.device()) for name, array in arrays.items()}
