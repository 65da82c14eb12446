"""Rewards of a learned model: its own number at the last token, standardised."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from llmscale.batch import Trajectory
from llmscale.data.tokenizer import train_tokenizer
from llmscale.errors import ModelError
from llmscale.models.export import save_hf
from llmscale.models.loading import ScalarModel
from llmscale.rewards.config import Combine, LearnedConfig
from llmscale.rewards.learned import BATCH_SIZE, LearnedReward, disagreement
from tests.tiny import language_model, scalar_model, tokenizer, trajectory

MEAN, STD = 0.25, 0.5


@pytest.fixture(scope="module")
def model() -> ScalarModel:
    made = scalar_model()
    made.hf.config.score_mean, made.hf.config.score_std = MEAN, STD
    return made


@pytest.fixture(scope="module")
def folder(model: ScalarModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("reward")
    save_hf(model, tokenizer(), path, [dict(model.named_parameters())])
    return str(path)


@pytest.fixture(scope="module")
def samples() -> list[Trajectory]:
    """More than one forward's worth, of lengths 2 to 20."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 21, BATCH_SIZE + 5)
    return [trajectory(rng.integers(0, 64, n).tolist(), [0] + [1] * (n - 1), draw_id=i) for i, n in enumerate(lengths)]


def own_score(model: ScalarModel, sample: Trajectory) -> float:
    ids = torch.from_numpy(sample.token_ids)[None]
    with torch.no_grad():
        return model(ids, torch.arange(ids.shape[1])[None])[0, -1].item()


def test_is_the_models_own_number_at_the_last_token(model, folder, samples):
    rewards = LearnedReward(LearnedConfig(path=folder), tokenizer())(samples)
    assert rewards == pytest.approx([own_score(model, s) for s in samples], abs=1e-5)
    assert np.std(rewards) > 0.1  # else this could not fail


def test_the_model_standardises_by_what_it_was_saved_with(model, folder, samples):
    """The critic that starts from it speaks on the same scale."""
    head = [(x * STD + MEAN) for x in LearnedReward(LearnedConfig(path=folder), tokenizer())(samples)]
    ids = torch.from_numpy(samples[0].token_ids)[None]
    with torch.no_grad():
        hidden = model.hf.base_model(input_ids=ids, position_ids=torch.arange(ids.shape[1])[None]).last_hidden_state
        assert model.hf.score(hidden)[0, -1, 0].item() == pytest.approx(head[0], abs=1e-5)


def test_a_completion_that_was_cut_off_can_have_a_reward_of_its_own(folder, samples):
    cut = [dataclasses.replace(s, finished=i % 2 == 0) for i, s in enumerate(samples)]
    rewards = LearnedReward(LearnedConfig(path=folder, unfinished=-3.0), tokenizer())(cut)
    assert all((r == -3.0) == (not s.finished) for r, s in zip(rewards, cut, strict=True))


def test_a_model_saved_without_them_is_taken_as_it_is(samples, tmp_path: Path):
    model = scalar_model(seed=3)
    save_hf(model, tokenizer(), tmp_path, [dict(model.named_parameters())])
    rewards = LearnedReward(LearnedConfig(path=str(tmp_path)), tokenizer())(samples[:3])
    assert rewards == pytest.approx([own_score(model, s) for s in samples[:3]], abs=1e-5)


def test_a_language_model_is_refused(tmp_path: Path):
    model = language_model()
    save_hf(model, tokenizer(), tmp_path, [dict(model.named_parameters())])
    with pytest.raises(ModelError, match="not a reward model") as caught:
        LearnedReward(LearnedConfig(path=str(tmp_path)), tokenizer())
    assert caught.value.where == "reward.path"


def test_other_tokens_than_the_policys_are_refused(folder):
    other = train_tokenizer(iter(["the cat the cat"]), vocab_size=300, model_max_length=64)
    with pytest.raises(ModelError, match="tokens are not the policy's"):
        LearnedReward(LearnedConfig(path=folder), other)


def test_a_judge_of_steps_is_refused(tmp_path: Path):
    model = scalar_model()
    model.hf.config.judges = "steps"
    save_hf(model, tokenizer(), tmp_path, [dict(model.named_parameters())])
    with pytest.raises(ModelError, match="judges steps, not completions") as caught:
        LearnedReward(LearnedConfig(path=str(tmp_path)), tokenizer())
    assert caught.value.where == "reward.path" and "reward=process" in str(caught.value)


# ---------------------------------------------------------------- ensembles


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, ScalarModel]]:
    """Three models of other weights, each with a scale of its own."""
    made = []
    for seed in range(3):
        model, path = scalar_model(seed), tmp_path_factory.mktemp(f"member{seed}")
        model.hf.config.score_mean, model.hf.config.score_std = 0.1 * seed, 0.5 + seed
        save_hf(model, tokenizer(), path, [dict(model.named_parameters())])
        made.append((str(path), model))
    return made


@pytest.mark.parametrize("combine", Combine)
def test_an_ensemble_is_combined_from_what_each_member_says(combine, members, samples):
    paths = [path for path, _ in members]
    config = LearnedConfig(path=paths[0], ensemble=paths[1:], combine=combine, std_coef=0.7)
    reward = LearnedReward(config, tokenizer())
    for got, sample in zip(reward(samples), samples, strict=True):
        scores = [own_score(model, sample) for _, model in members]
        mean = sum(scores) / 3
        deviation = (sum((s - mean) ** 2 for s in scores) / 3) ** 0.5
        expected = {"mean": mean, "minimum": min(scores), "lower_bound": mean - 0.7 * deviation}[combine.name]
        assert got == pytest.approx(expected, abs=1e-5)


def test_disagreement_is_the_deviation_over_the_members(members, samples):
    paths = [path for path, _ in members]
    scores = LearnedReward(LearnedConfig(path=paths[0], ensemble=paths[1:]), tokenizer()).by_member(samples)
    assert scores.shape == (3, len(samples))
    for got, column in zip(disagreement(scores), scores.T.tolist(), strict=True):
        mean = sum(column) / 3
        assert got == pytest.approx((sum((s - mean) ** 2 for s in column) / 3) ** 0.5, abs=1e-9)
    alone = LearnedReward(LearnedConfig(path=paths[0]), tokenizer()).by_member(samples)
    assert disagreement(alone).tolist() == [0.0] * len(samples)


def test_the_member_that_is_no_reward_model_is_named(members, tmp_path: Path):
    model = language_model()
    save_hf(model, tokenizer(), tmp_path, [dict(model.named_parameters())])
    with pytest.raises(ModelError) as caught:
        LearnedReward(LearnedConfig(path=members[0][0], ensemble=[members[1][0], str(tmp_path)]), tokenizer())
    assert caught.value.where == "reward.ensemble[1]"


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"combine": Combine.minimum}, "combine"),
        ({"std_coef": -1.0}, "std_coef"),
        ({"ensemble": ["a"]}, "ensemble"),
        ({"ensemble": ["b", "b"]}, "ensemble"),
    ],
)
def test_an_impossible_ensemble_is_refused(fields, path):
    found = list(LearnedConfig(path="a", **fields).problems())
    assert [where for where, _, _ in found] == [path] and all(what and fix for _, what, fix in found)
    assert not list(LearnedConfig(path="a", ensemble=["b"], combine=Combine.minimum).problems())
