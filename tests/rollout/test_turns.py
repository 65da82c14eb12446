"""Completions of several turns, by a real engine and a real chat template. The model is random: it writes bytes that are no
text, so that whatever decoded and encoded them again would be caught."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from zlib import crc32

import numpy as np
import pytest
import torch

from llmscale.batch import Prompt, Trajectory, token_tensors
from llmscale.config import option
from llmscale.data.chat import CUT, ChatRenderer, Message
from llmscale.functional import token_logprobs
from llmscale.models.loading import LanguageModel
from llmscale.protocols import SamplingRequest
from llmscale.rollout.config import EnvironmentConfig, HFRolloutConfig
from llmscale.rollout.environment import Observation
from llmscale.rollout.hf import HFRollout
from llmscale.rollout.turns import Turns, turn_metrics
from tests.tiny import language_model, published, tokenizer

VOCAB_SIZE, MAX_POSITION, MAX_NEW_TOKENS = 272, 256, 9
STOP_IDS = list(range(20, 60))  # so many that turns end after a few tokens
QUESTIONS = ["a", "how many?", "the cat sat", "x" * 17, "é"]


@option("environment", "parrot", builds="tests.rollout.test_turns:Parrot")
@dataclass
class ParrotConfig(EnvironmentConfig):
    name: str = "parrot"
    fault: str = ""


class Parrot:
    """Says a number that depends on all that it heard, until it has had enough."""

    def __init__(self, config: ParrotConfig):
        self.fault = config.fault

    def reset(self, prompt, fields):
        self.heard = prompt
        if self.fault == "reset" and len(prompt) > 15:
            raise RuntimeError("too long for me")

    def step(self, said):
        self.heard += said
        number = crc32(self.heard.encode())
        if number % 3 == 0 and self.fault == "step":
            raise KeyError("nope")
        if number % 3 == 0 and self.fault == "hangs":
            time.sleep(5)
        if number % 3 == 0 and self.fault in ("text", "half"):
            return {"text": None, "half": "\ud800"}[self.fault], False
        return Observation(f"you said {number % 1000}", done=number % 4 == 0, reward=number % 7 + 1)


def make(model: LanguageModel | None = None, *, seed: int = 0, **settings) -> Turns:
    config = ParrotConfig(**settings)
    renderer = ChatRenderer(tokenizer())
    render = partial(renderer.render_observation, role=config.role.name, max_tokens=config.max_observation_tokens)
    rollout = HFRolloutConfig(max_new_tokens=MAX_NEW_TOKENS)
    return Turns(config, HFRollout(rollout, model or the_model(), tokenizer(), seed, STOP_IDS), render)


def the_model(seed: int = 0) -> LanguageModel:
    return language_model(seed, vocab_size=VOCAB_SIZE, max_position=MAX_POSITION)


def requests(group_size: int = 3) -> list[SamplingRequest]:
    renderer, made = ChatRenderer(tokenizer()), []
    for draw, text in enumerate(QUESTIONS):
        messages = (Message(role="user", content=text),)
        prompt = Prompt(renderer.render_prompt(messages), text, messages=messages)
        made += [SamplingRequest(prompt, draw, k) for k in range(group_size)]
    return made


def tokens(trajectories: Sequence[Trajectory]) -> list[list[int]]:
    return [t.token_ids.tolist() for t in trajectories]


@pytest.fixture(scope="module")
def made() -> list[Trajectory]:
    return make().generate(requests())


def test_equals_the_loop_over_one_sample(made):
    """Sample; ask; append the ids of the observation; sample on."""
    engine, parrot_config, eos = make().engine, ParrotConfig(), tokenizer().eos_token_id
    user, assistant = (tokenizer().convert_tokens_to_ids(t) for t in ("<|user|>", "<|assistant|>"))
    for request, trajectory in zip(requests(), made, strict=True):
        parrot, ids, own, finished = Parrot(parrot_config), request.prompt.token_ids.tolist(), [], False
        rewards: dict[int, float] = {}
        parrot.reset(request.prompt.text, {})
        for turn in range(4):
            prompt = replace(request.prompt, token_ids=np.array(ids))
            said = engine.generate([replace(request, prompt=prompt, turn=turn)])[0]
            own += range(len(ids), len(said.token_ids))
            ids = said.token_ids.tolist()
            if not said.finished:
                break
            text, finished, reward = parrot.step(said.completion)
            rewards[len(ids) - 1] = reward
            if finished or turn == 3:
                break
            # The default template puts nothing between the token that ended the turn and the next one.
            ids += [user, *tokenizer()(text, add_special_tokens=False)["input_ids"], eos, assistant]
        assert trajectory.token_ids.tolist() == ids and trajectory.finished == finished
        assert np.flatnonzero(trajectory.loss_mask).tolist() == own
        assert {int(t): trajectory.turn_rewards[t] for t in np.flatnonzero(trajectory.turn_rewards)} == rewards


def test_all_ends_are_seen(made):
    """The other tests would say little if every sample had one turn."""
    assert {len(t.said) for t in made} == {1, 2, 3, 4}
    assert {(t.finished, len(t.said) == 4) for t in made} >= {(True, False), (False, False), (False, True)}


def test_what_the_policy_did_not_write_is_masked(made):
    for t in made:
        assert t.token_ids.dtype == np.int64 and t.loss_mask.dtype == np.bool_
        assert t.rollout_logprobs.dtype == np.float32 and t.weight_versions.dtype == np.int32
        assert (t.rollout_logprobs[t.loss_mask] < 0).all() and not t.rollout_logprobs[~t.loss_mask].any()
        assert t.weight_versions.tolist() == [0 if own else -1 for own in t.loss_mask]
        assert not t.loss_mask[: len(t.prompt.token_ids)].any() and t.loss_mask[-1]
        assert t.completion_len == t.loss_mask.sum() <= 4 * MAX_NEW_TOKENS


def test_the_turns_can_be_read(made):
    t = next(t for t in made if len(t.said) == 3)
    assert [m["role"] for m in t.messages] == ["assistant", "user", "assistant", "user", "assistant"]
    observations = [m["content"] for m in t.messages if m["role"] == "user"]
    decoded = tokenizer().decode(t.token_ids)
    for text in observations:
        assert text.startswith("you said ") and f"<|user|>{text}<|eos|><|assistant|>" in decoded
        assert f"\n\nuser: {text}\n\nassistant: " in t.completion
    assert t.completion.startswith("assistant: " + t.said[0]) and t.completion.endswith(t.said[-1])
    alone = next(t for t in made if len(t.said) == 1)
    assert alone.completion == alone.said[0] == alone.messages[0]["content"]
    assert turn_metrics([t, alone]) == {"rollout/turns": 2.0}


def test_the_trainers_logprobs_of_the_whole_are_those_recorded_turn_by_turn(made):
    batch = token_tensors([t.token_ids for t in made])
    with torch.no_grad():
        logits = the_model()(batch["input_ids"], batch["position_ids"])
    trainer = token_logprobs(logits, batch["input_ids"], 1.0).numpy()
    for row, t in zip(trainer, made, strict=True):
        assert np.abs(row[: len(t.token_ids)] - t.rollout_logprobs)[t.loss_mask].max() < 1e-4


def test_encoding_the_text_again_would_have_made_other_tokens(made):
    """What the tests above compare is there: most of what this model writes does not survive decoding and encoding."""
    changed = 0
    for t in made:
        ids = t.token_ids[t.loss_mask]
        changed += tokenizer()(tokenizer().decode(ids), add_special_tokens=False)["input_ids"] != ids.tolist()
    assert changed > len(made) / 2


def test_what_is_sampled_does_not_depend_on_what_else_is_in_the_unit(made):
    """Tokens, that is: log-probabilities may differ by rounding, as in one turn."""
    turns = make()
    assert tokens(turns.generate(requests()[::-1])[::-1]) == tokens(made)
    assert tokens([turns.generate([r])[0] for r in requests()]) == tokens(made)
    units = [t for start in range(0, len(made), 7) for t in turns.generate(requests()[start : start + 7])]
    assert tokens(units) == tokens(made)


def test_the_same_requests_give_the_same_bits(made):
    for a, b in zip(made, make().generate(requests()), strict=True):
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        np.testing.assert_array_equal(a.rollout_logprobs, b.rollout_logprobs)


def test_who_is_done_is_not_sampled_on(made, monkeypatch: pytest.MonkeyPatch):
    turns, asked = make(), []
    generate = turns.engine.generate
    monkeypatch.setattr(turns.engine, "generate", lambda some: asked.append(some) or generate(some))
    turns.generate(requests())
    assert [len(some) for some in asked] == [sum(len(t.said) > turn for t in made) for turn in range(4)]
    assert [{r.turn for r in some} for some in asked] == [{0}, {1}, {2}, {3}]


def test_one_turn_is_what_the_engine_gives_alone():
    turns = make(max_turns=1)
    for t, alone in zip(turns.generate(requests()), turns.engine.generate(requests()), strict=True):
        assert t.token_ids.tolist() == alone.token_ids.tolist() and t.completion == alone.completion
        np.testing.assert_array_equal(t.rollout_logprobs, alone.rollout_logprobs)


def test_new_weights_reach_the_engine():
    turns = make()
    turns.load_weights(3, published(the_model(seed=1)))
    t = turns.generate(requests()[:1])[0]
    assert set(t.weight_versions[t.loss_mask]) == {3}
    assert tokens([t]) == tokens(make(the_model(seed=1)).generate(requests()[:1]))


def test_a_long_observation_is_cut_and_says_so(made):
    short = make(max_observation_tokens=5).generate(requests())
    heard = {m["content"] for t in short for m in t.messages if m["role"] == "user"}
    assert heard == {"you s" + CUT}
    assert any(m["content"].startswith("you said") for t in made for m in t.messages)


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("reset", "environment parrot: RuntimeError: too long for me"),
        ("step", "environment parrot: KeyError: 'nope'"),
        ("text", "environment parrot: TypeError: step must return an Observation, its text is None"),
        (
            "half",
            "environment parrot: UnicodeEncodeError: 'utf-8' codec can't encode character '\\ud800' in position 0",
        ),
        ("hangs", "environment parrot: no answer within 0.5 s"),
    ],
)
def test_an_environment_that_fails_costs_its_own_sample_alone(made, fault: str, why: str):
    found = make(fault=fault, timeout_s=0.5 if fault == "hangs" else 10).generate(requests())
    failed = [t for t in found if t.failure]
    assert 0 < len(failed) < len(found) and all(t.failure.startswith(why) for t in failed)
    assert not any(t.finished for t in failed)
    for t, other in zip(found, made, strict=True):
        length = len(t.token_ids)
        assert t.token_ids.tolist() == other.token_ids[:length].tolist()
        assert t.failure or length == len(other.token_ids)
    if fault == "reset":
        assert all(not t.loss_mask.any() and t.completion == "" for t in failed)
