"""Rollouts without an engine: what another run sampled and recorded, read back from disk when it is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from llmscale.batch import Prompt, Trajectory
from llmscale.errors import RunError
from llmscale.protocols import SamplingRequest
from llmscale.rollout.config import ReplayConfig
from llmscale.rollout.recording import COMPLETIONS, from_record
from llmscale.tracking.jsonl import iter_located


class Replay:
    """The samples of a recording by draw and index. In memory is only where each stands in its file.

    `recorded_draw` maps a draw of this run to the one that the recording has for it, `prompt_of` a recorded draw to the prompt
    that this run has for it (None: it has none). `on_policy`: what is read was sampled by the very policy that is trained.

    Raises: RunError when a recorded draw is of another prompt, or of other tokens.
    """

    def __init__(
        self,
        config: ReplayConfig,
        recorded_draw: Callable[[int], int],
        prompt_of: Callable[[int], Prompt | None],
        on_policy: bool,
    ):
        self.file, self.recorded_draw, self.on_policy = Path(config.path) / COMPLETIONS, recorded_draw, on_policy
        self.offsets: dict[tuple[int, int], int] = {}  # (recorded draw, sample) -> byte
        for offset, record in iter_located(self.file):
            draw = record["draw_id"]
            prompt = prompt_of(draw)
            if prompt is not None:
                self._check_prompt(draw, prompt, record["prompt"], record["token_ids"])
                self.offsets[draw, record["sample_index"]] = offset

    def generate(self, requests: Sequence[SamplingRequest]) -> list[Trajectory]:
        """Raises: RunError when the recording lacks one of them."""
        with self.file.open("rb") as file:
            trajectories = []
            for request in requests:
                if (lacking := self.lacking(request.draw_id, request.sample_index)) is not None:
                    raise RunError(lacking, where=str(self.file), fix="Record more draws, or train for fewer steps.")
                file.seek(self.offsets[self.recorded_draw(request.draw_id), request.sample_index])
                trajectories.append(from_record(json.loads(file.readline()), request.prompt, request.draw_id))
        return trajectories

    def lacking(self, draw_id: int, sample_index: int) -> str | None:
        """What is not there, where a sample is not."""
        draw = self.recorded_draw(draw_id)
        if (draw, sample_index) in self.offsets:
            return None
        of = f"draw {draw_id}" if draw == draw_id else f"prompt {draw}, which is draw {draw_id}"
        if (draw, 0) not in self.offsets:
            return f"the recording has no sample of {of}"
        return f"the recording has no sample {sample_index} of {of}"

    def _check_prompt(self, draw: int, prompt: Prompt, text: str, token_ids: Sequence[int]) -> None:
        fix = "Give this run the data, the tokenizer and the chat template of the recorded one, or record anew."
        if text != prompt.text:
            what = f"draw {draw} was recorded of {text!r:.80}, and is {prompt.text!r:.80} in this run"
            raise RunError(what, where=str(self.file), fix=fix)
        if not np.array_equal(token_ids[: len(prompt.token_ids)], prompt.token_ids):
            what = f"draw {draw}, {text!r:.80}, was recorded with other tokens than this run's tokenizer gives it"
            raise RunError(what, where=str(self.file), fix=fix)
