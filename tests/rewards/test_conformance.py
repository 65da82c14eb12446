"""What every reward function does. Every registered option is here; one that its defaults do not make joins SETTINGS."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from llmscale.batch import Trajectory
from llmscale.compose import choices
from llmscale.config import check, from_dict, options, to_yaml
from llmscale.models.export import save_hf
from llmscale.protocols import RewardFunction
from llmscale.rewards.config import (
    AnswerConfig,
    Combine,
    FunctionConfig,
    GrammarConfig,
    HttpConfig,
    Language,
    LearnedConfig,
    LengthConfig,
    Match,
    ProcessRewardConfig,
    RegexConfig,
    RewardConfig,
    SafetyConfig,
    SumConfig,
    Unit,
    flattened,
)
from llmscale.rewards.weighted import build_reward
from tests.rewards.service import Service
from tests.tiny import scalar_model, tokenizer, trajectory


def function(folder: Path) -> RewardConfig:
    (folder / "mine.py").write_text("def reward(prompt, completion, fields):\n    return len(completion)\n")
    return FunctionConfig(path=f"{folder}/mine.py:reward")


def learned(folder: Path) -> RewardConfig:
    model = scalar_model()
    save_hf(model, tokenizer(), folder, [dict(model.named_parameters())])
    return LearnedConfig(path=str(folder))


def ensemble(folder: Path) -> RewardConfig:
    for seed in (0, 1):
        model = scalar_model(seed)
        save_hf(model, tokenizer(), folder / str(seed), [dict(model.named_parameters())])
    members = {"path": f"{folder}/0", "ensemble": [f"{folder}/1"]}
    return LearnedConfig(**members, combine=Combine.lower_bound)


def process(folder: Path) -> RewardConfig:
    model = scalar_model()
    model.hf.config.judges = "steps"
    save_hf(model, tokenizer(), folder, [dict(model.named_parameters())])
    return ProcessRewardConfig(path=str(folder))


def safety(folder: Path) -> RewardConfig:
    (folder / "words.txt").write_text("eight\n")
    return SafetyConfig(path=f"{folder}/words.txt")


def several(folder: Path) -> RewardConfig:
    parts: dict[str, RewardConfig] = {
        "right": AnswerConfig(match=Match.number),
        "brief": LengthConfig(unit=Unit.words, longest=1, slope=3),
        "helpful": learned(folder),
    }
    return SumConfig(parts=parts, weights={"brief": 0.5})


SETTINGS: dict[str, Callable[[Path], RewardConfig]] = {
    "answer": lambda folder: AnswerConfig(match=Match.number),
    "ensemble": ensemble,
    "function": function,
    "grammar": lambda folder: GrammarConfig(language=Language.json),
    "http": lambda folder: HttpConfig(url="", batch_size=2),  # the address is the fixture's
    "learned": learned,
    "length": lambda folder: LengthConfig(longest=2, slope=2),
    "process": process,
    "regex": lambda folder: RegexConfig(pattern=r"\d"),
    "safety": safety,
    "sum": several,
}
COLUMNS = {"formula": "p & q", "tests": "assert seven() == 7"}  # of the records, where "7" will not do
TEXTS = [
    *(
        "7",
        "it is 7",
        "eight",
        "12",
        "the long way round to 7",
        "p & q",
        "q and p",
        "1. One.\n3. Three.",
        "1. One.\n2. Two.",
        "def seven():\n    return 7",
    ),
    *("<think>7 is 7</think><answer>7</answer>", "<think>7</think>"),
]
NASTY = [
    *("", " \n", "\x00", "\ud800", "a" * 5000, "9" * 5000, "(" * 3000, "[" * 100_000, "{" * 3000, "-" * 5000 + "1"),
    *("\\boxed{" * 2000, "\\boxed{" * 300 + "}" * 300, "<think>" * 1000, "1. " * 2000, "(i) x\n" * 100, "not " * 3000),
    *("p -> " * 3000 + "p", "a.b" * 3000, "1/0", "1e999", "٣", "```\n" * 100, "lambda: " * 3000 + "0", "​́", "x = '''"),
    *("p" + "&p" * 5000, "1" + " " * 50_000 + "2", "a" * 40 + "!"),
]  # fmt: skip


@dataclass
class Holder:
    reward: RewardConfig


@pytest.fixture(params=sorted([*options("reward"), "ensemble"]))
def config(request: pytest.FixtureRequest, tmp_path: Path, service: Service) -> RewardConfig:
    setting = SETTINGS.get(request.param)
    made = setting(tmp_path) if setting is not None else options("reward")[request.param].config()
    if isinstance(made, HttpConfig):
        made.url = service.url
    check(made)
    return made


@pytest.fixture
def reward(config: RewardConfig) -> RewardFunction:
    return build_reward(config, tokenizer(), "reward")


def samples_of(texts: list[str], config: RewardConfig) -> list[Trajectory]:
    columns = [column for _, part in flattened(config, "reward") for column in part.needs_columns()]
    fields = {column: COLUMNS.get(column, "7") for column in columns}
    made = [
        trajectory([2, 3, *range(4, 5 + i)], [0, 0] + [1] * (i + 1), draw_id=i, completion=text, **fields)
        for i, text in enumerate(texts)
    ]
    return [replace(t, turn_rewards=t.loss_mask.astype(np.float32) / 2) for t in made]


@pytest.fixture
def samples(config: RewardConfig) -> list[Trajectory]:
    return samples_of(TEXTS, config)


def values(reward: RewardFunction, samples: list[Trajectory]) -> list[float]:
    scores = reward(samples)
    assert all(type(s.value) is float for s in scores)
    return [s.value for s in scores if s.value is not None]


def test_one_finite_number_a_sample(reward, samples):
    numbers = values(reward, samples)
    assert len(numbers) == len(samples)
    assert all(math.isfinite(x) for x in numbers)
    assert len(set(numbers)) > 1  # these samples differ


def test_a_sample_is_scored_by_itself(reward, samples):
    together = values(reward, samples)
    assert [values(reward, [s])[0] for s in samples] == pytest.approx(together, abs=1e-5)
    assert values(reward, samples[::-1])[::-1] == pytest.approx(together, abs=1e-5)


def test_the_same_samples_give_the_same_scores(reward, samples):
    assert reward(samples) == reward(samples)


def test_no_samples_give_no_scores(reward):
    assert reward([]) == []


def test_parts_are_numbers_and_scores_travel_between_processes(reward, samples):
    for score in reward(samples):
        assert all(isinstance(name, str) and type(value) is float for name, value in score.parts.items())
        assert isinstance(score.why, str) and pickle.loads(pickle.dumps(score)) == score


def test_no_completion_stops_it(config, reward):
    """Each is scored, or left out with a reason; nothing that a policy can write ends a run or takes seconds."""
    scores = reward(samples_of(NASTY, config))
    assert len(scores) == len(NASTY)
    assert all(math.isfinite(s.value) if s.value is not None else s.why for s in scores)


def test_its_config_survives_freezing(config):
    frozen = yaml.safe_load(to_yaml(Holder(config)))
    assert from_dict(Holder, frozen) == Holder(config)


def test_every_option_has_its_yaml():
    assert set(choices("reward")) >= set(options("reward"))
