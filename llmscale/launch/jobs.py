"""From a request to jobs: the configs of its runs are composed, checked and frozen here, written in the language of what takes
them, and handed in."""

from __future__ import annotations

import json
import re
import socket
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from llmscale.checkpoint.durable import atomic_write_text
from llmscale.checkpoint.run_directory import claim, read_result, run_id
from llmscale.compose import compose
from llmscale.errors import ConfigError, RunError, UsageError
from llmscale.launch import kubernetes, local, slurm
from llmscale.launch.attempts import cancel_file
from llmscale.launch.config import KubernetesLaunch, LaunchConfig, LocalLaunch, SlurmLaunch
from llmscale.launch.manifest import manifest, run_dir_in_pod, to_yaml
from llmscale.launch.plan import Plan, plan
from llmscale.launch.script import Job, local_script, slurm_script
from llmscale.launch.status import SUBMISSION, Submission, look
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


def runs_of(request: Request, launch: LaunchConfig, multirun: bool) -> list[Run]:
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


def job_of(run: Run, launch: LaunchConfig, named: str) -> Job:
    if isinstance(launch, SlurmLaunch):
        _check_name(named)
    asked, programs = run.request, Path(sys.executable).parent
    words = (asked.stage, asked.overrides, asked.flags)
    return Job(*words, Path.cwd(), programs, run.where(launch), named, launch, run.plan)


def batches(jobs: list[Job]) -> list[list[Job]]:
    """What is handed in together: an array of Slurm, whose jobs all want the same nodes."""
    together = bool(jobs) and isinstance(jobs[0].launch, SlurmLaunch) and all(j.plan == jobs[0].plan for j in jobs)
    return [jobs] if together else [[job] for job in jobs]


def native(batch: list[Job]) -> tuple[str, str]:
    """The jobs in the language of what takes them, and what the file is called."""
    launch = batch[0].launch
    if isinstance(launch, KubernetesLaunch):
        return "job.yaml", to_yaml(manifest(batch[0]))
    return "job.sh", local_script(batch[0]) if isinstance(launch, LocalLaunch) else slurm_script(batch)


def begin(batch: list[Job], runs: list[Run]) -> list[dict[str, Any]]:
    """Returns what became of each run."""
    name, text = native(batch)
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


def check_free(run_dir: Path) -> None:
    found = look(run_dir) if (run_dir / "run.json").exists() else None
    if found is not None and found.state in ("running", "queued"):
        raise RunError(
            f"this run is {found.state} already, as {found.launch} job {found.job}",
            where=str(run_dir),
            fix=f"Wait for it, or llmscale cancel {run_dir}, or give this run another run.name=...",
        )


def known_id(run_dir: Path) -> str:
    """A run that is not there yet has no number of its own; its name will do where a script is only shown."""
    return run_id(run_dir) if (run_dir / "run.json").exists() else "-".join(run_dir.parts[-2:])


def check_secrets(file: Path) -> None:
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


def finished(run: Run) -> dict[str, Any]:
    claim(run.dir, run.config)  # the same name with another config is refused here too
    return {"run": str(run.dir), "stage": run.config.stage, "state": "done", "result": read_result(run.dir)}
