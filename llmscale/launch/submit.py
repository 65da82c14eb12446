"""`llmscale submit STAGE launch=NAME [overrides]` and `llmscale resume RUN [overrides]`: what runs elsewhere is the stage's own
command. `--print` and `--dry-run` touch nothing."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmscale.checkpoint.run_directory import claim, read_result, without_secrets
from llmscale.compose import comments, compose, nearest
from llmscale.config import STAGE, import_plugins, options
from llmscale.errors import RunError, UsageError
from llmscale.launch.config import KubernetesLaunch, LaunchConfig, LocalLaunch, ScriptLaunch, SlurmLaunch
from llmscale.launch.jobs import (
    Request,
    batches,
    begin,
    check_free,
    check_secrets,
    finished,
    job_of,
    known_id,
    native,
    runs_of,
)
from llmscale.launch.plan import described
from llmscale.launch.status import submission_of
from llmscale.launch.verbs import Parser
from llmscale.stages.config import StageConfig


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
    runs = runs_of(request, launch, arguments.multirun)
    if arguments.dry_run:
        return _show(
            [described(run.plan, launch, run.config, run.where(launch)) for run in runs], arguments, _print_plan
        )
    if isinstance(launch, ScriptLaunch) and launch.secrets_file is not None:
        check_secrets(Path(launch.secrets_file))
    if arguments.print:
        handed_in = batches([job_of(run, launch, known_id(run.dir)) for run in runs])
        if isinstance(launch, SlurmLaunch) and len(handed_in) > 1:
            fix = "Leave out --print, or print them one by one."
            raise UsageError("the jobs want different nodes, so they are no array", where="submit -m", fix=fix)
        return _show([{"script": text} for _, text in map(native, handed_in)], arguments, _print_script)
    found = [finished(run) for run in runs if read_result(run.dir) is not None]
    left = [run for run in runs if read_result(run.dir) is None]
    for run in left:
        check_free(run.dir)
    jobs = [job_of(run, launch, claim(run.dir, run.config)) for run in left]
    by_job = {job.run_id: run for job, run in zip(jobs, left, strict=True)}
    for batch in batches(jobs):
        found += begin(batch, [by_job[job.run_id] for job in batch])
    return _show(found, arguments, _print_run)


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


def _keys(kind: type[LaunchConfig]) -> str:
    lines = [f"  launch.{name:<18} {comment}".rstrip() for name, comment in comments(kind).items() if name != "name"]
    return "\n".join([f"keys of launch={kind.name}:", *lines])


def _parser(verb: str = "submit", text: str | None = None) -> argparse.ArgumentParser:
    first = "STAGE" if verb == "submit" else "RUN"
    text = (
        text
        or "STAGE and its overrides are those of `llmscale STAGE`; launch=local|slurm|kubernetes says where it runs."
    )
    parser = Parser(verb, text, epilog="\n\n".join(map(_keys, (LocalLaunch, SlurmLaunch, KubernetesLaunch))))
    parser.add_argument(
        "words", nargs="*", metavar=f"{first} path=value", help="launch=NAME, launch.key=value, and the stage's"
    )
    parser.add_argument(
        "--print", action="store_true", help="print the job, for sbatch, kubectl apply -f - or bash, and do nothing"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and do nothing")
    parser.set_defaults(multirun=False)
    if verb == "submit":
        parser.add_argument(
            "-m", "--multirun", action="store_true", help="a job for each combination of several values"
        )
        parser.add_argument("--config-dir", help="a folder with config groups and experiments of yours")
        parser.add_argument("--plugin", action="append", default=[], help="import a module of yours first")
    return parser
