"""A recording read back by draw and sample, in whatever order it is asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llmscale.errors import RunError
from llmscale.protocols import SamplingRequest
from llmscale.rollout.config import ReplayConfig
from llmscale.rollout.recording import COMPLETIONS, to_record
from llmscale.rollout.replay import Replay
from llmscale.tracking.jsonl import RecordFile
from tests.tiny import trajectory

SAMPLED = [
    trajectory([7, draw, 3, k], [0, 0, 1, 1], draw_id=draw, sample_index=k) for draw in range(5) for k in range(2)
]
PROMPTS = [SAMPLED[2 * draw].prompt for draw in range(5)]


@pytest.fixture
def config(tmp_path: Path) -> ReplayConfig:
    file = RecordFile(tmp_path / COMPLETIONS)
    file.append(to_record(t) for t in SAMPLED)
    file.close()
    return ReplayConfig(path=str(tmp_path))


def test_samples_come_as_they_were_asked_for(config: ReplayConfig) -> None:
    replay = Replay(config, lambda draw: 4 - draw % 5, PROMPTS.__getitem__, on_policy=False)
    asked = [(0, 1), (8, 0), (3, 1), (0, 1)]
    found = replay.generate([SamplingRequest(PROMPTS[4 - draw % 5], draw, k) for draw, k in asked])
    assert [(t.draw_id, t.sample_index) for t in found] == asked
    assert [t.token_ids.tolist() for t in found] == [[7, 4, 3, 1], [7, 1, 3, 0], [7, 1, 3, 1], [7, 4, 3, 1]]
    assert all(t.prompt is PROMPTS[4 - draw % 5] for t, (draw, _) in zip(found, asked, strict=True))


def test_a_draw_beyond_its_end_is_named(config: ReplayConfig) -> None:
    """As when a run draws others for prompts whose samples all got the same reward."""
    replay = Replay(config, lambda draw: draw, PROMPTS.__getitem__, on_policy=True)
    with pytest.raises(RunError, match="the recording has no sample of draw 5"):
        replay.generate([SamplingRequest(PROMPTS[0], 4, 1), SamplingRequest(PROMPTS[0], 5, 0)])
    assert replay.lacking(4, 2) == "the recording has no sample 2 of draw 4"


def test_prompts_that_this_run_does_not_have_are_passed_over(config: ReplayConfig) -> None:
    replay = Replay(config, lambda draw: draw, lambda draw: PROMPTS[draw] if draw < 2 else None, on_policy=True)
    assert sorted(replay.offsets) == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"text": "another"}, "was recorded of 'a prompt', and is 'another'"),
        ({"token_ids": np.array([7, 9])}, "other tokens"),
    ],
)
def test_another_prompt_is_refused(config: ReplayConfig, changed: dict, what: str) -> None:
    with pytest.raises(RunError, match=what):
        Replay(config, lambda draw: draw, lambda draw: replace(PROMPTS[draw], **changed), on_policy=True)
