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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
from llmscale.launch.plan import Plan, described, plan
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


@dataclass(frozen=True)
class Run:
    """One run that is asked for: of a sweep there are several."""

    request: Request
    config: StageConfig
    plan: Plan

    @property
    def dir(self) -> Path:
        return self.config.run_dir.absolute()

    def where(self, launch: LaunchConfig) -> Path:
        """Its directory, as the job sees it."""
        if isinstance(launch, KubernetesLaunch):
            return Path(run_dir_in_pod(PurePosixPath(self.config.run_dir), launch))
        return self.dir


def _submit(request: Request, arguments: argparse.Namespace) -> int:
    import_plugins(request.plugins)
    launch = compose("submit", request.launch_overrides, request.config_dir).launch
    runs = _runs(request, launch, arguments.multirun)
    if arguments.dry_run:
        return _show(
            [described(run.plan, launch, run.config, run.where(launch)) for run in runs], arguments, _print_plan
        )
    if isinstance(launch, ScriptLaunch) and launch.secrets_file is not None:
        _check_secrets(Path(launch.secrets_file))
    if arguments.print:
        batches = _batches([_job(run, launch, _known_id(run.dir)) for run in runs])
        if isinstance(launch, SlurmLaunch) and len(batches) > 1:
            fix = "Leave out --print, or print them one by one."
            raise UsageError("the jobs want different nodes, so they are no array", where="submit -m", fix=fix)
        return _show([{"script": text} for _, text in map(_native, batches)], arguments, _print_script)
    found = [_finished(run) for run in runs if read_result(run.dir) is not None]
    left = [run for run in runs if read_result(run.dir) is None]
    for run in left:
        _check_free(run.dir)
    jobs = [_job(run, launch, claim(run.dir, run.config)) for run in left]
    by_job = {job.run_id: run for job, run in zip(jobs, left, strict=True)}
    for batch in _batches(jobs):
        found += _begin(batch, [by_job[job.run_id] for job in batch])
    return _show(found, arguments, _print_run)


def _runs(request: Request, launch: LaunchConfig, multirun: bool) -> list[Run]:
    plugins = [f"plugins=[{','.join(request.plugins)}]"] if request.plugins else []
    overrides = [*plugins, *request.overrides]
    if not multirun:
        config: StageConfig = compose(request.stage, overrides, request.config_dir)
        return [Run(request, config, plan(config, launch))]
    if isinstance(launch, LocalLaunch):
        fix = f"Leave out `submit` and launch=local: llmscale {request.stage} -m runs them."
        raise UsageError("on one machine the jobs of a sweep take turns", where="launch", fix=fix)
    from llmscale.stages.grid import compose_sweep

    sweep = compose_sweep(request.stage, overrides, request.config_dir)
    own = [(job.overrides[len(plugins) :], job.configs[request.stage]) for job in sweep.jobs]
    return [Run(replace(request, overrides=words), config, plan(config, launch)) for words, config in own]


def _job(run: Run, launch: LaunchConfig, named: str) -> Job:
    if isinstance(launch, SlurmLaunch):
        _check_name(named)
    asked, programs = run.request, Path(sys.executable).parent
    words = (asked.stage, asked.overrides, asked.flags)
    return Job(*words, Path.cwd(), programs, run.where(launch), named, launch, run.plan)


def _batches(jobs: list[Job]) -> list[list[Job]]:
    """What is handed in together: an array of Slurm, whose jobs all want the same nodes."""
    together = bool(jobs) and isinstance(jobs[0].launch, SlurmLaunch) and all(j.plan == jobs[0].plan for j in jobs)
    return [jobs] if together else [[job] for job in jobs]


def _native(batch: list[Job]) -> tuple[str, str]:
    """The jobs in the language of what takes them, and what the file is called."""
    launch = batch[0].launch
    if isinstance(launch, KubernetesLaunch):
        return "job.yaml", to_yaml(manifest(batch[0]))
    return "job.sh", local_script(batch[0]) if isinstance(launch, LocalLaunch) else slurm_script(batch)


def _begin(batch: list[Job], runs: list[Run]) -> list[dict[str, Any]]:
    """Returns what became of each run."""
    name, text = _native(batch)
    for run in runs:
        (run.dir / "launch").mkdir(exist_ok=True)
        atomic_write_text(run.dir / "launch" / name, text)
        cancel_file(run.dir).unlink(missing_ok=True)
    first = _start(batch[0], runs[0].dir / "launch" / name)
    natives = [first] if len(batch) == 1 else [f"{first}_{number}" for number in range(len(batch))]
    return [_noted(job, run, native) for job, run, native in zip(batch, runs, natives, strict=True)]


def _start(job: Job, file: Path) -> str:
    """Returns its native id."""
    if isinstance(job.launch, KubernetesLaunch):
        return str(kubernetes.submit(manifest(job), job.launch.context))
    return local.start(file) if isinstance(job.launch, LocalLaunch) else slurm.sbatch(file.read_text(encoding="utf-8"))


def _noted(job: Job, run: Run, native: str) -> dict[str, Any]:
    request = run.request
    submission = Submission(
        job.launch.name, native, socket.gethostname(), round(time.time(), 3), request.stage, request.overrides,
        request.launch_overrides, request.config_dir, request.plugins, str(Path.cwd()),
    )  # fmt: skip
    atomic_write_text(run.dir / "launch" / SUBMISSION, json.dumps(vars(submission), indent=1) + "\n")
    in_pods = isinstance(job.launch, KubernetesLaunch)
    log = job.run_dir / "attempts" if in_pods else job.run_dir / "launch" / "job.log"
    return {"run": str(run.dir), "id": job.run_id, "launch": job.launch.name, "job": native, "log": str(log)}


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


def _show(found: list[dict[str, Any]], arguments: argparse.Namespace, write: Callable[[dict[str, Any]], None]) -> int:
    if arguments.json:
        print(json.dumps(found if arguments.multirun else found[0]))
    else:
        for values in found:
            write(values)
    return 0


def _print_plan(values: dict[str, Any]) -> None:
    for name, value in values.items():
        for key, inner in value.items() if isinstance(value, dict) else [(None, value)]:
            shown = ", ".join(f"{k} {v}" for k, v in inner.items()) if isinstance(inner, dict) else inner
            if inner is not None:
                print(f"{name if key is None else f'{name}.{key}':<20} {shown}")


def _print_script(values: dict[str, Any]) -> None:
    sys.stdout.write(values["script"])


def _finished(run: Run) -> dict[str, Any]:
    claim(run.dir, run.config)  # the same name with another config is refused here too
    return {"run": str(run.dir), "stage": run.config.stage, "state": "done", "result": read_result(run.dir)}


def _print_run(values: dict[str, Any]) -> None:
    if "result" in values:
        from llmscale.stages.summary import print_summary

        print_summary({values["stage"]: values["result"]})
        return
    shown = os.path.relpath(values["run"])
    print(f"submitted {values['id']}: {values['launch']} job {values['job']}")
    in_pods = values["launch"] == KubernetesLaunch.name
    print(
        f"  log: {values['log']} on the volume" if in_pods else f"  log: {shown}/launch/job.log, then {shown}/attempts/"
    )
    for command in ("status", "logs -f", "cancel"):
        verb, *flags = command.split()
        print(f"  llmscale {' '.join([verb, shown, *flags])}")


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
    parser.set_defaults(multirun=False)
    if verb == "submit":
        parser.add_argument(
            "-m", "--multirun", action="store_true", help="a job for each combination of several values"
        )
        parser.add_argument("--config-dir", help="a folder with config groups and experiments of yours")
        parser.add_argument("--plugin", action="append", default=[], help="import a module of yours first")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser
