"""Rewards from a service by HTTP.

The request, POST with JSON, is {"samples": [{"id": "draw/sample", "prompt": text, "completion": text, "finished": bool,
"fields": {the other columns of the prompt's record}}, ...]}. The answer, 200 with JSON, is {"scores": [...]} with one entry
a sample in the same order: a number; {"value": number, "parts": {name: number}}; or null or {"error": text} for one that
cannot be scored.

Lost connections, timeouts and the statuses 408, 425, 429, 500, 502, 503 and 504 are tried again (urllib3.Retry: exponential
back-off, Retry-After). A batch that is given up, and a sample without a number, become scores without a value, with the
reason: never zeros. What is put in JSON's place of a number, NaN and infinities, is passed on as it is.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from typing import Any

import urllib3
from transformers import PreTrainedTokenizerFast

from llmscale.batch import Trajectory
from llmscale.errors import ConfigError
from llmscale.protocols import Score
from llmscale.rewards.config import HttpConfig

RETRIED = (408, 425, 429, 500, 502, 503, 504)
MAX_WAIT_S = 60  # before a retry
MAX_ANSWER_BYTES = 64 << 20


class HttpReward:
    """Asks the service, a batch at a time."""

    def __init__(self, config: HttpConfig, tokenizer: PreTrainedTokenizerFast):
        self.config = config
        self.headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if config.token_env is not None:
            token = os.environ.get(config.token_env, "").strip()
            if not token:
                what = f"the environment variable {config.token_env} is not set"
                raise ConfigError(what, where="reward.token_env", fix="Set it where the reward workers start.")
            self.headers["Authorization"] = f"Bearer {token}"
        retry = urllib3.Retry(
            config.retries,
            redirect=0,
            allowed_methods=None,  # POST too: scoring twice does no harm
            status_forcelist=RETRIED,
            backoff_factor=config.backoff_s,
            backoff_max=MAX_WAIT_S,
            retry_after_max=MAX_WAIT_S,
            raise_on_redirect=False,
        )
        self.pool = urllib3.PoolManager(retries=retry, timeout=urllib3.Timeout(config.timeout_s))

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        size = self.config.batch_size
        batches = [trajectories[i : i + size] for i in range(0, len(trajectories), size)]
        return [score for batch in batches for score in self._score(batch)]

    def _score(self, batch: Sequence[Trajectory]) -> list[Score]:
        try:
            answer = self._ask({"samples": [_sample(t) for t in batch]})
            scores = answer["scores"] if isinstance(answer, dict) else None
            if not isinstance(scores, list) or len(scores) != len(batch):
                raise ValueError(f'it did not answer {{"scores": [...]}} with {len(batch)} entries')
        except (urllib3.exceptions.HTTPError, ValueError, KeyError, RecursionError) as error:
            return [Score(None, why=f"{self.config.url}: {_reason(error)}")] * len(batch)
        return [_read(entry) for entry in scores]

    def _ask(self, body: Any) -> Any:
        """What the service answers. Raises: HTTPError or ValueError when it gives none."""
        response = self.pool.request(
            "POST", self.config.url, body=_encoded(body), headers=self.headers, preload_content=False
        )
        deadline = time.monotonic() + self.config.timeout_s
        try:
            if response.status != 200:
                raise ValueError(f"status {response.status} {response.reason or ''}".strip())
            read = bytearray()
            # The pool's timeout is of each read; a service that answers byte by byte has to end as well.
            while chunk := response.read1(1 << 16):
                read += chunk
                if len(read) > MAX_ANSWER_BYTES or time.monotonic() > deadline:
                    raise ValueError(
                        "its answer is too long" if len(read) > MAX_ANSWER_BYTES else "its answer is too slow"
                    )
            return json.loads(bytes(read))
        finally:
            response.close()


def _encoded(body: Any) -> bytes:
    """Columns that JSON does not know, such as dates, go as text; lone surrogates as their \\u escapes."""
    return json.dumps(body, default=str).encode()


def _sample(trajectory: Trajectory) -> dict[str, Any]:
    return {
        "id": f"{trajectory.draw_id}/{trajectory.sample_index}",
        "prompt": trajectory.prompt.text,
        "completion": trajectory.completion,
        "finished": trajectory.finished,
        "fields": dict(trajectory.prompt.fields),
    }


def _read(entry: Any) -> Score:
    """One entry of the answer."""
    parts = {}
    if isinstance(entry, dict):
        given = entry.get("parts")
        parts = {str(k): float(v) for k, v in given.items() if _is_number(v)} if isinstance(given, dict) else {}
        if entry.get("value") is None:
            return Score(None, why=str(entry.get("error") or "the service gave no value")[:500])
        entry = entry["value"]
    if entry is None:
        return Score(None, why="the service gave no value")
    if not _is_number(entry):
        return Score(None, why=f"the service gave {str(entry)[:100]!r}, not a number")
    return Score(float(entry), parts)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1e300)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib3.exceptions.MaxRetryError) and error.reason is not None:
        return f"given up: {error.reason}"
    return "its answer is not JSON" if isinstance(error, json.JSONDecodeError) else str(error) or type(error).__name__
