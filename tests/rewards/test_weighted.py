"""Sums of rewards: their arithmetic, their parts, and a part that has no score."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import llmscale.stages  # noqa: F401  registers every stage
from llmscale.compose import compose
from llmscale.config import check, load, to_yaml
from llmscale.errors import ConfigError
from llmscale.rewards.config import (
    AnswerConfig,
    FunctionConfig,
    LengthConfig,
    Match,
    OnError,
    RegexConfig,
    RewardConfig,
    SafetyConfig,
    SumConfig,
    Unit,
    flattened,
)
from llmscale.rewards.weighted import build_reward
from tests.tiny import tokenizer, trajectory

NEEDED = ["data.train=x", "model.path=m", "reward=sum"]


def samples(*completions: str):
    return [trajectory([1, 2], [0, 1], draw_id=i, completion=c, answer="7") for i, c in enumerate(completions)]


def test_like_the_loop():
    rng = random.Random(0)
    parts: dict[str, RewardConfig] = {
        "right": AnswerConfig(match=Match.number),
        "brief": LengthConfig(unit=Unit.characters, longest=3, slope=20),
        "shape": RegexConfig(pattern="^so"),
    }
    trajectories = samples("7", "so it is 7", "so 8", "a very long way to say 7")
    for _ in range(20):
        weights = {name: rng.uniform(-2, 2) for name in rng.sample(list(parts), rng.randint(0, 3))}
        expected = [0.0] * len(trajectories)
        for name, part in parts.items():
            for i, score in enumerate(build_reward(part, tokenizer(), "reward")(trajectories)):
                expected[i] += weights.get(name, 1.0) * (score.value or 0.0)
        found = build_reward(SumConfig(parts=parts, weights=weights), tokenizer(), "reward")(trajectories)
        assert [s.value for s in found] == pytest.approx(expected, abs=1e-9)
        assert all(list(s.parts) == list(parts) for s in found)
        assert [s.parts["right"] for s in found] == [1.0, 1.0, 0.0, 1.0]


def half_fails(folder: Path) -> FunctionConfig:
    source = "def reward(p, c, f):\n    if len(c) == 1:\n        raise ValueError('one letter')\n    return 5\n"
    (folder / "mine.py").write_text(source)
    return FunctionConfig(path=f"{folder}/mine.py:reward", on_error=OnError.exclude)


def test_without_one_part_there_is_no_sum(tmp_path: Path):
    config = SumConfig(parts={"mine": half_fails(tmp_path), "right": AnswerConfig()})
    bad, good = build_reward(config, tokenizer(), "reward")(samples("7", "77"))
    assert bad.value is None and bad.why.startswith("mine: ") and "one letter" in bad.why
    assert bad.parts == {"right": 1.0}
    assert (good.value, good.parts) == (5.0, {"mine": 5.0, "right": 0.0})


def test_a_part_of_weight_0_is_only_watched(tmp_path: Path):
    config = SumConfig(parts={"mine": half_fails(tmp_path), "right": AnswerConfig()}, weights={"mine": 0.0})
    bad, good = build_reward(config, tokenizer(), "reward")(samples("7", "77"))
    assert (bad.value, bad.parts) == (1.0, {"right": 1.0})
    assert (good.value, good.parts) == (0.0, {"mine": 5.0, "right": 0.0})


def test_an_error_names_the_part(tmp_path: Path):
    config = SumConfig(parts={"clean": SafetyConfig(path=f"{tmp_path}/gone.txt")})
    for where in ("reward", "true_reward"):
        with pytest.raises(Exception, match=r"gone\.txt") as caught:
            build_reward(config, tokenizer(), where)
        assert getattr(caught.value, "where", None) == f"{where}.parts.clean.path"


# ---------------------------------------------------------------- from the command line and back


def test_parts_come_from_the_command_line(tmp_path: Path):
    config = compose(
        "rlhf",
        [
            *(*NEEDED, "reward.parts.right=answer", "reward.parts.right.match=number", "reward.parts.shape=regex"),
            *(r"reward.parts.shape.pattern=a,b=(\d+)", "reward.weights.shape=0.5"),
            *("true_reward=sum", "true_reward.parts.api_key=length"),
        ],
    )
    parts = {"right": AnswerConfig(match=Match.number), "shape": RegexConfig(pattern=r"a,b=(\d+)")}
    assert config.reward == SumConfig(parts=parts, weights={"shape": 0.5})
    assert config.true_reward == SumConfig(parts={"api_key": LengthConfig()})
    frozen = tmp_path / "config.yaml"
    frozen.write_text(to_yaml(config))
    assert load(frozen) == config
    assert [where for where, _ in flattened(config.reward, "reward")] == ["reward.parts.right", "reward.parts.shape"]


def test_the_critic_starts_from_the_learned_part():
    learned = ["reward.parts.brief=length", "reward.parts.good=learned", "reward.parts.good.path=r"]
    assert compose("rlhf", [*NEEDED, *learned]).critic_path == "r"
    assert compose("rlhf", [*NEEDED, *learned, "critic.path=c"]).critic_path == "c"
    assert compose("rlhf", [*NEEDED, "reward.parts.brief=length"]).critic_path == "m"


def own(folder: Path, text: str) -> str:
    file = folder / "experiment" / "mine" / "rlhf.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("# @package _global_\n" + text)
    return str(folder)


def test_parts_come_from_yaml_and_can_be_chosen_anew(tmp_path: Path):
    folder = own(
        tmp_path,
        "defaults:\n  - /reward@reward.parts.brief: length\n  - /reward@reward.parts.right: answer\n  - override /reward: sum\n"
        "reward:\n  parts:\n    brief: {longest: 9}\n  weights: {brief: 0.25}\n",
    )
    config = compose("rlhf", ["data.train=x", "model.path=m", "experiment=mine"], folder)
    assert config.reward == SumConfig(
        parts={"brief": LengthConfig(longest=9), "right": AnswerConfig()}, weights={"brief": 0.25}
    )
    again = compose(
        "rlhf", [*NEEDED[:2], "experiment=mine", "reward.parts.right=regex", "reward.parts.right.pattern=x"], folder
    )
    assert again.reward.parts["right"] == RegexConfig(pattern="x")
    other = compose(
        "rlhf", [*NEEDED[:2], "experiment=mine", "reward.parts.brief.longest=3", "reward.weights.brief=0"], folder
    )
    assert other.reward.parts["brief"].longest == 3 and other.reward.weights == {"brief": 0.0}


@pytest.mark.parametrize(
    ("overrides", "where", "hint"),
    [
        ([], "reward.parts", "reward.parts.brief=length"),
        (["reward.parts.b=lenght"], "reward", "Did you mean length?"),
        (
            ["reward.parts.b=length", "reward.parts.b.longets=3"],
            "reward.parts.b.longets",
            "Did you mean reward.parts.b.longest?",
        ),
        (["reward.parts.b=length", "reward.parts.b.longest=x"], "reward.parts.b.longest", "a whole number"),
        (["reward.parts.b=length", "reward.parts.b.longest=0"], "reward.parts.b.longest", "below shortest"),
        (["reward.parts.b=length", "reward.parts.b.pattern=x"], "reward.parts.b.pattern", "reward.parts.b=regex"),
        (["reward.parts.b=regex"], "reward.parts.b.pattern", "Add reward.parts.b.pattern="),
        (["reward.parts.b.longest=3"], "reward.parts.b", "reward.parts.b=NAME"),
        (["reward.parts.b=length", "reward.parts.b=null"], "reward.parts.b", "reward.weights.b=0"),
        (["reward.parts.b=length", "reward.weights.c=1"], "reward.weights.c", "There is: b."),
        (["reward.parts.b=length", "reward.weights.b=0"], "reward.weights", "another weight"),
        (["reward.parts.b=length", "reward.weights.b=nan"], "reward.weights.b", "in digits"),
        (["reward.parts.b=length", "reward.weights.b=x"], "reward.weights.b", "a number"),
        (["reward.parts.mean=length"], "reward.parts.mean", "excluded"),
        (["reward.parts.n=sum", "reward.parts.b=length"], "reward.parts.n", "nothing to add up"),
        (["reward.parts=3"], "reward.parts", "a mapping"),
        (["reward=length", "reward.parts.b=length"], "reward.parts", "reward=sum"),
    ],
)
def test_a_mistake_is_refused_with_its_path(overrides: list[str], where: str, hint: str):
    with pytest.raises(ConfigError) as caught:
        compose("rlhf", [*NEEDED, *overrides])
    assert str(caught.value.where).startswith(where)
    assert hint in str(caught.value)
    assert caught.value.fix and "\n" not in caught.value.what


def test_a_sum_in_a_sum_is_refused():
    with pytest.raises(ConfigError, match="cannot hold a sum") as caught:
        check(SumConfig(parts={"n": SumConfig(parts={"b": LengthConfig()})}))
    assert caught.value.where == "parts.n"
