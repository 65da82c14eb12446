"""`llmscale checkpoint`: looking at the checkpoints of a run, checking, pinning and exporting them. A run may go on training
meanwhile. Only `export` loads torch."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

from llmscale.checkpoint.commit import CheckpointStore, is_pinned, pin, unpin
from llmscale.checkpoint.durable import commit_directory
from llmscale.checkpoint.manifest import MANIFEST, Checkpoint, Manifest, read_manifest, verify, verify_names
from llmscale.config import load
from llmscale.errors import CheckpointError, RunError, UsageError

if TYPE_CHECKING:
    from llmscale.models.loading import Model


def run(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    arguments = _parser().parse_args(argv)
    return arguments.run(arguments)


class VerbParser(argparse.ArgumentParser):
    """Of a verb's arguments."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, fix=f"Write {self.format_usage().removeprefix('usage: ').strip()}.")


def _parser() -> argparse.ArgumentParser:
    parser = VerbParser(prog="llmscale checkpoint", description="RUN is the directory of a run, such as runs/demo/sft.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, function: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.set_defaults(run=function)
        added.add_argument("path", metavar="RUN", type=Path, help="or its checkpoints/")
        added.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return added

    listed = verb("list", _list, "what there is, the newest first; reads names and sizes only")
    verified = verb("verify", _verify, "read every byte of the newest checkpoint; exit code 1 when it is broken")
    verified.add_argument("--all", action="store_true", help="of every checkpoint")
    for printing in (listed, verified):
        printing.add_argument("--json", action="store_true", help="print JSON")
    exported = verb("export", _export, "write the model of a checkpoint as a Hugging Face folder")
    exported.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    exported.add_argument("--step", type=int, help="default: the newest that is valid")
    for name, function, text in (
        ("pin", _pin, "never remove a checkpoint"),
        ("unpin", _unpin, "let a checkpoint go when its time comes"),
    ):
        verb(name, function, text).add_argument("step", metavar="STEP", type=int)
    return parser


# ---------------------------------------------------------------- list


@dataclass
class Row:
    """A checkpoint as `list` shows it."""

    step: int
    path: str
    age_s: float
    bytes: int | None
    score: float | None
    pinned: bool
    complete: bool  # every file is there with its size
    problem: str | None


def _list(arguments: argparse.Namespace) -> int:
    rows = [_row(c) for c in _store(arguments.path).checkpoints()]
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    elif not rows:
        print("no checkpoint yet")
    else:
        _print_table(rows)
    return 0


def _row(checkpoint: Checkpoint) -> Row:
    manifest: Manifest | None = None
    problem = None
    try:
        manifest = read_manifest(checkpoint)
        verify_names(checkpoint)
    except CheckpointError as error:
        problem = error.what
    dated = next((p for p in (checkpoint.path / MANIFEST, checkpoint.path) if p.exists()), None)
    return Row(
        step=checkpoint.step,
        path=str(checkpoint.path),
        age_s=round(time.time() - dated.stat().st_mtime, 1) if dated else 0.0,
        bytes=manifest.num_bytes if manifest else None,
        score=manifest.score if manifest else None,
        pinned=is_pinned(checkpoint.path),
        complete=problem is None,
        problem=problem,
    )


def _print_table(rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in ("step", "age", "size", "score", "pinned", "files"):
        table.add_column(name, justify="left" if name in ("pinned", "files") else "right")
    for row in rows:
        size = "" if row.bytes is None else _size(row.bytes)
        score = "" if row.score is None else f"{row.score:.6g}"
        pinned = "pinned" if row.pinned else ""
        table.add_row(str(row.step), _age(row.age_s), size, score, pinned, row.problem or "complete")
    Console().print(table)


def _size(num_bytes: int) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000  # type: ignore[assignment]
    return f"{num_bytes:.3g} GB"


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


# ---------------------------------------------------------------- verify


def _verify(arguments: argparse.Namespace) -> int:
    checkpoints = _store(arguments.path).checkpoints()
    if not checkpoints:
        raise CheckpointError("there is no checkpoint", where=str(arguments.path))
    results = []
    for checkpoint in checkpoints if arguments.all else checkpoints[:1]:
        started, problem, num_bytes = time.perf_counter(), None, None
        try:
            num_bytes = verify(checkpoint).num_bytes
        except CheckpointError as error:
            if not checkpoint.path.exists():
                continue  # the run has removed it meanwhile
            problem = error.what
        seconds = round(time.perf_counter() - started, 3)
        results.append({"step": checkpoint.step, "path": str(checkpoint.path), "valid": problem is None})
        results[-1] |= {"problem": problem, "bytes": num_bytes, "seconds": seconds}
        if not arguments.json:
            said = f"broken: {problem}" if num_bytes is None else f"valid, {_size(num_bytes)} in {seconds:.2g} s"
            print(f"{checkpoint.path}: {said}", flush=True)
    if arguments.json:
        print(json.dumps(results, indent=1))
    return 0 if all(result["valid"] for result in results) else 1


# ---------------------------------------------------------------- pin, unpin


def _pin(arguments: argparse.Namespace) -> int:
    return _change(arguments, pin, "pinned")


def _unpin(arguments: argparse.Namespace) -> int:
    return _change(arguments, unpin, "no longer pinned")


def _change(arguments: argparse.Namespace, change: Callable[[Path], None], done: str) -> int:
    checkpoint = _of_step(_store(arguments.path), arguments.step)
    try:
        change(checkpoint.path)
    except OSError as error:
        raise CheckpointError(f"cannot write into it: {error.strerror}", where=str(checkpoint.path)) from error
    print(f"{checkpoint.path}: {done}")
    return 0


# ---------------------------------------------------------------- export


def _export(arguments: argparse.Namespace) -> int:
    run_dir, out = arguments.path, arguments.out
    if not (run_dir / "config.yaml").is_file():
        fix = "Name a run directory, such as runs/demo/sft: its config says what model it is."
        raise RunError("this is no run directory (no config.yaml)", where=str(run_dir), fix=fix)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError("there is something already", where=str(out), fix="Name a new folder.")
    store = _store(run_dir)
    if arguments.step is None:
        checkpoint = store.newest_valid(lambda path, why: print(f"passing over {path}: {why}", file=sys.stderr))
        if checkpoint is None:
            raise CheckpointError("there is no checkpoint", where=str(run_dir))
    else:
        checkpoint = _of_step(store, arguments.step)
        verify(checkpoint)  # nothing is unpickled before
    _write_model(run_dir, checkpoint, out)
    print(f"{out}: the model of step {checkpoint.step}")
    return 0


def _write_model(run_dir: Path, checkpoint: Checkpoint, out: Path) -> None:
    from llmscale.checkpoint.run_state import read_states
    from llmscale.engine.saved import saved_buckets
    from llmscale.models.adapters import FrozenBase
    from llmscale.models.export import SHARD_BYTES, save_hf
    from llmscale.models.loading import load_tokenizer
    from llmscale.objectives.config import JUDGES

    config = _config(run_dir / "config.yaml")
    has_model = (run_dir / "hf" / "config.json").is_file()
    own = next((folder for folder in (run_dir / "hf", run_dir / "tokenizer") if folder.is_dir()), None)
    tokenizer = load_tokenizer(str(own or config.model.tokenizer or config.model.path))
    model = _without_weights(config, str(run_dir / "hf") if has_model else config.model.path, tokenizer)
    if config.stage == "reward" and not has_model:
        model.hf.config.judges = JUDGES[config.objective.reads]
        if model.hf.config.judges == "completions":
            print("note: the scores are not standardised; a run that finishes measures their scale", file=sys.stderr)
    if model.adapter is not None:
        FrozenBase(str(config.model.path)).load_state_dict(read_states(checkpoint.path)["base"])
    source = checkpoint.path / "policy" if config.stage == "rlhf" else checkpoint.path
    buckets = saved_buckets(source, model, SHARD_BYTES)
    try:
        commit_directory(out, lambda partial: save_hf(model, tokenizer, partial, buckets))
    except OSError as error:
        fix = "Choose a place that this user can write to and that has free space."
        raise RunError(f"the model cannot be written: {error}", where=str(out), fix=fix) from error


def _config(file: Path) -> Any:
    try:
        return load(file)
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        what = f"this is not a config of this version: {type(error).__name__}: {error}"
        raise RunError(what, where=str(file), fix="Use the version that run.json names.") from error


def _without_weights(config: Any, path: str | None, tokenizer: Any) -> Model:
    """The run's model as far as an export needs it: with values of what no checkpoint holds, which is what is no parameter,
    and the base of an adapter."""
    from llmscale.models.adapters import adapted
    from llmscale.models.export import persistent_buffers
    from llmscale.models.loading import load_language_model, load_scalar_model, new_language_model

    def model(empty: bool) -> Model:
        if path is None:
            return new_language_model(config.model, tokenizer, config.run.seed, empty=empty)
        load_model = load_scalar_model if config.stage == "reward" else load_language_model
        return load_model(path, config.model.dropout, empty=empty)

    if config.model.adapter is not None:
        base = load_language_model(str(config.model.path), config.model.dropout)
        return adapted(base, config.model.adapter, config.run.seed)
    found = model(empty=True)
    return model(empty=False) if persistent_buffers(found) else found


# ---------------------------------------------------------------- finding


def _store(path: Path) -> CheckpointStore:
    """Of a run directory, or of its folder of checkpoints."""
    if (path / "checkpoints").is_dir():
        return CheckpointStore(path / "checkpoints")
    store = CheckpointStore(path)
    if (path / "config.yaml").is_file() or store.checkpoints():
        return store
    what = "this is no run directory" if path.exists() else "there is no such run"
    raise RunError(what, where=str(path), fix="Name the directory of a run, such as runs/demo/sft.")


def _of_step(store: CheckpointStore, step: int) -> Checkpoint:
    there = store.checkpoints()
    found = next((checkpoint for checkpoint in there if checkpoint.step == step), None)
    if found is None:
        fix = f"There is: {', '.join(str(c.step) for c in there)}." if there else None
        raise CheckpointError(f"there is no checkpoint of step {step}", where=str(store.directory), fix=fix)
    return found
