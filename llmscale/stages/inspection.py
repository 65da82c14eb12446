"""`llmscale inspect RUN`: what an RLHF run has done, from its directory alone, while it goes on or later: draws and how they
ended, how old the samples were that it learned from, and what happened to it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from llmscale.errors import RunError
from llmscale.rl.ledger import DRAWS, End
from llmscale.stages.checkpoints import VerbParser
from llmscale.tracking.jsonl import EVENTS, METRICS, iter_jsonl

# Of every run. The other events say what became of this one.
ROUTINE = ("plan", "pools_up", "checkpoint", "sample_excluded", "replay", "overoptimisation")


def run(argv: Sequence[str]) -> int:
    """Returns the exit code: 1 where the account of draws does not add up."""
    parser = VerbParser(prog="llmscale inspect", description="What an RLHF run has done, from its directory alone.")
    parser.add_argument("path", metavar="RUN", type=Path, help="the directory of a run, such as runs/demo/rlhf")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    found = inspect(arguments.path)
    print(json.dumps(found, indent=1) if arguments.json else as_text(found))
    return 1 if found["draws"]["wrong"] else 0


def inspect(run_dir: Path) -> dict[str, Any]:
    """Raises: RunError when there is no RLHF run in this directory."""
    if not (run_dir / DRAWS).is_file():
        what = "this run has drawn no prompts" if run_dir.is_dir() else "there is no such run"
        fix = "Name the directory of an RLHF run, such as runs/demo/rlhf."
        raise RunError(what, where=str(run_dir), fix=fix)
    events = list(iter_jsonl(run_dir / EVENTS)) if (run_dir / EVENTS).exists() else []
    of_kind = {e["kind"]: e for e in events}  # the last of each
    version = run_dir / "weight_version"
    return {
        "run_dir": str(run_dir),
        "attempts": sum(path.name.isdigit() for path in (run_dir / "attempts").glob("*")),
        "status": _status(run_dir, events),
        "step": _last_step(run_dir),
        "max_staleness": of_kind.get("plan", {}).get("max_staleness", 0),
        "correction": of_kind.get("plan", {}).get("correction"),
        "draws": account(list(iter_jsonl(run_dir / DRAWS))),
        "versions": int(version.read_text()) if version.exists() else 0,
        "samples_excluded": sum(e["kind"] == "sample_excluded" for e in events),
        "events": [e for e in events if e["kind"] not in ROUTINE],
    }


def account(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`records`: those of draws.jsonl. `wrong`: draws that ended twice or, though later ones did, never; a run has none."""
    final = [r for r in records if r["end"] != End.requeued.value]
    times = Counter(r["draw_id"] for r in final)
    trained = [r for r in final if r["end"] == End.trained.value]
    return {
        "ended": len(times),
        **{end.value: sum(r["end"] == end.value for r in records) for end in End},
        "why": {
            end.value: dict(Counter(r["why"] for r in records if r["end"] == end.value).most_common())
            for end in (End.dropped, End.requeued)
        },
        "staleness": dict(sorted(Counter(r["staleness"] for r in trained if "staleness" in r).items())),
        "wrong": [draw for draw in range(max(times, default=-1) + 1) if times[draw] != 1],
    }


def as_text(found: Mapping[str, Any]) -> str:
    draws, attempts = found["draws"], found["attempts"]
    bound = f"at most {found['max_staleness']}"
    corrected = f", samples weighed by algorithm.correction={found['correction']}" if found["correction"] else ""
    lines = [
        f"{found['run_dir']}: {found['status']} at step {found['step']}, {attempts} attempt{'s' * (attempts != 1)}",
        "",
        f"draws: {draws['ended']:,} ended"
        + (f"; WRONG: these ended twice or never: {draws['wrong'][:10]}" if draws["wrong"] else ", each once"),
        f"  {'trained':<10}{draws['trained']:>8,}",
    ]
    for end in ("dropped", "requeued"):
        lines.append(f"  {end:<10}{draws[end]:>8,}")
        lines += [f"{'':>12}{count:>8,}  {why}" for why, count in draws["why"][end].items()]
    lines += ["", f"staleness: updates since the oldest token of a draw that was trained on, {bound}{corrected}"]
    lines += [f"  {age:<10}{count:>8,}" for age, count in draws["staleness"].items()]
    lines += ["", f"weights: {found['versions']:,} versions published; samples left out: {found['samples_excluded']:,}"]
    lines += ["", "events:" if found["events"] else "events: none"]
    return "\n".join([*lines, *(_event(e) for e in found["events"])])


def _event(event: Mapping[str, Any]) -> str:
    when = datetime.fromtimestamp(event["time_s"]).strftime("%Y-%m-%d %H:%M:%S")
    details = [f"{k}={v}".replace("\n", " ") for k, v in event.items() if k not in ("time_s", "kind")]
    return f"  {when}  {event['kind']:<18} {' '.join(details)}".rstrip()


def _status(run_dir: Path, events: Sequence[Mapping[str, Any]]) -> str:
    """How its last attempt ended, as far as it could say so."""
    last = max((i for i, e in enumerate(events) if e["kind"] == "plan"), default=0)
    said = [str(e["status"]) for e in events[last:] if e["kind"] == "finished"]
    return said[-1] if said else "going on, or killed"


def _last_step(run_dir: Path) -> int:
    path = run_dir / METRICS
    return max((int(r["step"]) for r in iter_jsonl(path)), default=0) if path.exists() else 0
