"""Beam search that returns the n best completions of a prompt, by transformers' `generate`.

A completion's score is log p(completion) / tokens ** length_penalty, where Wu et al. 2016 (arXiv:1609.08144, eq. 14) divide by
((5 + tokens) / 6) ** length_penalty: a penalty of 1 is the mean of a token here. transformers keeps scores alone, not what each
token contributed, so the log-probabilities come from a plain forward over what was found, which also orders it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from llmscale import distributed
from llmscale.batch import Batch, Trajectory, pad_rows, token_tensors
from llmscale.models.forward import ModelForward
from llmscale.models.loading import LanguageModel, context_length
from llmscale.protocols import SamplingRequest
from llmscale.rollout.completion import Completion, check_room
from llmscale.rollout.config import HFRolloutConfig
from llmscale.rollout.hf import HFRollout


class BeamSearch(HFRollout):
    """Deterministic: `generate` takes each prompt once and gives up to `num_best` distinct completions of it, best first,
    numbered from the request's own sample index on. Fewer only where there are no more."""

    def __init__(
        self,
        config: HFRolloutConfig,
        model: LanguageModel,
        tokenizer: PreTrainedTokenizerFast,
        seed: int,
        stop_ids: Sequence[int],
        *,
        num_best: int,
        num_beams: int,
        length_penalty: float,
    ):
        super().__init__(config, model, tokenizer, seed, stop_ids)
        self.num_best, self.length_penalty = num_best, length_penalty
        self._generation = GenerationConfig(
            max_new_tokens=config.max_new_tokens,
            num_beams=num_beams,
            num_return_sequences=num_beams,
            length_penalty=length_penalty,
            early_stopping="never",  # the default stops by a heuristic that misses better completions
            eos_token_id=self.stop_ids,
            pad_token_id=tokenizer.pad_token_id,
            use_cache=True,
        )
        self.model.hf.generation_config = self._generation

    @torch.no_grad()
    def generate(self, requests: Sequence[SamplingRequest]) -> list[Trajectory]:
        check_room(requests, self.config.max_new_tokens, context_length(self.model))
        prompts = self._left_padded([r.prompt.token_ids for r in requests])
        output = self.model.hf.generate(**prompts, generation_config=self._generation)
        completions = output[:, prompts["input_ids"].shape[1] :].cpu().numpy()
        beams = completions.reshape(len(requests), -1, completions.shape[-1])
        # A beam wider than what there is to find holds some of it twice.
        found = [
            list({t.token_ids.tobytes(): t for t in (self._ended(r, row) for row in rows)}.values())
            for r, rows in zip(requests, beams, strict=True)
        ]
        scored = iter(self._with_logprobs([t for group in found for t in group]))
        return [best for group in found for best in self._best([next(scored) for _ in group])]

    def _ended(self, request: SamplingRequest, row: np.ndarray) -> Trajectory:
        """int64 [T], padded -> the completion up to its first stop token, without log-probabilities."""
        ends = np.flatnonzero(np.isin(row, self.stop_ids))
        ids = row[: ends[0] + 1].tolist() if len(ends) else row.tolist()
        return Completion(request, ids, [0.0] * len(ids), [self.version] * len(ids)).trajectory(
            self.stop_ids, self.tokenizer
        )

    def score(self, trajectory: Trajectory) -> float:
        logprob = float(trajectory.rollout_logprobs.sum(dtype=np.float64))
        return logprob / trajectory.completion_len**self.length_penalty

    def _best(self, group: Sequence[Trajectory]) -> list[Trajectory]:
        first = group[0].sample_index
        ordered = sorted(group, key=self.score, reverse=True)[: self.num_best]
        return [replace(t, sample_index=first + place) for place, t in enumerate(ordered)]

    def _with_logprobs(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        mask = pad_rows([t.loss_mask for t in trajectories], value=False).bool()
        batch = Batch(token_tensors([t.token_ids for t in trajectories]) | {"mask": mask}).to(distributed.device())
        logprobs, _ = ModelForward(self.model).logprobs(batch, batch["mask"])
        return [
            replace(t, rollout_logprobs=row[: len(t.token_ids)].float().cpu().numpy())
            for t, row in zip(trajectories, logprobs, strict=True)
        ]
