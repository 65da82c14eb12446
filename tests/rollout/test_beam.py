"""Beam search against a full enumeration on a small vocabulary, and against a plain forward."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from llmscale.batch import Trajectory, token_tensors
from llmscale.errors import DataError
from llmscale.functional import token_logprobs
from llmscale.models.loading import LanguageModel
from llmscale.protocols import SamplingRequest
from llmscale.rollout.beam import BeamSearch
from llmscale.rollout.config import HFRolloutConfig
from tests.tiny import language_model, prompt, tokenizer

VOCAB, LENGTH, STOP = 5, 3, 2
EVERYTHING = 85  # completions of up to three tokens of five, one of which ends them: 1 + 4 + 16 * 5


def search(model: LanguageModel, *, max_new_tokens: int = LENGTH, stop: Sequence[int] = (STOP,), **settings: Any):
    settings = {"num_best": 4, "num_beams": 4, "length_penalty": 0.0} | settings
    return BeamSearch(HFRolloutConfig(max_new_tokens=max_new_tokens), model, tokenizer(), 0, stop, **settings)


def requests(*prompts: Sequence[int]) -> list[SamplingRequest]:
    return [SamplingRequest(prompt(p), draw, 0) for draw, p in enumerate(prompts)]


def own_tokens(trajectory: Trajectory) -> tuple[int, ...]:
    return tuple(trajectory.token_ids[trajectory.loss_mask].tolist())


def enumerated(model: LanguageModel, start: Sequence[int], stop: Sequence[int], penalty: float) -> dict[tuple, float]:
    """Every completion with its score, from plain forwards."""
    complete = set()
    for tokens in itertools.product(range(VOCAB), repeat=LENGTH):
        end = next((i for i, token in enumerate(tokens) if token in stop), LENGTH - 1)
        complete.add(tokens[: end + 1])
    scores = {}
    for tokens in complete:
        ids = torch.tensor([[*start, *tokens]])
        with torch.no_grad():
            logprobs = token_logprobs(model(ids, torch.arange(ids.shape[1])[None]), ids)
        scores[tokens] = float(logprobs[0, len(start) :].double().sum()) / len(tokens) ** penalty
    return scores


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("stop", [(STOP,), (STOP, 4)])
def test_a_beam_as_wide_as_the_space_finds_everything_in_order(penalty: float, stop: tuple[int, ...]):
    model = language_model(vocab_size=VOCAB)
    starts = [[1, 3], [0, 4, 1, 1, 3]]
    engine = search(model, num_beams=EVERYTHING, num_best=EVERYTHING, length_penalty=penalty, stop=stop)
    made = engine.generate(requests(*starts))
    for draw, start in enumerate(starts):
        expected = enumerated(model, start, stop, penalty)
        found = [t for t in made if t.draw_id == draw]
        assert [own_tokens(t) for t in found] == sorted(expected, key=lambda tokens: -expected[tokens])
        for t in found:
            assert engine.score(t) == pytest.approx(expected[own_tokens(t)], abs=1e-5)
        assert [t.sample_index for t in found] == list(range(len(expected)))
        assert all(t.finished == (own_tokens(t)[-1] in stop) for t in found)


def test_a_narrow_beam_equals_the_textbook_loop():
    """Ten lines: keep the best `num_beams` prefixes, put aside those that end."""
    model = language_model(vocab_size=VOCAB, seed=3)
    width, start = 3, (1, 3)

    def logprob(tokens: tuple[int, ...]) -> float:
        ids = torch.tensor([[*start, *tokens]])
        with torch.no_grad():
            scores = token_logprobs(model(ids, torch.arange(ids.shape[1])[None]), ids)
        return float(scores[0, len(start) :].double().sum())

    running: list[tuple[int, ...]] = [()]
    done: list[tuple[int, ...]] = []
    for length in range(1, 7):
        candidates = sorted(((*p, v) for p in running for v in range(VOCAB)), key=logprob, reverse=True)
        done += [c for c in candidates[:width] if c[-1] == STOP or length == 6]
        running = [c for c in candidates if c[-1] != STOP][:width]
    expected = sorted(done, key=logprob, reverse=True)[:width]
    made = search(model, num_beams=width, num_best=width, max_new_tokens=6).generate(requests(start))
    assert [own_tokens(t) for t in made] == expected


def test_log_probabilities_are_those_of_a_plain_forward():
    model = language_model()
    made = search(model, max_new_tokens=12, stop=[5]).generate(requests([7], [7, 8, 9], [20, 21, 22, 23]))
    batch = token_tensors([t.token_ids for t in made])
    with torch.no_grad():
        plain = token_logprobs(model(batch["input_ids"], batch["position_ids"]), batch["input_ids"]).numpy()
    for row, t in zip(plain, made, strict=True):
        assert np.abs(row[: len(t.token_ids)] - t.rollout_logprobs)[t.loss_mask].max() < 1e-5
        assert not t.rollout_logprobs[~t.loss_mask].any()


def test_completions_are_distinct_and_sorted_whatever_else_is_in_the_batch():
    engine = search(language_model(), max_new_tokens=10, num_beams=8, num_best=5, length_penalty=1.0)
    asked = requests([7], [7, 8, 9], [20, 21, 22, 23])
    together = engine.generate(asked)
    assert [t.draw_id for t in together] == [0] * 5 + [1] * 5 + [2] * 5
    assert len({t.token_ids.tobytes() for t in together}) == 15
    for draw in range(3):
        scores = [engine.score(t) for t in together if t.draw_id == draw]
        assert scores == sorted(scores, reverse=True)
    alone = [t for request in asked for t in engine.generate([request])]
    assert [own_tokens(t) for t in alone] == [own_tokens(t) for t in together]


def test_the_best_is_no_worse_than_greedy():
    model = language_model(seed=2)
    (best,) = search(model, max_new_tokens=8, num_beams=6, num_best=1, stop=[63]).generate(requests([7, 8, 9]))
    (greedy,) = search(model, max_new_tokens=8, num_beams=1, num_best=1, stop=[63]).generate(requests([7, 8, 9]))
    assert best.rollout_logprobs.sum() >= greedy.rollout_logprobs.sum()


def test_a_prompt_that_leaves_no_room_is_refused():
    with pytest.raises(DataError, match="exceed the model's context of 16"):
        search(language_model(max_position=16), max_new_tokens=10).generate(requests([1] * 7))
