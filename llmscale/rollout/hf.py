"""Rollouts by forwards of the Hugging Face model itself: runs everywhere, and is the reference for other engines.

The batch is one forward a token, as in transformers' `generate`, but a prompt is read once for all its samples, what is
known of it is never copied, and a row leaves the batch with its last token.

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
from llmscale.rollout.completion import as_trajectory, check_newer, check_room, check_weights
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
        attend_by_products(self.model.hf)

    @torch.no_grad()
    def generate(self, requests: Sequence[SamplingRequest]) -> list[Trajectory]:
        check_weights(requests, self.version)
        numbers: dict[bytes, int] = {}  # prompts in the order in which they appear
        prompt_of = np.array([numbers.setdefault(r.prompt.token_ids.tobytes(), len(numbers)) for r in requests])
        _, first = np.unique(prompt_of, return_index=True)
        batch = RunningBatch(self.model.hf, self.config.max_new_tokens)
        logits = batch.read(**self._left_padded([requests[int(i)] for i in first]))[prompt_of]
        batch.rearrange(prompt_of)
        going = np.arange(len(requests))  # the request that each row of the batch goes on with
        completions: list[list[int]] = [[] for _ in requests]
        logprobs: list[list[float]] = [[] for _ in requests]
        for position in range(self.config.max_new_tokens):
            rows = [requests[int(i)] for i in going]
            tokens, chosen = sample(logits, rows, position, self.config, self.seed)
            for request, token, logprob in zip(going, tokens.tolist(), chosen.tolist(), strict=True):
                completions[request].append(token)
                logprobs[request].append(logprob)
            kept = closed_up(~np.isin(tokens, self.stop_ids))
            if position + 1 == self.config.max_new_tokens or not len(kept):
                break
            if len(kept) < len(going):
                going, tokens = going[kept], tokens[kept]
                batch.rearrange(kept)
            logits = batch.append(tokens)
        return [
            as_trajectory(request, ids, own, self.version, self.stop_ids, self.tokenizer)
            for request, ids, own in zip(requests, completions, logprobs, strict=True)
        ]

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

    def _left_padded(self, requests: Sequence[SamplingRequest]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` [B, T]; padding stands on the left, for generation continues at the right.

        Raises: DataError when prompt and completion may exceed the model's context.
        """
        check_room(requests, self.config.max_new_tokens, context_length(self.model))
        prompts = [r.prompt.token_ids for r in requests]
        width = max(len(p) for p in prompts)
        input_ids = np.full((len(prompts), width), self.tokenizer.pad_token_id)
        attention_mask = np.zeros((len(prompts), width), dtype=np.int64)
        for i, prompt in enumerate(prompts):
            input_ids[i, width - len(prompt) :] = prompt
            attention_mask[i, width - len(prompt) :] = 1
        arrays = {"input_ids": input_ids, "attention_mask": attention_mask}
        return {name: torch.from_numpy(array).to(distributed.device()) for name, array in arrays.items()}
