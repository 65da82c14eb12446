"""The run directory. It is named by the run, not by the time: the same command resumes, the same name with another
config is refused with the difference, and a finished run has its result at hand.

    config.yaml   the frozen config            result.json   exists when the run is finished
    run.json      schema version, origin       .lock         held by the driver as long as it lives
    checkpoints/  hf/  attempts/<n>/
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import yaml

from llmscale import __version__
from llmscale.checkpoint.durable import atomic_write_text
from llmscale.config import difference, to_yaml
from llmscale.errors import RunError

SCHEMA_VERSION = 1
ATTEMPT_DIR = "LLMSCALE_ATTEMPT_DIR"  # in the environment: the folder of this attempt, which has been made already
RUN_ID = "LLMSCALE_RUN_ID"  # in the environment: the id of a run that was claimed on another machine
# What a run may take up again with another value of: results do not depend on it.
MAY_CHANGE = (
    "tracking.",
    "cluster.",
    "chaos",
    "data.cache_dir",
    "training.keep_checkpoints",
    "training.keep_best",
    "training.save_every_steps",
)
_SECRET = re.compile(r"(?i)((?<![a-z0-9])(?:token|secret|password|key)[\"']?\s*[=:]\s*).+", re.DOTALL)
_SECRET_FLAG = re.compile(r"(?i)-.*(?<![a-z0-9])(?:token|secret|password|key)")
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+(?=@)")


@dataclass
class RunDirectory:
    """An opened run. Nobody else can open it until `close`, or until this object or its process (and what that
    forked) is gone: keep it."""

    path: Path
    attempt_dir: Path  # attempts/<n>: logs of this opening
    lock: IO[str]

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def hf(self) -> Path:
        return self.path / "hf"

    def result(self) -> dict[str, Any] | None:
        """What `finish` was given; None as long as the run is not finished."""
        return read_result(self.path)

    def finish(self, result: dict[str, Any]) -> None:
        with _explaining(self.path):
            atomic_write_text(self.path / "result.json", json.dumps(result, indent=1) + "\n")

    def close(self) -> None:
        self.lock.close()


def open_run(directory: Path, config: Any) -> RunDirectory:
    """Create the run or resume it. The driver, or rank 0, calls this; other processes only need the paths.

    Raises: RunError when the directory cannot be written, is in use, or belongs to another config.
    """
    with _explaining(directory), ExitStack() as on_failure:
        directory.mkdir(parents=True, exist_ok=True)
        lock = on_failure.enter_context(_lock(directory))
        _claim(directory, config)
        attempt_dir = _given_attempt(directory / "attempts") or next_attempt(directory / "attempts")
        on_failure.pop_all()
        return RunDirectory(directory, attempt_dir, lock)


def claim(directory: Path, config: Any) -> str:
    """Freeze the config of a run that is to be started elsewhere; returns the run's id.

    Raises: as `open_run`.
    """
    with _explaining(directory):
        directory.mkdir(parents=True, exist_ok=True)
        with _lock(directory):
            _claim(directory, config)
        return run_id(directory)


def run_once(directory: Path, config: Any, work: Callable[[RunDirectory], dict[str, Any]]) -> dict[str, Any]:
    """Start a run of one process, resume it, or return what it found when it was finished."""
    with closing(open_run(directory, config)) as run:
        found = run.result()
        if found is None:
            found = work(run)
            run.finish(found)
        return found


@contextmanager
def _explaining(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"the run directory cannot be used: {error.strerror} ({error.filename or directory})",
            where=str(directory),
            fix="Choose a place that this user can write to and that has free space.",
        ) from error


def _lock(directory: Path) -> IO[str]:
    file = (directory / ".lock").open("a+", encoding="utf-8")
    try:
        _take(file)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise RunError(
            f"another process ({holder}) is using this run",
            where=str(directory),
            fix="Wait for it or end it, or give this run another run.name=...",
        ) from error
    except OSError as error:
        file.close()
        raise RunError(
            f"the run directory cannot be locked: {error.strerror}",
            where=str(directory),
            fix="Use a file system with flock (Lustre: mounted with -o flock).",
        ) from error
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _take(file: IO[str]) -> None:
    """`is_locked`, which may look at this moment, holds the lock for microseconds. Raises: BlockingIOError."""
    for patience_s in (0.05, 0.2):
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(patience_s)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_locked(file: Path) -> bool:
    """Whether a living process, on whatever host that shares the file system, holds this lock."""
    try:
        with file.open(encoding="utf-8") as opened:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is none, or it is not ours to look at
        return False
    return False


def holder(directory: Path) -> tuple[int, str] | None:
    """(pid, host) of the driver that holds the run; None when nobody does."""
    if not is_locked(directory / ".lock"):
        return None
    found = re.fullmatch(r"pid (\d+) on (\S+)\s*", (directory / ".lock").read_text(encoding="utf-8"))
    return (int(found[1]), found[2]) if found else None


def wait_for_writer(directory: Path, timeout_s: float) -> IO[str]:
    """The lock of whoever trains and writes on behalf of a driver. The workers of a driver that was killed live on for some
    seconds and still write; the next attempt waits here until they are gone.

    Raises: RunError after `timeout_s`.
    """
    file = (directory / ".writer.lock").open("a+", encoding="utf-8")
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                file.close()
                what = f"the workers of an earlier attempt still write here after {timeout_s:.0f} s"
                raise RunError(what, where=str(directory), fix="End them, then give the same command.") from error
            time.sleep(0.1)


def _claim(directory: Path, config: Any) -> None:
    """Write run.json and config.yaml on first use, else compare. config.yaml comes last: with it, both are there."""
    frozen = directory / "config.yaml"
    if not frozen.exists():
        atomic_write_text(directory / "run.json", json.dumps(_origin(directory), indent=1) + "\n")
        atomic_write_text(frozen, to_yaml(config))
        return
    schema = _schema_version(directory / "run.json")
    if schema != SCHEMA_VERSION:
        raise RunError(
            f"the run directory has schema version {schema}, this program uses {SCHEMA_VERSION}",
            where=str(directory),
            fix="Resume with the llmscale version that run.json names, or give this run another run.name=...",
        )
    try:
        old = yaml.safe_load(frozen.read_text(encoding="utf-8"))
        new = yaml.safe_load(to_yaml(config))  # through YAML on both sides: a tuple reads back as a list
        differs = difference(old, new)
        changed = [line for line in differs if not line.startswith(MAY_CHANGE)]
    except (yaml.YAMLError, AttributeError) as error:
        raise RunError(f"this is not a frozen config: {error}", where=str(frozen), fix=_ANOTHER_NAME) from error
    if differs and not changed:
        atomic_write_text(frozen, to_yaml(config))
    elif changed and not _has_begun(directory):  # a first try that a typo stopped must not claim the name
        shutil.rmtree(directory / "tokenizer", ignore_errors=True)  # it may be of other data
        atomic_write_text(frozen, to_yaml(config))
    elif changed:
        listed = "\n".join(f"    {line}" for line in changed[:10])
        more = f"\n    and {len(changed) - 10} more" if len(changed) > 10 else ""
        raise RunError(
            f"this run was started with another config:\n{listed}{more}", where=str(directory), fix=_ANOTHER_NAME
        )


def _has_begun(directory: Path) -> bool:
    """Whether there is anything that was trained or measured."""
    metrics = directory / "metrics.jsonl"
    return any((directory / name).exists() for name in ("checkpoints", "hf", "result.json")) or (
        metrics.exists() and metrics.stat().st_size > 0
    )


_ANOTHER_NAME = "Give this run another run.name=..., or remove the directory."


def _origin(directory: Path) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "id": os.environ.get(RUN_ID) or f"{'-'.join(directory.parts[-2:])}-{secrets.token_hex(3)}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "llmscale": __version__,
        "command": without_secrets(sys.argv),
    }


def read_result(directory: Path) -> dict[str, Any] | None:
    """What the run in `directory` found; None as long as it is not finished."""
    file = directory / "result.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def run_id(directory: Path) -> str:
    """One name for the run everywhere, kept over all its attempts: readable, and unlike that of any other run of the
    same name elsewhere (they may share a W&B project)."""
    return str(json.loads((directory / "run.json").read_text(encoding="utf-8"))["id"])


def _schema_version(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))["schema_version"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return "unknown"


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """A command line that can be shown. Whatever follows a secret's name in an argument goes, as does the argument
    after a flag with such a name, and the user part of a URL."""
    shown: list[str] = []
    previous = ""
    for argument in arguments:
        if _SECRET_FLAG.fullmatch(previous):
            shown.append("<redacted>")
        else:
            shown.append(_CREDENTIALS.sub("<redacted>", _SECRET.sub(r"\1<redacted>", argument)))
        previous = argument
    return shown


def _given_attempt(attempts: Path) -> Path | None:
    """The attempt that whoever launched this process has opened for it, where there is one."""
    given = Path(os.environ.get(ATTEMPT_DIR, "/")).resolve()
    return given if given.parent == attempts.resolve() and given.is_dir() else None


def next_attempt(attempts: Path) -> Path:
    """A new folder attempts/<n>."""
    attempts.mkdir(exist_ok=True)
    numbers = [int(path.name) for path in attempts.iterdir() if path.name.isdigit()]
    attempt = attempts / str(max(numbers, default=0) + 1)
    attempt.mkdir()
    return attempt
