"""Sampling whose randomness is a counter, not a stream: what is sampled for (run seed, draw, sample, turn, position)
does not depend on which worker or attempt samples it, nor on what else is in the batch. Legend: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from llmscale.protocols import SamplingRequest
from llmscale.randomness import random_words


def gumbel_noise(seed: int, draw_id: int, sample_index: int, turn: int, position: int, size: int) -> np.ndarray:
    """Standard Gumbel noise [size], float64: argmax(log p + noise) is a sample of p (Maddison et al. 2014)."""
    # Held-out prompts are drawn with negative ids.
    raw = random_words(seed, "sampling", turn << 32 | position, sample_index, draw_id, size=size)
    uniform = (raw >> np.uint64(11)) * 2.0**-53
    with np.errstate(divide="ignore"):  # a uniform of exactly 0 gives noise -inf: never chosen
        return -np.log(-np.log(uniform))


class CounterSampler(LogitsProcessor):
    """Chooses each row's token, and keeps its log-probability, so that no logits need to be kept.

    Greedy decoding over the result takes the chosen token. `temperature` 0 chooses the likeliest.
    """

    def __init__(self, requests: Sequence[SamplingRequest], prompt_len: int, temperature: float, seed: int):
        self.requests, self.prompt_len, self.temperature, self.seed = requests, prompt_len, temperature, seed
        self.logprobs: list[Tensor] = []  # one [B] a position

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = input_ids.shape[1] - self.prompt_len
        logprobs = torch.log_softmax(scores.float() / (self.temperature or 1.0), dim=-1)
        noisy = logprobs.double()
        if self.temperature > 0:
            noise = [
                gumbel_noise(self.seed, r.draw_id, r.sample_index, r.turn, position, scores.shape[-1])
                for r in self.requests
            ]
            noisy = noisy + torch.from_numpy(np.stack(noise)).to(noisy.device)
        chosen = noisy.argmax(-1, keepdim=True)
        self.logprobs.append(logprobs.gather(-1, chosen).squeeze(-1).cpu())
        return torch.full_like(scores, float("-inf")).scatter(-1, chosen, 0.0)
