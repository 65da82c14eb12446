"""A job as an object of Kubernetes: a RayJob of KubeRay where there are roles over Ray, else a JobSet with torchrun. Plain
dicts, made from the config and the plan alone; nothing that is secret is in them.

RayJob: https://docs.ray.io/en/latest/cluster/kubernetes/getting-started/rayjob-quick-start.html. JobSet:
https://jobset.sigs.k8s.io/docs/concepts/. Pods keep to the `restricted` standard of Kubernetes.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import Any

import yaml

from llmscale.checkpoint.run_directory import RUN_ID
from llmscale.errors import ConfigError, Requeue
from llmscale.launch.config import TAINT, KubernetesLaunch
from llmscale.launch.plan import TRAINER, Plan
from llmscale.launch.pod import JOB, LOG, NODE, START
from llmscale.launch.script import Job

Object = dict[str, Any]
MAX_NAME = 47  # KubeRay and JobSet make longer names of it, of 63 characters at most
RUN_LABEL, ROLE_LABEL, ID_ANNOTATION = "llmscale/run", "llmscale/role", "llmscale/run-id"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
USER = 1000  # of k8s/Dockerfile
RANKS = "run"  # a pod's name is NAME-run-0-NODE-abcde, and may not be longer than 63 characters
PORT = 29500  # of the ranks' rendezvous; a pod has an address of its own
HEAD = "head"
SHARED = "shared"  # the pods on which roles without nodes of their own are
GPU = "nvidia.com/gpu"
# Exit codes of a container that was ended from outside: out of memory, or its node's end. All others are what `pod` decided.
KILLED = [137, 143]
POD = ["python", "-m", "llmscale.launch.pod"]


def object_name(run_id: str) -> str:
    """The run's id as a name of DNS-1035: lower case, whatever else is not a letter or digit is a dash, a letter first.

    Raises: ConfigError when it is too long.
    """
    name = re.sub(r"[^a-z0-9]+", "-", run_id.lower()).strip("-")
    name = name if name[:1].isalpha() else f"run-{name}".rstrip("-")
    if len(name) > MAX_NAME:
        what = f"{name!r} has {len(name)} characters, a RayJob or JobSet may have {MAX_NAME}"
        raise ConfigError(what, where="run.name", fix=f"Shorten it by {len(name) - MAX_NAME} or more.")
    return name


def run_dir_in_pod(run_dir: PurePosixPath, launch: KubernetesLaunch) -> PurePosixPath:
    """Raises: ConfigError when it is not on the volume."""
    inside = PurePosixPath(launch.folder) / run_dir
    if not inside.is_relative_to(launch.folder) or ".." in inside.parts:
        fix = f"Give run.dir relative to {launch.folder}, as in run.dir=runs, or another launch.folder."
        raise ConfigError(f"pods keep nothing outside their volume at {launch.folder}", where="run.dir", fix=fix)
    return inside


def manifest(job: Job) -> Object:
    launch = job.launch
    assert isinstance(launch, KubernetesLaunch)
    return _ray_job(job, launch) if job.plan.on_ray else _job_set(job, launch)


def to_yaml(made: Object) -> str:
    return yaml.dump(made, Dumper=_Dumper, sort_keys=False, width=120, explicit_start=True)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True  # what two pods have in common is written twice: it is read by people


# ---------------------------------------------------------------- RLHF, collect, rollout


def _ray_job(job: Job, launch: KubernetesLaunch) -> Object:
    command = [*job.command, *job.plan.overrides, "cluster.address=auto"]
    head_env = {LOG: "/proc/1/fd/1", "RAY_JOB_STOP_WAIT_TIME_S": str(launch.signal_lead_s)}
    head = _container(job, launch, "ray-head", launch.head_cpus, 0, launch.head_mem)
    head["env"] += [{"name": key, "value": value} for key, value in head_env.items()]
    head["ports"] = [{"name": "gcs-server", "containerPort": 6379}, {"name": "dashboard", "containerPort": 8265}]
    head["lifecycle"] = _leaving(job)
    spec: Object = {
        "entrypoint": shlex.join([*_books(job), *command]),
        "submissionMode": "HTTPMode",  # the driver is in the head's pod, and there is no other pod that submits it
        "shutdownAfterJobFinishes": True,
        "backoffLimit": launch.max_retries,  # each on a new cluster
        "rayClusterSpec": {
            "rayVersion": version("ray"),
            "authOptions": {"mode": "token"},
            "headGroupSpec": {
                "rayStartParams": {"num-cpus": "0", "num-gpus": "0"},  # no worker is placed there
                "template": _pod(job, launch, HEAD, head),
            },
            "workerGroupSpecs": [_group(job, launch, *group) for group in _groups(job.plan)],
        },
    }
    return _object("ray.io/v1", "RayJob", job, launch, spec)


def _groups(plan: Plan) -> list[tuple[str, list[int]]]:
    """(name, its nodes): one for each role that has nodes of its own, and one for the others."""
    own = {role: plan.places[role] for role in plan.places if role in plan.pinned}
    rest = [node for node in range(plan.num_nodes) if not any(node in nodes for nodes in own.values())]
    return [*own.items(), *([(SHARED, rest)] if rest else [])]


def _group(job: Job, launch: KubernetesLaunch, name: str, nodes: Sequence[int]) -> Object:
    plan, first = job.plan, nodes[0]
    container = _container(job, launch, "ray-worker", plan.cpus[first], plan.gpus[first], launch.mem_per_node)
    container["lifecycle"] = _leaving(job)
    start = {"num-cpus": str(plan.cpus[first]), "num-gpus": str(plan.gpus[first])}
    if plan.resources[first]:
        start["resources"] = json.dumps(json.dumps(plan.resources[first]))  # KubeRay pastes it into a shell's line
    fewest = math.ceil(plan.fewest[name] / plan.resources[first][name]) if name in plan.pinned else len(nodes)
    return {
        "groupName": name,
        "replicas": len(nodes),
        "minReplicas": fewest,
        "maxReplicas": len(nodes),
        "rayStartParams": start,
        "template": _pod(job, launch, name, container),
    }


def _leaving(job: Job) -> Object:
    return {"preStop": {"exec": {"command": [*POD, "leave", str(job.run_dir)]}}}


# ---------------------------------------------------------------- the stages that learn from files


def _job_set(job: Job, launch: KubernetesLaunch) -> Object:
    plan, name = job.plan, object_name(job.run_id)
    rendezvous = [f"--master-addr={name}-{RANKS}-0-0.{name}", f"--master-port={PORT}"]
    ranks = [f"--nnodes={plan.num_nodes}", f"--nproc-per-node={plan.tasks_per_node}"]
    grace = f"--shutdown-timeout={launch.signal_lead_s}"
    command = ["torchrun", *ranks, *rendezvous, grace, "-m", "llmscale.cli", *job.command[1:]]
    container = _container(job, launch, TRAINER, plan.cpus[0], plan.gpus[0], launch.mem_per_node)
    container["env"] += [
        _from_pod(NODE, "metadata.annotations['batch.kubernetes.io/job-completion-index']"),
        _from_pod(JOB, "metadata.labels['jobset.sigs.k8s.io/jobset-uid']"),
        _from_pod(START, "metadata.labels['jobset.sigs.k8s.io/restart-attempt']"),
    ]
    container["command"] = [word.replace("$(", "$$(") for word in [*_books(job), *command]]  # $(NAME) is Kubernetes'
    indexed: Object = {
        "completionMode": "Indexed",
        "completions": plan.num_nodes,
        "parallelism": plan.num_nodes,
        "backoffLimit": 0,  # one pod alone is never started again: its ranks are nothing without the others
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": _codes("In", [Requeue.exit_code])},
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "FailJob", "onExitCodes": _codes("NotIn", [Requeue.exit_code, *KILLED])},
            ]
        },
        "template": _pod(job, launch, TRAINER, container),
    }
    indexed["template"]["spec"]["restartPolicy"] = "Never"
    spec: Object = {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "failurePolicy": {
            "maxRestarts": launch.max_retries,  # of what was ended from outside
            "rules": [
                _after("again", "RestartJobSetAndIgnoreMaxRestarts", "[01]"),
                _after("final", "FailJobSet", "2"),
            ],
        },
        "replicatedJobs": [{"name": RANKS, "replicas": 1, "template": {"spec": indexed}}],
    }
    return _object("jobset.x-k8s.io/v1alpha2", "JobSet", job, launch, spec)


def _codes(operator: str, values: list[int]) -> Object:
    return {"containerName": TRAINER, "operator": operator, "values": values}


def _after(name: str, action: str, index: str) -> Object:
    """What to do after the pod failure policy's rule of this index."""
    reasons, patterns = ["PodFailurePolicy"], [f"rule at index {index}$"]
    return {
        "name": name,
        "action": action,
        "onJobFailureReasons": reasons,
        "onJobFailureMessagePatterns": patterns,
    }


# ---------------------------------------------------------------- what both have


def _object(api: str, kind: str, job: Job, launch: KubernetesLaunch, spec: Object) -> Object:
    name = object_name(job.run_id)
    labels = {"app.kubernetes.io/name": "llmscale", RUN_LABEL: name}
    if launch.queue is not None:
        labels[QUEUE_LABEL] = launch.queue
        spec = {"suspend": True} | spec  # until Kueue admits it
    metadata = {
        "name": name,
        "namespace": launch.namespace,
        "labels": labels,
        "annotations": {ID_ANNOTATION: job.run_id},
    }
    return {"apiVersion": api, "kind": kind, "metadata": metadata, "spec": spec}


def _books(job: Job) -> list[str]:
    return [*POD, "run", str(job.run_dir), str(job.launch.max_retries)]


def _pod(job: Job, launch: KubernetesLaunch, role: str, container: Object) -> Object:
    tolerations = [
        {
            "key": key,
            "operator": "Equal" if value else "Exists",
            **({"value": value} if value else {}),
            "effect": effect,
        }
        for key, value, effect in (_taint(text) for text in launch.tolerations)
    ]
    spec = {
        "serviceAccountName": launch.service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": launch.signal_lead_s + 30,  # to write the books, and for Ray's own end
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "nodeSelector": launch.node_selector,
        "tolerations": tolerations,
        "containers": [container],
        "volumes": [
            {"name": "work", "persistentVolumeClaim": {"claimName": launch.volume}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},  # at most the container's memory, of which it is part
        ],
    }
    labels = {"app.kubernetes.io/name": "llmscale", RUN_LABEL: object_name(job.run_id), ROLE_LABEL: role}
    return {
        "metadata": {"labels": labels},
        "spec": {key: value for key, value in spec.items() if value not in (None, [], {})},
    }


def _taint(text: str) -> tuple[str, str | None, str]:
    found = TAINT.fullmatch(text)
    assert found is not None
    return found["key"], found["value"], found["effect"]


def _container(job: Job, launch: KubernetesLaunch, name: str, cpus: int, gpus: int, memory: str | None) -> Object:
    amounts = {"cpu": str(cpus), "memory": memory, GPU: str(gpus) if gpus else None}
    given = {resource: amount for resource, amount in amounts.items() if amount is not None}
    env = {RUN_ID: job.run_id, "PYTHONUNBUFFERED": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    if job.plan.on_ray:
        env[JOB] = object_name(job.run_id)
    return {
        "name": name,
        "image": launch.image,
        "workingDir": launch.folder,
        "env": [{"name": key, "value": value} for key, value in env.items()],
        **({"envFrom": [{"secretRef": {"name": launch.secrets}}]} if launch.secrets else {}),
        "resources": {"requests": given, "limits": given},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": "work", "mountPath": launch.folder}, {"name": "shm", "mountPath": "/dev/shm"}],
    }


def _from_pod(name: str, path: str) -> Object:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}
