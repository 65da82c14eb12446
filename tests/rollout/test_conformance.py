"""What every rollout engine does. An engine joins by a fixture that builds it round a model, named in ENGINES."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from threading import Timer
from typing import Any

import numpy as np
import pytest
import torch

from llmscale.batch import Trajectory, token_tensors
from llmscale.errors import DataError, ModelError, WeightMismatchError
from llmscale.functional import token_logprobs
from llmscale.models.adapters import adapted
from llmscale.models.config import LoraConfig
from llmscale.models.loading import LanguageModel
from llmscale.protocols import RolloutEngine, SamplingRequest
from llmscale.rollout.config import HFRolloutConfig
from llmscale.rollout.hf import HFRollout
from tests import tiny
from tests.rollout.apart import Apart
from tests.tiny import prompt, published, tokenizer

STOP = 5
KNOWN = [7, 8, 9] * 11  # a page of vLLM's and a token
PROMPTS = [[7], [7, 8, 9], [20, 21, 22, 23, 24, 25, 26], [3, 1, 4, 1, 5], [60, 61]]


language_model = partial(tiny.language_model, head_dim=32)  # vLLM has no attention for smaller ones on CPUs


@pytest.fixture
def hf() -> Callable[..., RolloutEngine]:
    def make(
        model: LanguageModel,
        *,
        seed: int = 0,
        stop_ids: Sequence[int] = (),
        adapter: LoraConfig | None = None,
        **settings: Any,
    ) -> HFRollout:
        own = adapted(copy.deepcopy(model), adapter, seed=0)
        return HFRollout(HFRolloutConfig(**settings), own, tokenizer(), seed, stop_ids)

    return make


@pytest.fixture(scope="module")
def apart(vllm_installed: None) -> Iterator[Apart]:
    with Apart() as apart:
        yield apart


@pytest.fixture
def vllm(apart: Apart) -> Callable[..., RolloutEngine]:
    return apart.engine


ENGINES = ["hf", "vllm"]


@pytest.fixture(params=ENGINES)
def make(request: pytest.FixtureRequest) -> Callable[..., RolloutEngine]:
    return request.getfixturevalue(request.param)


def requests(prompts: Sequence[Sequence[int]] = PROMPTS, group_size: int = 2) -> list[SamplingRequest]:
    return [SamplingRequest(prompt(p), d, s) for d, p in enumerate(prompts) for s in range(group_size)]


def tokens(trajectories: Sequence[Trajectory]) -> dict[tuple[int, int], list[int]]:
    return {(t.draw_id, t.sample_index): t.token_ids.tolist() for t in trajectories}


def next_token_probabilities(model: LanguageModel, token_ids: Sequence[int], temperature: float) -> np.ndarray:
    ids = torch.tensor([token_ids])
    with torch.no_grad():
        logits = model(ids, torch.arange(len(token_ids))[None])[0, -1].double()
    return torch.softmax(logits / temperature, -1).numpy()


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Pearson's statistic over its degrees of freedom, cells of fewer than five expected draws taken together."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    if rare.any():
        counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    return float(((counts - expected) ** 2 / expected).sum() / (len(counts) - 1))


def test_trajectories_are_well_formed(make):
    asked = requests()
    made = make(language_model(), max_new_tokens=6, stop_ids=[STOP]).generate(asked)
    for t, r in zip(made, asked, strict=True):
        assert (t.draw_id, t.sample_index) == (r.draw_id, r.sample_index)
        start = len(r.prompt.token_ids)
        assert t.prompt is r.prompt and t.token_ids[:start].tolist() == r.prompt.token_ids.tolist()
        assert not t.loss_mask[:start].any() and t.loss_mask[start:].all() and 1 <= t.completion_len <= 6
        assert not t.rollout_logprobs[:start].any() and (t.rollout_logprobs[start:] < 0).all()
        assert t.rollout_logprobs.dtype == np.float32 and t.token_ids.dtype == np.int64
        assert t.completion == tokenizer().decode(t.token_ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_equal_the_trainers(make, temperature: float):
    """The trainer sees rows padded on the right; what the engine does inside is its own affair."""
    model = language_model()
    made = make(model, max_new_tokens=20, temperature=temperature).generate(requests())
    assert difference(model, made, temperature) < 1e-4


def difference(model: LanguageModel, made: Sequence[Trajectory], temperature: float = 1.0) -> float:
    """The largest, between the log-probabilities of trainer and engine."""
    batch = token_tensors([t.token_ids for t in made])
    with torch.no_grad():
        trainer = token_logprobs(model(batch["input_ids"], batch["position_ids"]), batch["input_ids"], temperature)
    rows = zip(trainer.numpy(), made, strict=True)
    return max(np.abs(row[: len(t.token_ids)] - t.rollout_logprobs)[t.loss_mask].max() for row, t in rows)


def test_the_same_requests_give_the_same_bits(make):
    engine = make(language_model(), max_new_tokens=8)
    first, second = engine.generate(requests()), engine.generate(requests())
    assert tokens(first) == tokens(second)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.rollout_logprobs, b.rollout_logprobs)


def test_what_is_sampled_does_not_depend_on_what_else_is_in_the_batch(make):
    """Tokens, that is: log-probabilities may differ by rounding. Two tokens that tie to the last bits could then change
    places; none of these do."""
    engine = make(language_model(), max_new_tokens=12, stop_ids=[STOP])
    together = tokens(engine.generate(requests()))
    assert tokens(engine.generate(requests()[::-1])) == together
    alone = [engine.generate([r])[0] for r in requests()]
    assert tokens(alone) == together
    units = [t for start in range(0, 10, 3) for t in engine.generate(requests()[start : start + 3])]
    assert tokens(units) == together


def test_another_seed_draw_sample_or_turn_gives_another_completion(make):
    model = language_model()
    request = requests()[2]
    others = [request, replace(request, draw_id=77), replace(request, sample_index=9), replace(request, draw_id=-1)]
    others += [replace(request, turn=1), replace(request, turn=2)]
    made = make(model, max_new_tokens=12).generate(others) + make(model, max_new_tokens=12, seed=1).generate([request])
    assert len({tuple(t.token_ids) for t in made}) == len(made)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_come_as_often_as_the_model_says(make, temperature: float):
    model = language_model(vocab_size=16)
    engine = make(model, max_new_tokens=1, temperature=temperature)
    made = engine.generate([SamplingRequest(prompt([3, 9, 2]), draw, 0) for draw in range(3000)])
    counts = np.bincount([t.token_ids[-1] for t in made], minlength=16).astype(float)
    expected = next_token_probabilities(model, [3, 9, 2], temperature)
    assert chi_square(counts, expected) < 2.95  # 15 degrees of freedom, 0.01%
    uniform = np.full(16, 1 / 16)
    assert chi_square(counts, uniform) > 2.95  # else this could not fail


def test_successive_tokens_are_drawn_independently(make):
    """The frequencies of pairs, given the model's own conditional probabilities."""
    model = language_model(vocab_size=8)
    engine = make(model, max_new_tokens=2)
    made = engine.generate([SamplingRequest(prompt([3, 1]), draw, 0) for draw in range(4000)])
    counts = np.zeros((8, 8))
    for t in made:
        counts[t.token_ids[-2], t.token_ids[-1]] += 1
    first = next_token_probabilities(model, [3, 1], 1.0)
    second = np.stack([next_token_probabilities(model, [3, 1, token], 1.0) for token in range(8)])
    assert chi_square(counts.ravel(), (first[:, None] * second).ravel()) < 1.78  # 63 degrees of freedom, 0.01%


def test_temperature_zero_takes_the_likeliest(make):
    model = language_model()
    for t in make(model, max_new_tokens=8, temperature=0.0).generate(requests()):
        for position in np.flatnonzero(t.loss_mask):
            likely = next_token_probabilities(model, t.token_ids[:position].tolist(), 1.0)
            assert t.token_ids[position] == likely.argmax()
            assert t.rollout_logprobs[position] == pytest.approx(np.log(likely.max()), abs=1e-5)


def test_stops_at_a_stop_token_and_at_the_limit(make):
    made = make(language_model(), max_new_tokens=25, stop_ids=[STOP, 6]).generate(requests(group_size=8))
    assert {t.finished for t in made} == {True, False}
    for t in made:
        own = t.token_ids[t.loss_mask]
        stops = np.isin(own, [STOP, 6])
        assert not stops[:-1].any() and stops[-1] == t.finished  # the stop token is the policy's own, and its last
        assert t.finished or len(own) == 25


def cut(trajectory: Trajectory, num_tokens: int) -> Trajectory:
    """As if it had been interrupted after so many tokens of its own."""
    length = len(trajectory.prompt.token_ids) + num_tokens
    arrays = ("token_ids", "loss_mask", "rollout_logprobs", "weight_versions")
    return replace(trajectory, **{name: getattr(trajectory, name)[:length] for name in arrays})


def test_what_was_begun_goes_on_from_there(make):
    """A sample of hf becomes what it would have been, whoever sampled its beginning; one of vLLM is another, as long."""
    engine, asked = make(language_model(), max_new_tokens=12, stop_ids=[STOP, 6]), requests(group_size=5)
    whole = engine.generate(asked)
    assert {t.completion_len for t in whole} != {12}, "some end early"
    begun = [cut(t, i % t.completion_len) for i, t in enumerate(whole)]
    made = engine.generate([replace(r, begun=t) for r, t in zip(asked, begun, strict=True)])
    assert difference(language_model(), made) < 1e-4
    for t, before, r in zip(made, begun, asked, strict=True):
        kept = len(before.token_ids)
        assert t.token_ids[:kept].tolist() == before.token_ids.tolist() and t.prompt is r.prompt
        np.testing.assert_array_equal(t.rollout_logprobs[:kept], before.rollout_logprobs)
        assert 1 <= t.completion_len <= 12 and (t.finished or t.completion_len == 12) and not t.interrupted
    if isinstance(engine, HFRollout):
        assert tokens(made) == tokens(whole) and [t.finished for t in made] == [t.finished for t in whole]


def test_hf_can_be_interrupted_and_goes_on_by_new_weights(hf):
    model = language_model(max_position=700)
    engine, asked = hf(model, max_new_tokens=600, stop_ids=[STOP]), requests()
    whole = tokens(hf(model, max_new_tokens=600, stop_ids=[STOP]).generate(asked))
    timer = Timer(0.15, engine.interrupt, [1])
    timer.start()
    made = engine.generate(asked)
    timer.join()
    assert any(t.interrupted for t in made) and max(t.completion_len for t in made) < 600
    again = engine.generate(asked)
    assert all(t.interrupted and t.completion_len == 0 and not t.finished for t in again), "until there are new weights"
    engine.load_weights(1, published(model))
    rest = [replace(r, begun=t, weights=1) for r, t in zip(asked, made, strict=True) if t.interrupted]
    ended = [t for t in made if not t.interrupted] + engine.generate(rest)
    assert tokens(ended) == whole
    engine.interrupt(1)  # late: these are the weights that it holds
    assert tokens(engine.generate(asked)) == whole
    for t in ended:
        versions = t.weight_versions[t.loss_mask]
        assert (np.diff(versions) >= 0).all() and set(versions) <= {0, 1} and not t.interrupted
    assert any(set(t.weight_versions[t.loss_mask]) == {0, 1} for t in ended)


def test_a_stop_token_in_the_prompt_stops_nothing(make):
    made = make(language_model(), max_new_tokens=3, stop_ids=[STOP]).generate(
        [SamplingRequest(prompt([STOP, 8]), 0, 0)]
    )
    assert made[0].token_ids[:2].tolist() == [STOP, 8] and made[0].completion_len >= 1


def test_a_prompt_that_leaves_no_room_is_refused(make):
    engine = make(language_model(max_position=16), max_new_tokens=10)
    assert len(engine.generate([SamplingRequest(prompt([1] * 6), 0, 0)])[0].token_ids) == 16
    with pytest.raises(DataError, match="exceed the model's context of 16"):
        engine.generate([SamplingRequest(prompt([1] * 7), 0, 0)])


def test_the_models_saved_generation_settings_are_not_used(make):
    """A published model may ask for a repetition penalty or truncation: no longer the distribution that is trained."""
    model = language_model()
    plain = make(model, max_new_tokens=12).generate(requests())
    settings = model.hf.generation_config
    settings.do_sample, settings.top_k, settings.top_p, settings.temperature = True, 3, 0.5, 0.1
    settings.repetition_penalty, settings.no_repeat_ngram_size, settings.min_new_tokens = 5.0, 1, 4
    settings.suppress_tokens, settings.num_beams, settings.max_new_tokens = [11, 12, 13], 2, 3
    settings.use_cache, settings.forced_eos_token_id = False, 9
    assert tokens(make(model, max_new_tokens=12).generate(requests())) == tokens(plain)


@pytest.mark.parametrize(
    ("dtype", "tie"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)], ids=str
)
def test_new_weights_sample_what_a_fresh_engine_samples(make, dtype: torch.dtype, tie: bool):
    """A first call before the update: a cached copy of the old weights would show, and so would what they made of a prompt.
    Keys and values of the longest are kept, all but a token's."""
    old, new = language_model(seed=0, tie=tie).to(dtype), language_model(seed=1, tie=tie).to(dtype)
    asked = requests([*PROMPTS, KNOWN])
    engine, fresh = make(old, max_new_tokens=12), make(new, max_new_tokens=12)
    before = engine.generate(asked)
    engine.load_weights(3, published(new, dtype))
    after, expected = engine.generate(asked), fresh.generate(asked)
    assert tokens(before) != tokens(after) == tokens(expected)
    for a, b in zip(after, expected, strict=True):
        np.testing.assert_array_equal(a.rollout_logprobs, b.rollout_logprobs)


def test_an_adapter_comes_alone(make):
    """Twice, and onto a prompt that is known: nothing of the base or of the first one shows."""
    engine = make(language_model(), max_new_tokens=8, adapter=LoraConfig(rank=4, alpha=8))
    asked = requests([*PROMPTS, KNOWN])
    before = engine.generate(asked)
    assert difference(language_model(), before) < 1e-4
    for version in (1, 2):
        policy = tiny.adapted_model(seed=version, base=language_model())
        engine.load_weights(version, published(policy))
        made = engine.generate(asked)
        assert difference(policy, made) < 1e-4 and tokens(made) != tokens(before)


def test_weights_of_another_model_are_refused(make):
    engine = make(language_model(), max_new_tokens=4)
    with pytest.raises(WeightMismatchError, match=r"published hf.model.embed_tokens.weight is \(48, 32\)"):
        engine.load_weights(1, published(language_model(vocab_size=48)))
    with pytest.raises(WeightMismatchError, match=r"differ by name: hf\.lm_head\.weight"):
        engine.load_weights(1, published(language_model(tie=False)))
    assert engine.generate(requests())[0].weight_versions[-1] == 0


def test_who_slept_samples_what_it_would_have_sampled(make):
    """The weights that it held, or new ones, which come when it is awake."""
    engine = make(language_model(), max_new_tokens=8)
    before = engine.generate(requests())
    engine.sleep()
    engine.wake()
    assert tokens(engine.generate(requests())) == tokens(before)
    engine.sleep()
    engine.wake()
    engine.load_weights(1, published(language_model(seed=1)))
    assert difference(language_model(seed=1), engine.generate(requests())) < 1e-4


def test_every_token_carries_the_version_that_produced_it(make):
    engine = make(language_model(), max_new_tokens=4)
    for version in (0, 1, 5):
        if version:
            engine.load_weights(version, published(language_model(seed=version)))
        for t in engine.generate(requests()):
            assert t.weight_versions.tolist() == [version if own else -1 for own in t.loss_mask]


def test_versions_only_grow(make):
    engine = make(language_model(), max_new_tokens=4)
    engine.load_weights(4, published(language_model(seed=1)))
    for version in (4, 3, 0):
        with pytest.raises(WeightMismatchError, match=f"weights {version} offered where 4"):
            engine.load_weights(version, published(language_model(seed=2)))


def test_a_missed_update_is_found_before_anything_is_sampled(make):
    engine = make(language_model(), max_new_tokens=4)
    assert len(engine.generate([replace(r, weights=0) for r in requests()])) == len(requests())
    engine.load_weights(2, published(language_model(seed=1)))
    with pytest.raises(WeightMismatchError, match="weights 3 are asked for where 2 are held"):
        engine.generate([*requests(), replace(requests()[0], weights=3)])
    for asked in (1, 2):  # at least: a request may have waited while there was an update
        for made in engine.generate([replace(r, weights=asked) for r in requests()]):
            assert set(made.weight_versions[made.loss_mask]) == {2}, "which says so"


def test_a_damaged_bucket_is_refused(make):
    engine = make(language_model(), max_new_tokens=4)
    before = engine.generate(requests())
    buckets = published(language_model(seed=1))
    buckets[1].arrays["hf.model.norm.weight"].view(np.uint32)[3] ^= 1
    with pytest.raises(WeightMismatchError, match="not those published") as caught:
        engine.load_weights(1, buckets)
    assert "weights 1" in str(caught.value.where)
    after = engine.generate([replace(r, weights=0) for r in requests()])  # nothing of them was taken
    assert tokens(after) == tokens(before)
    for a, b in zip(after, before, strict=True):
        np.testing.assert_array_equal(a.rollout_logprobs, b.rollout_logprobs)


def test_vllm_says_what_it_cannot_do(vllm):
    with pytest.raises(ModelError, match="no attention for heads of 8, only 32, 64"):
        vllm(language_model(head_dim=8)).generate(requests())
    with pytest.raises(ModelError, match="ends a turn with token 64, and the model has 64"):
        vllm(language_model(seed=1), stop_ids=[STOP, 64]).generate(requests())
