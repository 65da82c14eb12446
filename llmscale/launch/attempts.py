"""The attempts of a run that was submitted, as its job writes them: attempts/<n>/attempt.json, and whether the job is to try
again. The job calls it on the node: `python -m llmscale.launch.attempts begin RUN JOB [NODE ...]` prints the folder of a new
attempt, `... end FOLDER CODE [why]` exits with 0 when the job goes back into the queue.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmscale.checkpoint.commit import CheckpointStore
from llmscale.checkpoint.durable import atomic_write_text
from llmscale.checkpoint.run_directory import next_attempt
from llmscale.errors import LlmscaleError, Requeue

ATTEMPT, RESULT = "attempt.json", "result.json"
CANCEL = "cancel"  # below launch/: somebody wants it to end
KILLED_BY = (128 + 10, 128 + 15)  # SIGUSR1 and SIGTERM, where they came before the program could hear them
# A command that is wrong, a cluster that has no room, a bad node, Ctrl-C: the next attempt would end the same way.
FINAL = (2, 3, 64, 130)


def begin(run: Path, job: str, nodes: Sequence[str], max_retries: int, start: str = "") -> Path:
    """`start`: which start of the job this is, where its other nodes have to find the attempt."""
    folder = next_attempt(run / "attempts")
    record = {
        "job": job,
        "nodes": list(nodes),
        "max_retries": max_retries,
        "began_s": _now_s(),
        "before": progress(run),
    }
    if start:
        record["start"] = start
    _write(folder, record)
    return folder


def end(folder: Path, code: int, why: str | None = None) -> bool:
    """Note how the attempt ended. Returns whether the job is to start the same command again."""
    run, record = folder.parent.parent, read(folder)
    asked = why == "asked"
    if asked and code in KILLED_BY:
        code = Requeue.exit_code
    after = progress(run)
    record |= {"ended_s": _now_s(), "exit_code": code, "after": after, "advanced": after > record["before"]}
    if why and not asked:
        record["why"] = why
    record["again"] = _again(run, record)
    _write(folder, record)
    return record["again"]


def _again(run: Path, record: Mapping[str, Any]) -> bool:
    if (run / RESULT).exists() or cancel_file(run).exists() or record["exit_code"] in (0, *FINAL):
        return False
    saved = record["exit_code"] == Requeue.exit_code
    if saved and record["advanced"]:
        return True
    earlier = [r for r in all_attempts(run).values() if r.get("job") == record["job"] and "exit_code" in r]
    spent = [r for r in earlier if not (r["exit_code"] == Requeue.exit_code and r["advanced"])]
    return len(spent) < record["max_retries"] and (saved or record["advanced"])


def progress(run: Path) -> list[int]:
    """[step of the newest checkpoint, bytes of the completions of a stage that has no checkpoints]."""
    newest = CheckpointStore(run / "checkpoints").checkpoints()[:1] if (run / "checkpoints").is_dir() else []
    written = run / "completions.jsonl"
    return [newest[0].step if newest else 0, written.stat().st_size if not newest and written.exists() else 0]


def all_attempts(run: Path) -> dict[int, dict[str, Any]]:
    """The record of every attempt, by number; that of a run that was not submitted is empty."""
    folders = [f for f in (run / "attempts").glob("*") if f.name.isdigit()]
    return {int(f.name): read(f) for f in sorted(folders, key=lambda f: int(f.name))}


def read(folder: Path) -> dict[str, Any]:
    file = folder / ATTEMPT
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def begun_by(run: Path, job: str, start: str) -> Path | None:
    """The attempt of this start of the job, once there is one."""
    records = all_attempts(run)
    found = [n for n, record in records.items() if (record.get("job"), record.get("start")) == (job, start)]
    return run / "attempts" / str(max(found)) if found else None


def cancel_file(run: Path) -> Path:
    return run / "launch" / CANCEL


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    atomic_write_text(folder / ATTEMPT, json.dumps(record) + "\n")


def _now_s() -> float:
    return round(time.time(), 3)


def main(arguments: Sequence[str]) -> int:
    verb, path, *rest = arguments
    if verb == "begin":
        job, max_retries, *nodes = rest
        print(begin(Path(path), job, nodes, int(max_retries)))
        return 0
    return 0 if end(Path(path), int(rest[0]), " ".join(rest[1:]) or None) else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except LlmscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
