"""Trajectories as JSON lines, exactly: what was sampled can be read back bit for bit.

A float32 is written with the fewest digits that only it has (9 at most), which is as short as rounding and loses nothing.

Legend: T tokens of a sequence, prompt and completion.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llmscale.batch import Prompt, Trajectory

COMPLETIONS = "completions.jsonl"


def to_record(trajectory: Trajectory, *, logprobs: bool = True, **about: Any) -> dict[str, Any]:
    """`logprobs`: with the log-probability of every token; without, nothing can be trained from it. `about`: what else is
    known of the sample; it stands before the arrays, where people look."""
    t = trajectory
    return {
        "draw_id": t.draw_id,
        "sample_index": t.sample_index,
        "prompt": t.prompt.text,
        "completion": t.completion,
        **({"messages": list(t.messages)} if t.messages else {}),
        "finished": t.finished,
        **({"failure": t.failure} if t.failure else {}),
        **about,
        "token_ids": t.token_ids.tolist(),
        "loss_mask": t.loss_mask.astype(int).tolist(),
        **({"rollout_logprobs": _decimals(t.rollout_logprobs)} if logprobs else {}),
        "weight_versions": t.weight_versions.tolist(),
        **({"turn_rewards": _decimals(t.turn_rewards)} if t.turn_rewards is not None else {}),
    }


def from_record(record: Mapping[str, Any], prompt: Prompt, draw_id: int) -> Trajectory:
    """The inverse, as a draw of `prompt`."""
    rewards = record.get("turn_rewards")
    return Trajectory(
        draw_id=draw_id,
        sample_index=record["sample_index"],
        token_ids=np.array(record["token_ids"], dtype=np.int64),
        loss_mask=np.array(record["loss_mask"], dtype=bool),
        rollout_logprobs=np.array(record["rollout_logprobs"], dtype=np.float32),
        weight_versions=np.array(record["weight_versions"], dtype=np.int32),
        finished=record["finished"],
        prompt=prompt,
        completion=record["completion"],
        messages=tuple(record.get("messages", ())),
        turn_rewards=None if rewards is None else np.array(rewards, dtype=np.float32),
        failure=record.get("failure", ""),
    )


def _decimals(values: np.ndarray) -> list[float]:
    """float32 [T] -> numbers that print short and become the same float32 again."""
    return [float(text) for text in values.astype(str)]
