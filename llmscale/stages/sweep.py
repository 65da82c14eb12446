"""A sweep: the jobs of a grid, one after the other, each an ordinary run below the sweep's name and in a process of its
own. The same command takes it up again: finished jobs give their results, interrupted ones continue. What the jobs reached
stands in `runs/<name>/sweep.json`.
"""

from __future__ import annotations

import ctypes
import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import llmscale
from llmscale.checkpoint.durable import atomic_write_text
from llmscale.checkpoint.run_directory import open_run, read_result
from llmscale.errors import Requeue, RunError
from llmscale.stages.grid import Job, Sweep
from llmscale.stages.summary import COMPARED, compared, print_summary, print_sweep

SEED = "run.seed"
FILE = "sweep.json"
UNHEALTHY, REQUEUE, INTERRUPTED = 64, Requeue.exit_code, 130  # exit codes after which no further job is started


def run_sweep(sweep: Sweep, flags: Sequence[str]) -> int:
    """Run the jobs and print the table; returns the exit code. `flags`: options of the command line, for each job.

    Raises: RunError before anything runs, when a finished job's directory belongs to another config.
    """
    finished = {job.name: results for job in sweep.jobs if (results := _finished(job))}
    codes = dict.fromkeys(finished, 0)
    _write(sweep, codes)  # so that a place that cannot be written to is known before any job has run
    with _Child() as child:
        for number, job in enumerate(sweep.jobs, start=1):
            again = " (finished before)" if job.name in finished else ""
            print(f"job {number}/{len(sweep.jobs)}: {job.title}{again}", file=sys.stderr, flush=True)
            if again:
                print_summary(finished[job.name])
                code = 0
            else:
                code = child.run([*_program(), sweep.stage, *job.overrides, *flags])
            stop = _stop(code, child.signal)
            codes[job.name] = stop if code and stop else code
            _write(sweep, codes)
            if stop:
                break
    print_sweep(report(sweep, codes), sweep.directory / FILE)
    if stop and (code or number < len(sweep.jobs)):
        print(f"stopped at job {number}/{len(sweep.jobs)}; the same command resumes", file=sys.stderr)
        return stop
    return int(any(codes.values()))


def _finished(job: Job) -> dict[str, Any]:
    """What each stage found, if all of them are finished; opening them compares their configs."""
    if any(read_result(config.run_dir) is None for config in job.configs.values()):
        return {}
    results = {}
    for stage, config in job.configs.items():
        with closing(open_run(config.run_dir, config)) as directory:
            results[stage] = directory.result()
    return results


def _stop(code: int, signalled: int | None) -> int:
    """The exit code of a sweep that is to stop now, else 0."""
    if code in (UNHEALTHY, REQUEUE, INTERRUPTED):
        return code
    if signalled is None:
        return 0
    return INTERRUPTED if signalled == signal.SIGINT else REQUEUE


# ---------------------------------------------------------------- the process of a job


def _program() -> list[str]:
    """llmscale in this interpreter. Without -P, the working directory, where a user's files may be called anything, would
    come before every library; it must where the package is found there."""
    beside = Path(llmscale.__file__).parent.parent == Path.cwd()
    return [sys.executable, *([] if beside else ["-P"]), "-m", "llmscale.cli"]


class _Child:
    """One job's process at a time. It has this process's terminal, but a process group of its own, so that it hears of
    Ctrl-C or SIGTERM exactly once: from here. It does not outlive this process."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.signal: int | None = None  # the last one that came
        self._process: subprocess.Popen[bytes] | None = None
        self._libc = ctypes.CDLL(None)  # now: little may be done between fork and exec

    def __enter__(self) -> _Child:
        heard = [number for number in self.SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._pass_on) for number in heard}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str]) -> int:
        """Its exit code; minus the signal's number if one ended it."""
        sys.stdout.flush()
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, process_group=0, preexec_fn=self._end_with_parent
        )
        if self.signal is not None:  # it came while the process was made
            self._process.send_signal(self.signal)
        return self._process.wait()

    def _pass_on(self, number: int, frame: Any) -> None:
        self.signal = number
        if self._process is not None:
            self._process.send_signal(number)

    def _end_with_parent(self) -> None:
        pr_set_pdeathsig = 1
        self._libc.prctl(pr_set_pdeathsig, signal.SIGTERM)


# ---------------------------------------------------------------- what they reached


def _write(sweep: Sweep, codes: Mapping[str, int]) -> None:
    try:
        sweep.directory.mkdir(parents=True, exist_ok=True)
        atomic_write_text(sweep.directory / FILE, json.dumps(report(sweep, codes), indent=1) + "\n")
    except OSError as error:
        what = f"{FILE} cannot be written: {error.strerror}"
        fix = "Choose another run.dir=..., or free some space; the same command resumes."
        raise RunError(what, where=str(sweep.directory), fix=fix) from error


def report(sweep: Sweep, codes: Mapping[str, int]) -> dict[str, Any]:
    """The content of sweep.json. `codes`: exit codes of the jobs that were run. Metrics are grouped by stage."""
    jobs = [_entry(job, codes.get(job.name)) for job in sweep.jobs]
    return {
        "name": sweep.name,
        "stage": sweep.stage,
        "keys": sweep.keys,
        "jobs": jobs,
        "best": _best(jobs),
        "over_seeds": _over_seeds(jobs) if SEED in sweep.keys else [],
    }


def _entry(job: Job, code: int | None) -> dict[str, Any]:
    status = {None: "not run", 0: "done", REQUEUE: "interrupted", INTERRUPTED: "interrupted"}
    found = {stage: read_result(config.run_dir) for stage, config in job.configs.items()}
    return {
        "job": job.name,
        "values": job.values,
        "status": status.get(code, "failed"),
        "exit_code": code,
        "run_dirs": {stage: str(config.run_dir) for stage, config in job.configs.items()},
        "metrics": {stage: result["metrics"] for stage, result in found.items() if result is not None},
    }


def _best(jobs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """The job with the best value of each metric that tells jobs apart."""
    numbers = {job["job"]: compared(job["metrics"]) for job in jobs}
    best: dict[str, dict[str, str]] = {}
    for stage, metric in dict.fromkeys(key for known in numbers.values() for key in known):
        having = [name for name, known in numbers.items() if (stage, metric) in known]
        winner = COMPARED[metric](having, key=lambda name, key=(stage, metric): numbers[name][key])
        best.setdefault(stage, {})[metric] = winner
    return best


def _over_seeds(jobs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds of each combination of the other values."""
    groups: dict[str, dict[tuple[str, str], list[float]]] = {}
    for job in jobs:
        others = json.dumps({path: value for path, value in job["values"].items() if path != SEED})
        numbers = groups.setdefault(others, {})
        for key, value in compared(job["metrics"]).items():
            numbers.setdefault(key, []).append(value)
    rows = []
    for others, numbers in groups.items():
        metrics: dict[str, Any] = {}
        for (stage, metric), values in numbers.items():
            metrics.setdefault(stage, {})[metric] = _spread(values)
        rows.append({"values": json.loads(others), "metrics": metrics})
    return rows


def _spread(values: Sequence[float]) -> dict[str, float | int | None]:
    """std: of the sample, divided by n - 1; null for one value."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "n": len(values)}
