"""Weights & Biases: the only module that imports it. It may fail in any way and at any time; the run goes on.

One W&B run for each run, under an id that stays the same over attempts, so that an interrupted run continues in its
own charts. Offline, W&B counts its own step from 0 again in each attempt; every row therefore carries our `step`, and
all metrics are drawn over that. Steps that a resumed attempt repeats are there twice, and a killed process loses the
rows of the last 32 KiB; metrics.jsonl has every step once. One `wandb sync` uploads all offline attempts of a run,
in their order.

The key is read by W&B itself, from WANDB_API_KEY or from `wandb login`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmscale.tracking.config import TrackingConfig, WandbMode

# Read when the package is imported: reports about the use of W&B itself stay off unless asked for.
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")

import wandb

MAX_ROWS = 32  # of a step's samples


class WandbTracker:
    """One W&B run, in `run_dir`/wandb. `report` is the `event` of a tracker that is told what became of it."""

    def __init__(
        self,
        config: TrackingConfig,
        *,
        run_dir: Path,
        run_id: str,
        run_config: Mapping[str, Any],
        report: Callable[..., None],
    ):
        self._report = report
        self._run: wandb.Run | None = None
        for mode in _modes(config.wandb):
            with self._guarded(f"start {mode}"):
                self._run = _start(mode, config, run_dir, run_id, run_config)
            if self._run is not None:
                report("wandb_started", mode=mode, id=self._run.id, at=self._run.url or str(run_dir / "wandb"))
                break

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._run is not None:
            with self._guarded("log"):
                self._run.log({"step": step, **metrics})

    def samples(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        if self._run is not None and records:
            with self._guarded("log samples"):
                self._run.log({"step": step, "samples": _table(records)})

    def event(self, kind: str, **details: Any) -> None:
        """W&B has no place for events; events.jsonl holds them."""

    def finish(self, status: str) -> None:
        """Only the status "done" counts as success there."""
        run, self._run = self._run, None
        if run is not None:
            with self._guarded("finish"):
                run.finish(exit_code=0 if status == "done" else 1)
                wandb.teardown()  # W&B would keep its service process for the life of this one

    @contextmanager
    def _guarded(self, doing: str) -> Iterator[None]:
        """Whatever W&B raises is reported and ends its part, not the run: hence every Exception."""
        try:
            yield
        except Exception as error:
            self._run = None
            # Also frees the run's id for the next try. A service that has died raises once more: nothing new.
            with suppress(Exception):
                wandb.teardown(exit_code=1)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self._report("wandb_failed", doing=doing, reason=reason)


def wandb_id(run_id: str) -> str:
    """`run_id` if W&B takes it for an id as it is, else a readable form of it that is still its own."""
    if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", run_id):
        return run_id
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", run_id).strip("-")[:48]
    return f"{readable}-{hashlib.sha256(run_id.encode()).hexdigest()[:12]}"


def _modes(mode: WandbMode) -> list[str]:
    """W&B's names of the modes to try, in order."""
    online = mode is WandbMode.online or (mode is WandbMode.auto and bool(os.environ.get("WANDB_API_KEY")))
    return ["online", "offline"] if online else ["offline"]


def _start(mode: str, config: TrackingConfig, run_dir: Path, run_id: str, run_config: Mapping[str, Any]) -> wandb.Run:
    # Sample tables wait in the data directory for their upload. By default both directories are in the home directory:
    # not always writable, and not with the run when it is synced from elsewhere.
    os.environ["WANDB_DATA_DIR"] = os.environ["WANDB_CACHE_DIR"] = str(run_dir.resolve() / "wandb" / "data")
    wandb.setup(settings=wandb.Settings(silent=True))
    # Asked first, without a word to the server: `init` would prompt for a missing key and wait.
    if mode == "online" and not wandb.login(prompt=False, verify=False):
        raise wandb.errors.AuthenticationError("no key: set WANDB_API_KEY or run `wandb login`")
    run = wandb.init(
        mode=mode,  # type: ignore[arg-type]
        project=config.wandb_project,
        entity=config.wandb_entity,
        id=wandb_id(run_id),
        resume="allow",
        group=config.wandb_group,
        job_type=run_dir.name,  # the stage
        name=run_dir.parent.name if config.wandb_group else run_id,  # the group tells it from others called so
        dir=run_dir,
        config=dict(run_config),
        settings=wandb.Settings(
            silent=True,
            console="off",
            reinit="create_new",  # leaves wandb.run alone, where a run whose service died would stay for good
            save_code=False,
            init_timeout=config.wandb_init_timeout_s,
            finish_timeout=config.wandb_finish_timeout_s,
            finish_timeout_raises=True,  # so that it is reported, not only printed where nobody looks
        ),
    )
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    return run


def _table(records: Sequence[Mapping[str, Any]]) -> wandb.Table:
    """What a person reads: no token ids, and not every sample of a large step; samples.jsonl has all of it."""
    shown = [{name: value for name, value in r.items() if not isinstance(value, list)} for r in records[:MAX_ROWS]]
    columns = list(dict.fromkeys(name for record in shown for name in record))
    rows = [[_cell(record.get(name)) for name in columns] for record in shown]
    return wandb.Table(columns=[*columns], data=rows, allow_mixed_types=True)


def _cell(value: Any) -> Any:
    scalar = value is None or isinstance(value, bool | int | float | str)
    return value if scalar else json.dumps(value, ensure_ascii=False, default=str)
