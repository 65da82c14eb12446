"""Rewards from a process reward model: the model's own probabilities at the ends of steps, and their one number."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from llmscale.batch import Trajectory
from llmscale.errors import ModelError
from llmscale.models.export import save_hf
from llmscale.models.loading import ScalarModel
from llmscale.rewards.config import Aggregation, ProcessRewardConfig
from llmscale.rewards.learned import BATCH_SIZE
from llmscale.rewards.process import ProcessReward, aggregated
from tests.tiny import scalar_model, tokenizer, trajectory

COMPLETIONS = ["a", "a\nb", "a\nb\n", "\n\na", "abc\nabc\nabc\nabc", "\n", ""]


@pytest.fixture(scope="module")
def model() -> ScalarModel:
    made = scalar_model(vocab_size=len(tokenizer()))
    made.hf.config.judges = "steps"
    return made


@pytest.fixture(scope="module")
def folder(model: ScalarModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("process")
    save_hf(model, tokenizer(), path, [dict(model.named_parameters())])
    return str(path)


def sample(text: str, draw_id: int = 0, ending: str = "") -> Trajectory:
    prompt, own = (tokenizer()(t, add_special_tokens=False)["input_ids"] for t in ("one\ntwo", text + ending))
    return trajectory([*prompt, *own], [0] * len(prompt) + [1] * len(own), draw_id=draw_id, completion=text)


@pytest.fixture(scope="module")
def samples() -> list[Trajectory]:
    """More than one forward's worth."""
    return [sample(COMPLETIONS[i % 6] + "x" * (i // 6), i) for i in range(BATCH_SIZE + 7)]


def reward(folder: str, aggregation: Aggregation = Aggregation.product) -> ProcessReward:
    return ProcessReward(ProcessRewardConfig(path=folder, aggregation=aggregation), tokenizer())


def expected(model: ScalarModel, sample: Trajectory) -> list[float]:
    """The probability at the last token of each line of the completion that is not blank."""
    ids = torch.from_numpy(sample.token_ids)[None]
    with torch.no_grad():
        logits = model(ids, torch.arange(ids.shape[1])[None])[0].tolist()
    start, found, line = int(np.argmax(sample.loss_mask)), [], ""
    for position in range(start, len(sample.token_ids)):
        character = tokenizer().decode([sample.token_ids[position]])  # bytes: a character a token
        is_last = position == len(sample.token_ids) - 1
        if (character == "\n" and line.strip()) or (is_last and (line + character).strip()):
            found.append(1 / (1 + math.exp(-logits[position])))
            line = ""
        else:
            line += character
    return found


def test_the_probability_of_each_step_is_the_models_own(model, folder, samples):
    got = reward(folder).by_step(samples)
    assert [len(steps) for steps in got[:6]] == [1, 2, 2, 1, 4, 0]
    for steps, one in zip(got, samples, strict=True):
        assert steps.tolist() == pytest.approx(expected(model, one), abs=1e-5)
    assert np.std(np.concatenate(got)) > 0.02  # else this could not fail


@pytest.mark.parametrize("aggregation", Aggregation)
def test_steps_become_one_number(model, folder, samples, aggregation):
    for got, one in zip(reward(folder, aggregation)(samples), samples, strict=True):
        steps = expected(model, one)
        known = {"product": math.prod(steps), "minimum": min(steps, default=0), "last": [0.0, *steps][-1]}
        assert got == pytest.approx(known[aggregation.name] if steps else 0.0, abs=1e-5)


def test_nothing_written_has_nothing_right():
    assert [aggregated(np.array([]), how) for how in Aggregation] == [0.0, 0.0, 0.0]


def test_prompt_lines_are_no_steps(folder):
    assert len(reward(folder).by_step([sample("a")])[0]) == 1  # the prompt has two lines


def test_the_end_of_the_turn_belongs_to_the_last_step(folder, model):
    ended = sample("a\nb", ending=tokenizer().eos_token)
    (steps,) = reward(folder).by_step([ended])
    ids = torch.from_numpy(ended.token_ids)[None]
    with torch.no_grad():
        last = model(ids, torch.arange(ids.shape[1])[None])[0, -1].sigmoid().item()
    assert len(steps) == 2 and steps[-1] == pytest.approx(last, abs=1e-5)


def test_a_judge_of_completions_is_refused(tmp_path: Path):
    model = scalar_model()
    save_hf(model, tokenizer(), tmp_path, [dict(model.named_parameters())])
    with pytest.raises(ModelError, match="judges completions, not steps") as caught:
        reward(str(tmp_path))
    assert caught.value.where == "reward.path" and "objective=process" in str(caught.value)
