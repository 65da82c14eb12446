"""Progress on stderr: a live bar on a terminal, now and then a line elsewhere. stdout is left to results."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

# The numbers worth a place on one line, in their order; those that a run logs are shown.
HEADLINES = (
    "train/loss",
    "eval/loss",
    "eval/accuracy",
    "reward/mean",
    "reward/best",
    "eval/reward/mean",
    "reward/true",
    "eval/reward/true",
    "kl/ref",
    "rollout/completion_len",
    "perf/tokens_per_s",
)
RATE_WINDOW_STEPS = 50  # the rate is that of recent steps: warm-up must not spoil the forecast for hours
REFRESH_S = 0.1


class ConsoleTracker:
    """Shows how far a run is. Call `finish` in any case: on a terminal it gives the cursor back.

    The bar is redrawn by `log` alone: a redrawing thread would be forked into data workers.
    """

    def __init__(self, every_s: float, *, title: str, total_steps: int):
        self._title, self._total_steps = title, total_steps
        self._latest: dict[str, float] = {}
        self._marks: deque[tuple[float, int]] = deque(maxlen=RATE_WINDOW_STEPS + 1)  # (time, step)
        self._start_s = time.monotonic()
        self._shown_s = -float("inf")
        self._finished = False
        self._bar: Progress | None = None
        self._every_s = every_s
        console = Console(stderr=True)
        # isatty besides: FORCE_COLOR makes rich take a log file for a terminal.
        if sys.stderr.isatty() and console.is_interactive:
            self._every_s = REFRESH_S
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
            )
            self._bar = Progress(*columns, console=console, auto_refresh=False, redirect_stdout=False)
            self._task = self._bar.add_task(title, total=total_steps or None, status="")
            self._bar.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now = time.monotonic()
        self._latest |= {name: float(metrics[name]) for name in HEADLINES if name in metrics}
        if not self._marks or step > self._marks[-1][1]:
            self._marks.append((now, step))
        if now - self._shown_s < self._every_s and step < self._total_steps:
            return
        self._shown_s = now
        status = "  ".join(filter(None, (self._pace(step), self._headline())))
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=status, refresh=True)
        else:
            self._print(f"{self._title}: step {step}/{self._total_steps}  {status}")

    def samples(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Samples are read in samples.jsonl or in W&B."""

    def event(self, kind: str, **details: Any) -> None:
        self._print(" ".join([f"{self._title}: {kind}", *(f"{name}={value}" for name, value in details.items())]))

    def finish(self, status: str) -> None:
        if self._finished:  # a driver says it again when the rank that trains has said it
            return
        self._finished = True
        if self._bar is not None:
            self._bar.stop()
        at = f"step {self._marks[-1][1]}/{self._total_steps}" if self._marks else "no step"
        elapsed = _duration(time.monotonic() - self._start_s)
        self._print("  ".join(filter(None, (f"{self._title}: {status} at {at} after {elapsed}", self._headline()))))

    def _print(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(Text(line), soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def _pace(self, step: int) -> str:
        """Rate and time left, once two steps have been seen."""
        (first_s, first), (last_s, last) = self._marks[0], self._marks[-1]
        if last == first or last_s <= first_s:
            return ""
        step_s = (last_s - first_s) / (last - first)
        rate = f"{1 / step_s:.3g} steps/s" if step_s < 1 else f"{step_s:.3g} s/step"
        left = max(self._total_steps - step, 0)
        return f"{rate}  {_duration(left * step_s)} left" if left else rate

    def _headline(self) -> str:
        return "  ".join(f"{name} {_number(self._latest[name])}" for name in HEADLINES if name in self._latest)


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
