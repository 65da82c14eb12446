"""The script of a job: what Slurm's first node, or a detached shell of this machine, runs. It is written to be read, and holds
nothing that is secret.

    begin an attempt | ask every node whether it is well | start the stage's own command | wait; pass a signal on | end the
    attempt, which says whether to try again

In the texts below `@{name}` is replaced; everything else is the shell's own.
"""

from __future__ import annotations

import json
import shlex
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmscale.launch.config import Container, LaunchConfig, ScriptLaunch, SlurmLaunch
from llmscale.launch.plan import Plan


@dataclass(frozen=True)
class Job:
    """A stage's command, where it is given, and how."""

    stage: str
    overrides: list[str]  # of the stage
    flags: list[str]  # --config-dir, --plugin
    folder: Path  # the working directory
    programs: Path  # where llmscale and python are, in that folder's environment
    run_dir: Path  # absolute, and as the job sees it
    run_id: str
    launch: LaunchConfig
    plan: Plan

    @property
    def command(self) -> list[str]:
        return ["llmscale", self.stage, *self.overrides, *self.flags]


HEAD = """#!/usr/bin/env bash
# @{what}, written by `llmscale submit`.
@{directives}set -uo pipefail
@{which}
export PATH=@{environment}:$PATH
cd @{folder} && mkdir -p "$run/launch" "$run/attempts" || exit 64
exec >>"$run/launch/job.log" 2>&1
[ -e "$run/result.json" ] && exit 0 # it is done
[ -e "$run/launch/cancel" ] && echo "cancelled; llmscale resume goes on with it" && exit 0 # Slurm may start it by itself
"""

SECRETS = """secrets=@{file}
[ "$(stat -c %a "$secrets")" = 600 ] || { echo "$secrets: only you may read it: chmod 600" && exit 2; }
set -a
# shellcheck source=/dev/null
. "$secrets"
set +a
"""

WAIT = """code=1
while kill -0 "$step" 2>/dev/null; do # a signal to this shell ends a wait, not the step
    wait "$step"
    code=$?
done
wait "$step" 2>/dev/null # again, where it ended while the signal came
again=$?
[ "$again" = 127 ] || code=$again
"""

LOCAL = """exec 9>"$run/launch/lock"
flock --wait 2 9 || exit 2 # held as long as this runs, and by nothing else but a glance of `status`

step="" asked=""
# shellcheck disable=SC2317,SC2329 # the trap calls it
stop() { # the run is cancelled: save, and leave
    asked=asked
    [ -z "$step" ] || kill -TERM "$step" 2>/dev/null
}
trap stop TERM USR1

while :; do
    attempt=$(@{attempts} begin "$run" "local-$$" @{max_retries} "$(hostname)" 9>&-) || exit 2
    export LLMSCALE_ATTEMPT_DIR=$attempt
    "${command[@]}" >"$attempt/driver-$(hostname).log" 2>&1 9>&- &
    step=$!
    @{wait}
    @{attempts} end "$attempt" "$code" "$asked" 9>&- || exit "$code"
done
"""

SLURM = """mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((20000 + SLURM_JOB_ID % 10000))
job=$SLURM_JOB_ID # a task of an array by its number there: the last one has the array's own id, which stands for all of them
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

step="" asked=""
# shellcheck disable=SC2317,SC2329 # the trap calls it
stop() { # some time before the time limit, or when the run is cancelled: save, and leave
    asked=asked
    [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null
}
trap stop USR1 TERM

attempt=$(@{attempts} begin "$run" "$job" @{max_retries} "${nodes[@]}") || exit 64
export LLMSCALE_ATTEMPT_DIR=$attempt
echo "job $job on ${nodes[*]}: $attempt"

finish() { # CODE [WHY]: back into the queue, or the end
    if @{attempts} end "$attempt" "$@"; then
        scontrol requeue "$job" && sleep 60
    fi
    exit "$1"
}

# Every node has to see the run directory and to have what the job needs. One on which nothing could be started is no
# failure to srun, so each that is well says so.
@{srun_health} \\
    python -m llmscale.launch.health "$attempt" @{gpus}
bad=()
for node in "${nodes[@]}"; do [ -e "$attempt/healthy/$node" ] || bad+=("$node"); done
if [ "${#bad[@]}" -gt 0 ]; then
    echo "unhealthy: ${bad[*]}"
    finish 64 "unhealthy: ${bad[*]}"
fi
[ -z "$asked" ] || finish 75 asked

@{start}
step=$!
@{wait}
@{after}finish "$code" "$asked"
"""

RANKS = """# One task a rank.
export MASTER_ADDR=${nodes[0]} MASTER_PORT=$port
@{srun} \\
    "${command[@]}" &"""

RAY = """# Ray over all nodes, which nobody enters without the token; the driver on the first one.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$run/launch/ray-token RAY_USAGE_STATS_ENABLED=0
rm -f "$RAY_AUTH_TOKEN_PATH"
(umask 077 && python -c 'import secrets; print(secrets.token_hex(32))' >"$RAY_AUTH_TOKEN_PATH")
head=${nodes[0]}:$port
@{srun_ray} \\
    python -m llmscale.launch.ray_node "$attempt" "$head" @{cpus} @{resources} &
ray=$!
until [ "$(find "$attempt/ray-up" -type f 2>/dev/null | wc -l)" = "$SLURM_JOB_NUM_NODES" ]; do
    kill -0 "$ray" 2>/dev/null || finish 1 "Ray did not start: see $attempt/ray-*.log"
    [ "$SECONDS" -lt 900 ] || finish 1 "Ray did not start in 15 minutes: see $attempt/ray-*.log"
    [ -z "$asked" ] || finish 75 asked
    sleep 0.5
done
@{srun_driver} \\
    "${command[@]}" @{overrides}cluster.address="$head" &"""

AFTER_RAY = """kill -USR1 "$ray" 2>/dev/null
wait "$ray" 2>/dev/null
rm -f "$RAY_AUTH_TOKEN_PATH"
"""
ATTEMPTS = "python -m llmscale.launch.attempts"


def local_script(job: Job) -> str:
    return _head([job], "") + _filled(LOCAL, wait=_wait("    "), **_bookkeeping(job, ATTEMPTS))


def slurm_script(jobs: Sequence[Job]) -> str:
    """For sbatch; docs/slurm.md says what it does. Several jobs are one array; all have the same launch and the same plan."""
    job, launch, plan = jobs[0], jobs[0].launch, jobs[0].plan
    assert isinstance(launch, SlurmLaunch) and all((j.launch, j.plan) == (launch, plan) for j in jobs)
    srun = _Srun(job, launch)
    every_node = f"--nodes={plan.num_nodes} --ntasks={plan.num_nodes} --ntasks-per-node=1"
    cpus = f"--cpus-per-task={_cpus_per_task(plan)}"
    if plan.on_ray:
        start = _filled(
            RAY,
            srun_ray=srun("ray", f"--overlap {every_node} {cpus}"),
            srun_driver=srun("driver", '--overlap --nodes=1 --ntasks=1 --nodelist="${nodes[0]}"'),
            cpus=str(plan.cpus_per_node),
            resources=" ".join(shlex.quote(json.dumps(node)) for node in plan.resources),
            overrides="".join(f"{shlex.quote(override)} " for override in plan.overrides),
        )
    else:
        # Ranks that were asked to stop end one after the other: the first must not have the rest killed. One that has died
        # takes the others with it by itself, or after a minute.
        label = " --label" if plan.tasks_per_node > 1 else ""  # each line with its rank
        tasks = f"--nodes={plan.num_nodes} --ntasks-per-node={plan.tasks_per_node} {cpus}"
        start = _filled(RANKS, srun=srun("trainer", f"{tasks} --kill-on-bad-exit=0 --wait=60{label}"))
    text = _filled(
        SLURM,
        srun_health=srun("health", every_node),
        gpus=str(plan.gpus_per_node),
        start=start,
        wait=_wait(""),
        after=AFTER_RAY if plan.on_ray else "",
        **_bookkeeping(job, srun.on_first_node(ATTEMPTS)),
    )
    return _head(jobs, "".join(f"#SBATCH {line}\n" for line in _directives(jobs, launch))) + text


class _Srun:
    """How a command is started on nodes, in the container where there is one."""

    def __init__(self, job: Job, launch: SlurmLaunch):
        mounts = [*(shlex.quote(mount) for mount in (str(job.folder), *launch.mounts)), '"$run"']  # words of the shell
        self.options, self.inside = "", ""
        if launch.container is Container.pyxis:
            where = ",".join(f"{mount}:{mount}" for mount in mounts)
            self.options = f"{_line([f'--container-image={launch.image}'])} --container-mounts={where} "
            self.options += _line([f"--container-workdir={job.folder}"])
        elif launch.container is Container.apptainer:
            gpus = "--nv " if job.plan.gpus_per_node else ""
            binds = "".join(f"--bind {mount} " for mount in mounts)
            self.inside = f"apptainer exec {gpus}{binds}{_line(['--pwd', str(job.folder), str(launch.image)])}"

    def __call__(self, name: str, where: str) -> str:
        output = f'--output="$attempt/{name}-%N.log"'
        return " ".join(filter(None, ["srun", where, output, self.options, self.inside]))

    def on_first_node(self, command: str) -> str:
        """In the script's own shell, unless that lacks the container."""
        if not self.options and not self.inside:
            return command
        words = ["srun --overlap --nodes=1 --ntasks=1", self.options, self.inside, command]
        return " ".join(filter(None, words))


def _head(jobs: Sequence[Job], directives: str) -> str:
    job, alone = jobs[0], len(jobs) == 1
    runs = [(f"run={shlex.quote(str(j.run_dir))}", f"command=({_line(j.command)})") for j in jobs]
    cases = "\n".join(f"{number})\n    {run}\n    {command}\n    ;;" for number, (run, command) in enumerate(runs))
    text = _filled(
        HEAD,
        what=f"llmscale {job.stage} in {shlex.quote(str(job.run_dir))}"
        if alone
        else f"an array of llmscale {job.stage}",
        which="\n".join(runs[0]) if alone else f'case "$SLURM_ARRAY_TASK_ID" in\n{cases}\nesac',
        directives=directives,
        environment=shlex.quote(str(job.programs)),
        folder=shlex.quote(str(job.folder)),
    )
    if isinstance(job.launch, ScriptLaunch) and job.launch.secrets_file is not None:
        text += _filled(SECRETS, file=shlex.quote(str(Path(job.launch.secrets_file).absolute())))
    return text


def _bookkeeping(job: Job, attempts: str) -> dict[str, str]:
    return {"attempts": attempts, "max_retries": str(job.launch.max_retries)}


def _directives(jobs: Sequence[Job], launch: SlurmLaunch) -> list[str]:
    plan, name = jobs[0].plan, jobs[0].run_id if len(jobs) == 1 else f"{jobs[0].stage}-{len(jobs)}"
    array = None if len(jobs) == 1 else f"0-{len(jobs) - 1}"
    gpus = str(plan.gpus_per_node) if plan.gpus_per_node and launch.gres is None else None
    values = {
        "job-name": name, "comment": name, "array": array, "nodes": plan.num_nodes, "ntasks-per-node": plan.tasks_per_node,
        "cpus-per-task": _cpus_per_task(plan), "gpus-per-node": gpus, "gres": launch.gres, "mem": launch.mem_per_node,
        "time": launch.time, "partition": launch.partition, "account": launch.account, "qos": launch.qos,
        "constraint": launch.constraint, "exclude": launch.exclude,
        "signal": f"B:USR1@{launch.signal_lead_s}", "open-mode": "append",
        "output": "/dev/null",  # launch/job.log in the run directory, as soon as there is one
    }  # fmt: skip
    flags = ["--requeue", *(["--exclusive"] if launch.exclusive else [])]
    return [*(f"--{name}={value}" for name, value in values.items() if value is not None), *flags, *launch.extra]


def _cpus_per_task(plan: Plan) -> int:
    return max(1, plan.cpus_per_node // plan.tasks_per_node)


def _wait(indent: str) -> str:
    return WAIT.strip().replace("\n", f"\n{indent}")


class _Text(string.Template):
    delimiter = "@"


def _filled(text: str, **values: str) -> str:
    return _Text(text).safe_substitute(values)  # safe: `"${nodes[@]}"` stays as it is


def _line(words: Sequence[str]) -> str:
    return " ".join(shlex.quote(word) for word in words)
