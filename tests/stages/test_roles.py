"""What workers compute, where it is not the model's own."""

from __future__ import annotations

from threading import Timer

import numpy as np

from llmscale.engine.accounting import empty_rows
from llmscale.engine.config import SingleConfig
from llmscale.engine.frozen import FrozenEngine
from llmscale.protocols import SamplingRequest
from llmscale.rollout.completion import continued
from llmscale.rollout.config import HFRolloutConfig
from llmscale.rollout.hf import HFRollout
from llmscale.stages.roles import RolloutRole, logprobs_at
from tests.tiny import language_model, prompt, published, tokenizer


def test_a_rank_without_trajectories_takes_part():
    """Another one has more micro-batches: this one goes through as many, with nothing to score."""
    (output,) = FrozenEngine(SingleConfig(), language_model()).forward([empty_rows()], logprobs_at(0.7))
    assert output["out"].tolist() == [[0.0]]


def test_a_unit_that_is_broken_off_again_and_again_becomes_what_it_would_have_become() -> None:
    """The weights are the same ones under new versions; some samples end before the others are broken off."""
    model = language_model(max_position=300)
    role = object.__new__(RolloutRole)  # without a run around it

    def restart() -> None:
        config = HFRolloutConfig(max_new_tokens=250)
        role.engine = HFRollout(config, model, tokenizer(), seed=0, stop_ids=[5])

    unit = [SamplingRequest(prompt([7, 8]), draw, sample) for draw in range(4) for sample in range(2)]
    restart()
    whole = role.generate(unit)
    restart()
    asked, made, version = unit, [], 0
    while asked is not None:
        version += 1
        timer = Timer(0.08, role.interrupt, [version])
        timer.start()
        made = role.generate(asked)
        timer.join()
        asked = continued(asked, made)
        role.engine.load_weights(version, published(model))
    assert version > 2
    for one, other in zip(made, whole, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_allclose(one.rollout_logprobs, other.rollout_logprobs, atol=1e-5)
        assert one.finished == other.finished and (np.diff(one.weight_versions[one.loss_mask]) >= 0).all()
    assert len({int(t.weight_versions[-1]) for t in made}) > 1, "one that has ended is left as it is"
    assert max(len(np.unique(t.weight_versions[t.loss_mask])) for t in made) > 2
