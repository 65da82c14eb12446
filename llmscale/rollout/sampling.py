"""Sampling whose randomness is a counter, not a stream: what is sampled for (run seed, draw, sample, turn, position)
does not depend on which worker or attempt samples it, nor on what else is in the batch. Legend: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from llmscale.protocols import SamplingRequest
from llmscale.randomness import random_words
from llmscale.rollout.config import RolloutConfig


def gumbel_noise(seed: int, draw_id: int, sample_index: int, turn: int, position: int, size: int) -> np.ndarray:
    """Standard Gumbel noise [size], float64: argmax(log p + noise) is a sample of p (Maddison et al. 2014).

    One number for every token, where a single one and the sums of p would do: those sums carry the rounding of all
    tokens before, so that a batch of other rows would change thousands of times as many samples.
    """
    # Held-out prompts are drawn with negative ids.
    raw = random_words(seed, "sampling", turn << 32 | position, sample_index, draw_id, size=size)
    raw >>= np.uint64(11)
    noise = raw.view(np.int64) * 2.0**-53
    with np.errstate(divide="ignore"):  # a uniform of exactly 0 gives noise -inf: never chosen
        for _ in range(2):
            np.log(noise, out=noise)
            np.negative(noise, out=noise)
    return noise


def sample(
    logits: Tensor, requests: Sequence[SamplingRequest], positions: Sequence[int], config: RolloutConfig, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The next token of each row, int64 [B], and its log-probability in what it was sampled from, float32 [B]. `logits`:
    [B, V], of the token at each row's position in its completion. `temperature` 0 chooses the likeliest."""
    logits = truncated(logits.float() / (config.temperature or 1.0), config)
    logprobs = torch.log_softmax(logits, dim=-1).cpu().numpy()
    if config.temperature == 0:
        chosen = logprobs.argmax(-1)
    else:
        chosen = np.empty(len(requests), dtype=np.int64)
        # By rows: the noise of one stays in the processor's cache.
        for row, (r, position) in enumerate(zip(requests, positions, strict=True)):
            noise = gumbel_noise(seed, r.draw_id, r.sample_index, r.turn, position, logprobs.shape[1])
            noise += logprobs[row]
            chosen[row] = noise.argmax()
    return chosen, logprobs[np.arange(len(chosen)), chosen]


def truncated(logits: Tensor, config: RolloutConfig) -> Tensor:
    """[B, V] with -inf where `top_k` or `top_p` leaves a token out; `top_p` counts what `top_k` left."""
    unused: Any = None  # the ids so far
    if config.top_k is not None:
        logits = TopKLogitsWarper(config.top_k)(unused, logits)
    if config.top_p < 1:
        logits = TopPLogitsWarper(config.top_p)(unused, logits)
    return logits
