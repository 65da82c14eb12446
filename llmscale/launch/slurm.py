"""Slurm's own commands: sbatch, scontrol, scancel. Without accounting (sacct) a job is known until some minutes after its end;
what stays is in the run directory."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass

from llmscale.errors import ClusterError

TIMEOUT_S = 60
QUEUED = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "CONFIGURING")
RUNNING = ("RUNNING", "COMPLETING", "STOPPED", "SIGNALING", "STAGE_OUT")

NEVER = (
    "PartitionConfig",
    "PartitionNodeLimit",
    "PartitionTimeLimit",
    "BadConstraints",
)  # reasons that no time changes
HOW_TO_FIT = "Change launch.*: `sinfo` lists partitions and what their nodes have."


@dataclass(frozen=True)
class JobState:
    state: str
    reason: str

    @property
    def queued(self) -> bool:
        return self.state in QUEUED

    @property
    def running(self) -> bool:
        return self.state in RUNNING


def sbatch(script: str) -> str:
    """Returns the job's id. Raises: ClusterError when Slurm is not here or refuses the job, or takes it and would let it wait
    for ever, as it does where EnforcePartLimits is off."""
    done = _run(["sbatch", "--parsable"], script)
    if done.returncode:
        lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.strip().splitlines()]
        raise ClusterError(f"Slurm refuses the job: {'; '.join(lines)}", where="launch", fix=HOW_TO_FIT)
    job = done.stdout.strip().partition(";")[0]
    known = state_of(job)
    if known is not None and known.reason in NEVER:
        scancel(job)
        what = f"no node or partition will ever have what the job asks for ({known.reason})"
        raise ClusterError(what, where="launch", fix=HOW_TO_FIT)
    return job


def state_of(job: str) -> JobState | None:
    """None when Slurm does not know it any more, or cannot be asked from here."""
    try:
        done = _run(["scontrol", "show", "job", "--oneliner", job])
    except ClusterError:
        return None
    fields = dict(re.findall(r"(JobState|Reason)=(\S+)", done.stdout))
    return JobState(fields["JobState"], fields.get("Reason", "")) if "JobState" in fields else None


def scancel(job: str, signal: str | None = None) -> None:
    """End the job and all its processes; with `signal`, send that to its script alone."""
    done = _run(["scancel", *([f"--signal={signal}", "--batch"] if signal else []), job])
    if done.returncode:
        what = f"Slurm does not cancel job {job}: {done.stderr.strip()}"
        raise ClusterError(what, fix="It may have ended: llmscale status shows it.")


def _run(command: list[str], given: str | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, input=given, capture_output=True, text=True, timeout=TIMEOUT_S)
    except FileNotFoundError as error:
        fix = "Give the command on a login node of the cluster, or choose launch=local."
        raise ClusterError(f"there is no {command[0]} here", where="launch", fix=fix) from error
    except subprocess.TimeoutExpired as error:
        raise ClusterError(
            f"{command[0]} has not answered in {TIMEOUT_S} s", where="launch", fix="Try again."
        ) from error
