"""What engines share, however they sample: prompts that leave room, the right weights, completions as trajectories."""

from __future__ import annotations

from collections.abc import Sequence

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


def check_newer(version: int, held: int) -> None:
    """Raises: WeightMismatchError unless weights of `version` are newer than those held."""
    if version <= held:
        raise WeightMismatchError(f"weights {version} offered where {held} are held already")


def as_trajectory(
    request: SamplingRequest,
    completion: list[int],
    logprobs: list[float],
    version: int,
    stop_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerFast,
) -> Trajectory:
    """`completion` is as it was sampled, up to and with its stop token or cut off; `logprobs` are of its tokens."""
    prompt = request.prompt.token_ids
    produced = np.arange(len(prompt) + len(completion)) >= len(prompt)
    rollout_logprobs = np.zeros(len(produced), dtype=np.float32)
    rollout_logprobs[produced] = logprobs
    return Trajectory(
        draw_id=request.draw_id,
        sample_index=request.sample_index,
        token_ids=np.concatenate([prompt, np.array(completion, dtype=np.int64)]),
        loss_mask=produced,
        rollout_logprobs=rollout_logprobs,
        weight_versions=np.where(produced, version, -1).astype(np.int32),
        finished=completion[-1] in stop_ids,
        prompt=request.prompt,
        completion=str(tokenizer.decode(completion, skip_special_tokens=True)),
    )
