"""What is recorded comes back bit for bit."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from llmscale.batch import Trajectory
from llmscale.rollout.recording import COMPLETIONS, from_record, to_record
from llmscale.tracking.jsonl import RecordFile, read_jsonl
from tests.tiny import trajectory


def equal(one: Trajectory, other: Trajectory) -> bool:
    pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(Trajectory)]
    arrays = [(np.asarray(a), np.asarray(b)) for a, b in pairs if isinstance(a, np.ndarray)]
    same = all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in arrays)
    return same and all(a == b for a, b in pairs if not isinstance(a, np.ndarray) and not hasattr(a, "token_ids"))


@pytest.mark.parametrize("seed", range(3))
def test_every_float32_comes_back(seed: int, tmp_path) -> None:
    """Whatever bits it has: ordinary ones, the smallest and the largest, negative zero."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 1 << 32, 4000, dtype=np.uint32).view(np.float32)
    values = np.concatenate([bits[np.isfinite(bits)], -rng.exponential(2, 4000), [0.0, -0.0, 1e-45, -3.4028235e38]])
    made = trajectory(range(len(values)), [0, *[1] * (len(values) - 1)])
    made = dataclasses.replace(made, rollout_logprobs=values.astype(np.float32))
    file = RecordFile(tmp_path / COMPLETIONS)
    file.append([to_record(made)])
    file.close()
    (record,) = read_jsonl(tmp_path / COMPLETIONS)
    assert equal(from_record(record, made.prompt, made.draw_id), made)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"finished": False, "completion": "a \u2028 line\nand half a surrogate, escaped: \\ud800"},
        {"messages": ({"role": "assistant", "content": "x"},), "turn_rewards": np.array([0, 0.1, 0, 1], np.float32)},
        {"failure": "environment class: ValueError: no"},
        {"weight_versions": np.array([-1, 3, 3, 4], np.int32)},
    ],
)
def test_everything_else_comes_back(more: dict) -> None:
    made = dataclasses.replace(trajectory([5, 6, 7, 8], [0, 1, 0, 1], draw_id=9, sample_index=2), **more)
    assert equal(from_record(json.loads(json.dumps(to_record(made))), made.prompt, 9), made)


def test_without_log_probabilities_and_with_more() -> None:
    record = to_record(trajectory([5, 6], [0, 1]), logprobs=False, reward=0.5)
    assert "rollout_logprobs" not in record and record["reward"] == 0.5
    assert list(record).index("reward") < list(record).index("token_ids")
