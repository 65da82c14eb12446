"""`llmscale submit STAGE launch=NAME [overrides]` and `llmscale resume RUN [overrides]`: the stage's config is composed,
checked and frozen here; what runs elsewhere is the stage's own command. `--print` and `--dry-run` touch nothing."""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from llmscale.checkpoint.durable import atomic_write_text
from llmscale.checkpoint.run_directory import claim, read_result, run_id, without_secrets
from llmscale.compose import comments, compose, nearest
from llmscale.config import STAGE, import_plugins, options
from llmscale.errors import ConfigError, RunError, UsageError
from llmscale.launch import kubernetes, local, slurm
from llmscale.launch.attempts import cancel_file
from llmscale.launch.config import KubernetesLaunch, LaunchConfig, LocalLaunch, ScriptLaunch, SlurmLaunch
from llmscale.launch.manifest import manifest, run_dir_in_pod, to_yaml
from llmscale.launch.plan import described, plan
from llmscale.launch.script import Job, local_script, slurm_script
from llmscale.launch.status import SUBMISSION, Submission, look, submission_of
from llmscale.stages.config import StageConfig

MAX_NAME = 200  # characters of a job's name
_NAME = re.compile(r"[\w.=,+-]+")


@dataclass(frozen=True)
class Request:
    """What a command line asks for."""

    stage: str
    overrides: list[str]
    launch_overrides: list[str]
    config_dir: str | None
    plugins: list[str]

    @property
    def flags(self) -> list[str]:
        folder = [] if self.config_dir is None else [f"--config-dir={self.config_dir}"]
        return [*folder, *(f"--plugin={module}" for module in self.plugins)]


def run(argv: Sequence[str]) -> int:
    """`llmscale submit`."""
    arguments = _parser().parse_intermixed_args(argv)
    stages = [name for name, o in options(STAGE).items() if issubclass(o.config, StageConfig)]
    stage, *overrides = arguments.words or [""]
    if stage not in stages:
        found = nearest(stage, stages)
        fix = f"Did you mean {found}? " if found else ""
        what = f"{stage!r} is no stage with a run of its own" if stage else "no stage is named"
        raise UsageError(what, where="submit", fix=f"{fix}There is: {', '.join(stages)}.")
    return _submit(_request(stage, overrides, arguments.config_dir, arguments.plugin), arguments)


def resume(argv: Sequence[str]) -> int:
    """`llmscale resume`: what was submitted, again, with more overrides after its own."""
    arguments = _parser("resume", "RUN is a run directory, such as runs/demo/sft.").parse_intermixed_args(argv)
    if not arguments.words:
        raise UsageError("no run is named", where="resume", fix="Write llmscale resume RUN; llmscale runs lists them.")
    path, *overrides = arguments.words
    before = submission_of(Path(path))
    if before is None:
        raise RunError("this run was not submitted", where=path, fix="Give its own command again: that resumes it.")
    os.chdir(before.folder)
    more = _request(before.stage, overrides, before.config_dir, before.plugins)
    request = Request(
        before.stage,
        [*before.overrides, *more.overrides],
        [*before.launch_overrides, *more.launch_overrides],
        before.config_dir,
        before.plugins,
    )
    return _submit(request, arguments)


def _request(stage: str, overrides: Sequence[str], config_dir: str | None, plugins: list[str]) -> Request:
    if without_secrets(overrides) != list(overrides):
        fix = "Put it into the environment, or into the file of launch.secrets_file."
        raise UsageError("a secret on the command line would be written into the job", where="submit", fix=fix)
    launch = [o for o in overrides if re.match(r"launch[.=]", o)]
    return Request(stage, [o for o in overrides if o not in launch], launch, config_dir, plugins)


def _submit(request: Request, arguments: argparse.Namespace) -> int:
    import_plugins(request.plugins)
    launch = compose("submit", request.launch_overrides, request.config_dir).launch
    plugins = [f"plugins=[{','.join(request.plugins)}]"] if request.plugins else []
    config: StageConfig = compose(request.stage, [*plugins, *request.overrides], request.config_dir)
    planned = plan(config, launch)
    run_dir = config.run_dir.absolute()
    where = run_dir
    if isinstance(launch, KubernetesLaunch):
        where = Path(run_dir_in_pod(PurePosixPath(config.run_dir), launch))
    if arguments.dry_run:
        return _print(described(planned, launch, config, where), arguments.json)
    if isinstance(launch, ScriptLaunch) and launch.secrets_file is not None:
        _check_secrets(Path(launch.secrets_file))
    touches = not arguments.print
    if touches and (found := read_result(run_dir)) is not None:
        return _finished(run_dir, config, found, arguments.json)
    if touches:
        _check_free(run_dir)
    named = claim(run_dir, config) if touches else _known_id(run_dir)
    if isinstance(launch, SlurmLaunch):
        _check_name(named)
    programs = Path(sys.executable).parent
    job = Job(request.stage, request.overrides, request.flags, Path.cwd(), programs, where, named, launch, planned)
    file, text = _native(job)
    if arguments.print:
        return _print({"script": text}, True) if arguments.json else _write(text)
    (run_dir / "launch").mkdir(exist_ok=True)
    atomic_write_text(run_dir / "launch" / file, text)
    cancel_file(run_dir).unlink(missing_ok=True)
    native = _start(job, run_dir / "launch" / file)
    submission = Submission(
        launch.name, native, socket.gethostname(), round(time.time(), 3), request.stage, request.overrides,
        request.launch_overrides, request.config_dir, request.plugins, str(Path.cwd()),
    )  # fmt: skip
    atomic_write_text(run_dir / "launch" / SUBMISSION, json.dumps(vars(submission), indent=1) + "\n")
    return _submitted(job, run_dir, native, arguments.json)


def _native(job: Job) -> tuple[str, str]:
    """The job in the language of what takes it, and what the file is called."""
    if isinstance(job.launch, KubernetesLaunch):
        return "job.yaml", to_yaml(manifest(job))
    return "job.sh", local_script(job) if isinstance(job.launch, LocalLaunch) else slurm_script(job)


def _start(job: Job, file: Path) -> str:
    """Returns its native id."""
    if isinstance(job.launch, KubernetesLaunch):
        return str(kubernetes.submit(manifest(job), job.launch.context))
    return local.start(file) if isinstance(job.launch, LocalLaunch) else slurm.sbatch(file.read_text(encoding="utf-8"))


def _check_free(run_dir: Path) -> None:
    found = look(run_dir) if (run_dir / "run.json").exists() else None
    if found is not None and found.state in ("running", "queued"):
        raise RunError(
            f"this run is {found.state} already, as {found.launch} job {found.job}",
            where=str(run_dir),
            fix=f"Wait for it, or llmscale cancel {run_dir}, or give this run another run.name=...",
        )


def _known_id(run_dir: Path) -> str:
    """A run that is not there yet has no number of its own; its name will do where a script is only shown."""
    return run_id(run_dir) if (run_dir / "run.json").exists() else "-".join(run_dir.parts[-2:])


def _check_secrets(file: Path) -> None:
    """As the job will, but before it has waited for its turn."""
    if not file.is_file():
        raise ConfigError(f"no such file: {file}", where="launch.secrets_file", fix="Name a file of NAME=value lines.")
    if file.stat().st_mode & 0o777 != 0o600:
        raise ConfigError(f"others may read {file}", where="launch.secrets_file", fix=f"chmod 600 {file}")


def _check_name(name: str) -> None:
    if len(name) > MAX_NAME:
        raise ConfigError(f"{len(name)} characters are too many for a job's name", where="run.name", fix="Shorten it.")
    if not _NAME.fullmatch(name):
        fix = "Use letters, digits and . = , + - _ alone."
        raise ConfigError(f"{name!r} cannot be the name of a job", where="run.name", fix=fix)


# ---------------------------------------------------------------- what it prints


def _print(values: dict[str, Any], as_json: bool) -> int:
    if as_json:
        print(json.dumps(values))
        return 0
    for name, value in values.items():
        for key, inner in value.items() if isinstance(value, dict) else [(None, value)]:
            shown = ", ".join(f"{k} {v}" for k, v in inner.items()) if isinstance(inner, dict) else inner
            if inner is not None:
                print(f"{name if key is None else f'{name}.{key}':<20} {shown}")
    return 0


def _write(text: str) -> int:
    sys.stdout.write(text)
    return 0


def _finished(run_dir: Path, config: StageConfig, result: dict[str, Any], as_json: bool) -> int:
    claim(run_dir, config)  # the same name with another config is refused here too
    if as_json:
        return _print({"run": str(run_dir), "state": "done", "result": result}, True)
    from llmscale.stages.summary import print_summary

    print_summary({config.stage: result})
    return 0


def _submitted(job: Job, run_dir: Path, native: str, as_json: bool) -> int:
    in_pods = isinstance(job.launch, KubernetesLaunch)
    log = job.run_dir / "attempts" if in_pods else job.run_dir / "launch" / "job.log"
    if as_json:
        place = {"run": str(run_dir), "id": job.run_id, "launch": job.launch.name, "job": native}
        return _print(place | {"log": str(log)}, True)
    shown = os.path.relpath(run_dir)
    print(f"submitted {job.run_id}: {job.launch.name} job {native}")
    print(f"  log: {log} on the volume" if in_pods else f"  log: {shown}/launch/job.log, then {shown}/attempts/")
    for command in ("status", "logs -f", "cancel"):
        verb, *flags = command.split()
        print(f"  llmscale {' '.join([verb, shown, *flags])}")
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        usage = " ".join(self.format_usage().removeprefix("usage: ").split())
        raise UsageError(message, fix=f"Write {usage}.")


def _keys(kind: type[LaunchConfig]) -> str:
    lines = [f"  launch.{name:<18} {comment}".rstrip() for name, comment in comments(kind).items() if name != "name"]
    return "\n".join([f"keys of launch={kind.name}:", *lines])


def _parser(verb: str = "submit", text: str | None = None) -> argparse.ArgumentParser:
    first = "STAGE" if verb == "submit" else "RUN"
    parser = _Parser(
        prog=f"llmscale {verb}",
        description=text
        or "STAGE and its overrides are those of `llmscale STAGE`; launch=local|slurm|kubernetes says where it runs.",
        epilog="\n\n".join(_keys(kind) for kind in (LocalLaunch, SlurmLaunch, KubernetesLaunch)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "words", nargs="*", metavar=f"{first} path=value", help="launch=NAME, launch.key=value, and the stage's"
    )
    parser.add_argument(
        "--print", action="store_true", help="print the job, for sbatch, kubectl apply -f - or bash, and do nothing"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and do nothing")
    parser.add_argument("--json", action="store_true", help="print JSON")
    if verb == "submit":
        parser.add_argument("--config-dir", help="a folder with config groups and experiments of yours")
        parser.add_argument("--plugin", action="append", default=[], help="import a module of yours first")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser
