"""What every reward function does. One joins by a function in REWARDS that builds it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from llmscale.batch import Trajectory
from llmscale.config import build
from llmscale.models.export import save_hf
from llmscale.protocols import RewardFunction
from llmscale.rewards.config import AnswerConfig, Combine, FunctionConfig, LearnedConfig, Match, ProcessRewardConfig
from tests.tiny import scalar_model, tokenizer, trajectory


def answer(folder: Path) -> RewardFunction:
    return build(AnswerConfig(match=Match.number), tokenizer())


def function(folder: Path) -> RewardFunction:
    (folder / "mine.py").write_text("def reward(prompt, completion, fields):\n    return len(completion)\n")
    return build(FunctionConfig(path=f"{folder}/mine.py:reward"), tokenizer())


def learned(folder: Path) -> RewardFunction:
    model = scalar_model()
    save_hf(model, tokenizer(), folder, [dict(model.named_parameters())])
    return build(LearnedConfig(path=str(folder)), tokenizer())


def ensemble(folder: Path) -> RewardFunction:
    for seed in (0, 1):
        model = scalar_model(seed)
        save_hf(model, tokenizer(), folder / str(seed), [dict(model.named_parameters())])
    members = {"path": f"{folder}/0", "ensemble": [f"{folder}/1"]}
    return build(LearnedConfig(**members, combine=Combine.lower_bound), tokenizer())


def process(folder: Path) -> RewardFunction:
    model = scalar_model()
    model.hf.config.judges = "steps"
    save_hf(model, tokenizer(), folder, [dict(model.named_parameters())])
    return build(ProcessRewardConfig(path=str(folder)), tokenizer())


REWARDS: dict[str, Callable[[Path], RewardFunction]] = {
    "answer": answer,
    "function": function,
    "learned": learned,
    "ensemble": ensemble,
    "process": process,
}


@pytest.fixture(params=REWARDS)
def reward(request: pytest.FixtureRequest, tmp_path: Path) -> RewardFunction:
    return REWARDS[request.param](tmp_path)


@pytest.fixture
def samples() -> list[Trajectory]:
    texts = ["7", "it is 7", "eight", "12", "the long way round to 7"]
    return [
        trajectory([2, 3, *range(4, 5 + i)], [0, 0] + [1] * (i + 1), draw_id=i, completion=text, answer="7")
        for i, text in enumerate(texts)
    ]


def test_one_finite_number_a_sample(reward, samples):
    rewards = reward(samples)
    assert len(rewards) == len(samples)
    assert all(type(x) is float and math.isfinite(x) for x in rewards)
    assert len(set(rewards)) > 1  # these samples differ


def test_a_sample_is_scored_by_itself(reward, samples):
    together = reward(samples)
    assert [reward([s])[0] for s in samples] == pytest.approx(together, abs=1e-5)
    assert reward(samples[::-1])[::-1] == pytest.approx(together, abs=1e-5)


def test_the_same_samples_give_the_same_numbers(reward, samples):
    assert reward(samples) == reward(samples)


def test_no_samples_give_no_numbers(reward):
    assert reward([]) == []
