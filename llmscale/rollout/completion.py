"""What engines share, however they sample: prompts that leave room, the right weights, completions as trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerFast

from llmscale.batch import Trajectory
from llmscale.errors import DataError, WeightMismatchError
from llmscale.protocols import SamplingRequest


def check_room(requests: Sequence[SamplingRequest], max_new_tokens: int, context: int) -> None:
    """Raises: DataError when prompt and completion may exceed the model's context."""
    longest = max(len(r.prompt.token_ids) for r in requests)
    if longest + max_new_tokens > context:
        raise DataError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's context of {context}",
            where="rollout.max_new_tokens",
            fix="Lower it, or shorten the prompt.",
        )


def check_weights(requests: Sequence[SamplingRequest], held: int) -> None:
    """Raises: WeightMismatchError when a request is for newer weights than those held: an update was missed. Older ones it may
    be for: it has waited for its turn while there was an update."""
    for request in requests:
        if request.weights is not None and held < request.weights:
            raise WeightMismatchError(
                f"samples of weights {request.weights} are asked for where {held} are held",
                fix="An update did not get here. Nothing was sampled; the same command resumes.",
            )


def continued(requests: Sequence[SamplingRequest], made: Sequence[Trajectory]) -> list[SamplingRequest] | None:
    """What is still to be asked for where some of it was interrupted; what has ended goes along, so that the unit stays
    whole. None: all has ended."""
    if not any(trajectory.interrupted for trajectory in made):
        return None
    return [replace(request, begun=trajectory) for request, trajectory in zip(requests, made, strict=True)]


def unsampled(requests: Sequence[SamplingRequest], why: str) -> list[Trajectory]:
    """What stands for samples that no worker could make: their prompts, and why nothing follows."""
    return [_without_completion(request, len(request.prompt.token_ids), why) for request in requests]


def _without_completion(request: SamplingRequest, length: int, why: str) -> Trajectory:
    return Trajectory(
        draw_id=request.draw_id,
        sample_index=request.sample_index,
        token_ids=request.prompt.token_ids,
        loss_mask=np.zeros(length, dtype=bool),
        rollout_logprobs=np.zeros(length, dtype=np.float32),
        weight_versions=np.full(length, -1, dtype=np.int32),
        finished=False,
        prompt=request.prompt,
        completion="",
        failure=why,
    )


def check_newer(version: int, held: int) -> None:
    """Raises: WeightMismatchError unless weights of `version` are newer than those held."""
    if version <= held:
        raise WeightMismatchError(f"weights {version} offered where {held} are held already")


@dataclass
class Completion:
    """What was sampled for a request so far, up to and with its stop token."""

    request: SamplingRequest
    token_ids: list[int]
    logprobs: list[float]
    versions: list[int]  # of the weights that produced each token

    @classmethod
    def begun(cls, request: SamplingRequest) -> Completion:
        """As long as what an interrupted call left of it; empty where there was none."""
        before = request.begun
        if before is None:
            return cls(request, [], [], [])
        own = before.loss_mask
        arrays = (before.token_ids, before.rollout_logprobs, before.weight_versions)
        return cls(request, *(array[own].tolist() for array in arrays))

    def add(self, token: int, logprob: float, version: int) -> None:
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        self.versions.append(version)

    @property
    def prefix(self) -> np.ndarray:
        """int64 [T]: what the next token follows."""
        return np.concatenate([self.request.prompt.token_ids, np.array(self.token_ids, dtype=np.int64)])

    def trajectory(
        self, stop_ids: Sequence[int], tokenizer: PreTrainedTokenizerFast, interrupted: bool = False
    ) -> Trajectory:
        prefix, length = self.prefix, len(self.request.prompt.token_ids)
        rollout_logprobs = np.zeros(len(prefix), dtype=np.float32)
        rollout_logprobs[length:] = self.logprobs
        weight_versions = np.full(len(prefix), -1, dtype=np.int32)
        weight_versions[length:] = self.versions
        return Trajectory(
            draw_id=self.request.draw_id,
            sample_index=self.request.sample_index,
            token_ids=prefix,
            loss_mask=np.arange(len(prefix)) >= length,
            rollout_logprobs=rollout_logprobs,
            weight_versions=weight_versions,
            finished=bool(self.token_ids) and self.token_ids[-1] in stop_ids,
            prompt=self.request.prompt,
            completion=str(tokenizer.decode(self.token_ids, skip_special_tokens=True)),
            interrupted=interrupted,
        )
