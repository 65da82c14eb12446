"""Ranks that train together are lost together. What the whole run does then, without a new command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmscale.cluster.restarts import Restarts
from llmscale.errors import DamagedWeightsError, WorkerLostError
from llmscale.stages.config import StageConfig
from llmscale.tracking.jsonl import append_event
from llmscale.training.stop import signals


def restarting(
    config: StageConfig, run_dir: Path, attempt: Callable[[], dict[str, Any]], last_words: Callable[[], str] = str
) -> dict[str, Any]:
    """`attempt`, and again as long as workers are lost that it cannot do without, or weights that cannot be had otherwise: each
    begins at the newest checkpoint, as the same command would. `last_words`: what the ranks said of it, as far as they did."""
    restarts = Restarts(config.cluster.max_restarts)
    while True:
        try:
            return attempt()
        except (WorkerLostError, DamagedWeightsError) as error:
            if signals.received:  # whoever ends the whole job may have signalled the workers too
                raise KeyboardInterrupt from error
            said = last_words() or error.fix
            left = restarts.take(config.stage, error.cause)
            about = {"where": error.where, "cause": error.cause, "why": error.what, "said": said}
            kind = "worker_lost" if isinstance(error, WorkerLostError) else "weights_damaged"
            append_event(run_dir, kind, **about, restarts_left=left)
            print(f"{config.stage}: {error.where}: {error.what}; {said}", file=sys.stderr, flush=True)
            if not left:
                raise
