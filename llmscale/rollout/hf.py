"""Rollouts by transformers' `generate`: runs everywhere, and is the reference for other engines."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerFast

from llmscale import distributed
from llmscale.batch import Trajectory
from llmscale.errors import DataError, WeightMismatchError
from llmscale.models.loading import LanguageModel, context_length
from llmscale.models.weights import load_buckets
from llmscale.protocols import SamplingRequest, WeightBucket
from llmscale.rollout.config import HFRolloutConfig
from llmscale.rollout.sampling import CounterSampler


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
        self._generation = GenerationConfig(
            max_new_tokens=config.max_new_tokens,
            do_sample=False,
            eos_token_id=self.stop_ids,
            pad_token_id=tokenizer.pad_token_id,
            use_cache=True,  # said here, because a saved config may say otherwise and cost 25 times the time
        )
        # What is not said here would come from the model's own: a repetition penalty, beams, truncation.
        self.model.hf.generation_config = self._generation

    @torch.no_grad()
    def generate(self, requests: Sequence[SamplingRequest]) -> list[Trajectory]:
        prompts = self._left_padded(requests)
        width = prompts["input_ids"].shape[1]
        sampler = CounterSampler(requests, width, self.config.temperature, self.seed)
        output = self.model.hf.generate(
            **prompts, generation_config=self._generation, logits_processor=LogitsProcessorList([sampler])
        )
        completions = output[:, width:].cpu().numpy()
        logprobs = torch.stack(sampler.logprobs, dim=1).numpy()
        return [self._trajectory(*row) for row in zip(requests, completions, logprobs, strict=True)]

    def load_weights(self, version: int, buckets: Sequence[WeightBucket]) -> None:
        if version <= self.version:
            raise WeightMismatchError(f"weights {version} offered where {self.version} are held already")
        load_buckets(self.model, list(buckets), source=f"weights {version}")
        self.version = version

    def _left_padded(self, requests: Sequence[SamplingRequest]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` [B, T]; padding stands on the left, for generation continues at the right.

        Raises: DataError when prompt and completion may exceed the model's context.
        """
        prompts = [r.prompt.token_ids for r in requests]
        width = max(len(p) for p in prompts)
        if width + self.config.max_new_tokens > context_length(self.model):
            raise DataError(
                f"a prompt of {width} tokens and {self.config.max_new_tokens} new ones exceed the model's context of "
                f"{context_length(self.model)}",
                where="rollout.max_new_tokens",
                fix="Lower it, or shorten the prompt.",
            )
        input_ids = np.full((len(prompts), width), self.tokenizer.pad_token_id)
        attention_mask = np.zeros((len(prompts), width), dtype=np.int64)
        for i, prompt in enumerate(prompts):
            input_ids[i, width - len(prompt) :] = prompt
            attention_mask[i, width - len(prompt) :] = 1
        arrays = {"input_ids": input_ids, "attention_mask": attention_mask}
        return {name: torch.from_numpy(array).to(distributed.device()) for name, array in arrays.items()}

    def _trajectory(self, request: SamplingRequest, completion: np.ndarray, logprobs: np.ndarray) -> Trajectory:
        ends = np.flatnonzero(np.isin(completion, self.stop_ids))
        length = int(ends[0]) + 1 if len(ends) else len(completion)
        prompt = request.prompt.token_ids
        produced = np.arange(len(prompt) + length) >= len(prompt)
        rollout_logprobs = np.zeros(len(produced), dtype=np.float32)
        rollout_logprobs[produced] = logprobs[:length]
        return Trajectory(
            draw_id=request.draw_id,
            sample_index=request.sample_index,
            token_ids=np.concatenate([prompt, completion[:length]]).astype(np.int64),
            loss_mask=produced,
            rollout_logprobs=rollout_logprobs,
            weight_versions=np.where(produced, self.version, -1).astype(np.int32),
            finished=len(ends) > 0,
            prompt=request.prompt,
            completion=str(self.tokenizer.decode(completion[:length], skip_special_tokens=True)),
        )
