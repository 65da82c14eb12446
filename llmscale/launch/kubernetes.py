"""A cluster's API server, asked through the official client: make an object, how it is, its pods' logs, take it away. What goes
wrong is one line; what may pass (429, 5xx, an answer that breaks off or does not come) is tried again a few times."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import urllib3

from llmscale.errors import ClusterError, RunError
from llmscale.launch.manifest import ID_ANNOTATION, ROLE_LABEL, RUN_LABEL, Object

TIMEOUT_S = 30.0  # of one answer
PAUSES_S = (0.5, 1.0, 2.0, 4.0)  # before each further try
LONGEST_PAUSE_S = 10.0  # that a server may ask for
GONE_S = 120.0  # longest wait for an object that was taken away
PASSING = (408, 429, 500, 502, 503, 504)
RESOURCES = {"RayJob": ("ray.io", "v1", "rayjobs"), "JobSet": ("jobset.x-k8s.io", "v1alpha2", "jobsets")}
OPERATOR = {"RayJob": "KubeRay", "JobSet": "JobSet"}
ENDED = ("Succeeded", "Failed")  # phases of a pod


@dataclass(frozen=True)
class Place:
    """Where an object is."""

    kind: str
    name: str
    namespace: str
    context: str | None

    @classmethod
    def of(cls, made: Object, context: str | None) -> Place:
        return cls(made["kind"], made["metadata"]["name"], made["metadata"]["namespace"], context)

    @classmethod
    def from_text(cls, job: str) -> Place:
        """Inverse of `str`."""
        path, _, context = job.partition("@")
        namespace, kind, name = path.split("/")
        return cls(kind, name, namespace, context or None)

    def __str__(self) -> str:
        return f"{self.namespace}/{self.kind}/{self.name}" + (f"@{self.context}" if self.context else "")


@dataclass(frozen=True)
class JobState:
    state: str  # queued, running, done or failed
    reason: str


def submit(made: Object, context: str | None) -> Place:
    """One that has ended gives way to it. Raises: RunError when one of this name is at work, ClusterError when the cluster
    refuses it or cannot be asked."""
    place = Place.of(made, context)
    cluster = _Cluster(place)
    if (existing := cluster.read()) is not None:
        if _state(existing).state not in ("done", "failed"):
            raise _taken(place, existing)
        cluster.delete()
        deadline = time.monotonic() + GONE_S
        while cluster.read() is not None:
            if time.monotonic() > deadline:
                raise ClusterError(f"{place} has ended, and does not go away", fix="kubectl describe says why.")
            time.sleep(PAUSES_S[0])
    if not cluster.create(made):  # there it is; by our own try, whose answer did not come, or by somebody else
        existing = cluster.read()
        if existing is None or _run_id(existing) != _run_id(made):
            raise _taken(place, existing)
    return place


def _taken(place: Place, existing: Object | None) -> RunError:
    fix = "Wait for it, or llmscale cancel it, or give this run another run.name=..."
    return RunError(f"{place} is there already, of run {_run_id(existing)}", where="run.name", fix=fix)


def _run_id(made: Object | None) -> str:
    return str(((made or {}).get("metadata", {}).get("annotations") or {}).get(ID_ANNOTATION, "unknown"))


def state_of(place: Place) -> JobState | None:
    """None when the cluster knows nothing of it any more. Raises: ClusterError when it cannot be asked."""
    cluster = _Cluster(place)
    made = cluster.read()
    if made is None:
        alive = [pod for pod in cluster.pods() if pod.status.phase not in ENDED]
        return JobState("running", "it was taken away, and saves") if alive else None
    found = _state(made)
    if found.state == "queued" and not found.reason:
        return JobState("queued", next(filter(None, map(_lacks, cluster.pods())), ""))
    return found


def cancel(place: Place, now: bool) -> None:
    """Its pods save and end; `now`: they are killed."""
    cluster = _Cluster(place)
    cluster.delete()
    if now:
        cluster.kill_pods()


def logs(place: Place, role: str | None, seen: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(pod, lines) of what pods have written; `seen` keeps the time of each one's last line, and lines up to it are left
    out. A role is that of a pod: head is where the driver is."""
    cluster = _Cluster(place)
    wanted = {"driver": "head"}.get(role or "", role)
    pods = cluster.pods()
    roles = sorted({pod.metadata.labels.get(ROLE_LABEL, "") for pod in pods})
    if wanted is not None and pods and wanted not in roles:
        raise RunError(f"no pod of {place} has the role {role}", fix=f"There is: {', '.join(roles)}.")
    for pod in pods:
        if wanted in (None, pod.metadata.labels.get(ROLE_LABEL)) and pod.status.phase != "Pending":
            name = pod.metadata.name
            new = [line.partition(" ") for line in cluster.log(name).splitlines()]
            new = [line for line in new if line[0] > seen.get(name, "")]
            if new:
                seen[name] = new[-1][0]
                yield name, "".join(f"{text}\n" for _, _, text in new)


# ---------------------------------------------------------------- reading what it says


def _state(made: Object) -> JobState:
    status = made.get("status") or {}
    return _ray_job_state(status) if made["kind"] == "RayJob" else _job_set_state(status)


def _ray_job_state(status: dict[str, Any]) -> JobState:
    deployment = status.get("jobDeploymentStatus", "")
    reason = ": ".join(filter(None, (status.get("reason"), (status.get("message") or "").partition("\n")[0])))
    if deployment == "Complete" and status.get("jobStatus") != "STOPPED":
        return JobState("done", "")
    if deployment in ("Complete", "Failed", "ValidationFailed"):
        return JobState("failed", reason)
    if deployment == "Running":
        return JobState("running", "")
    waits = {"Suspended": "suspended: its queue has not admitted it", "Retrying": "it failed, and is started again"}
    return JobState("queued", waits.get(deployment, ""))


def _job_set_state(status: dict[str, Any]) -> JobState:
    holds = {c["type"]: c for c in status.get("conditions", []) if c["status"] == "True"}
    if "Completed" in holds:
        return JobState("done", "")
    if "Failed" in holds:
        return JobState("failed", holds["Failed"].get("message", ""))
    if "Suspended" in holds:
        return JobState("queued", "suspended: its queue has not admitted it")
    ready = any(jobs.get("ready") or jobs.get("succeeded") for jobs in status.get("replicatedJobsStatus", []))
    return JobState("running" if ready else "queued", "")


def _lacks(pod: Any) -> str:
    """Why a pod does not run."""
    for condition in pod.status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            return f"{condition.reason}: {condition.message}"
    for container in pod.status.container_statuses or []:
        waiting = container.state.waiting if container.state else None
        if waiting is not None and waiting.reason not in (None, "ContainerCreating", "PodInitializing"):
            return f"{waiting.reason}: {waiting.message or pod.metadata.name}"
    return ""


# ---------------------------------------------------------------- asking


class _Cluster:
    """The API server that has, or is to have, an object.

    Raises: ClusterError when there is no client, no kubeconfig, or no such context in it.
    """

    def __init__(self, place: Place):
        try:
            from kubernetes import client, config
        except ImportError as error:
            what = "the client of Kubernetes is not installed"
            raise ClusterError(what, where="launch", fix="pip install 'llmscale[k8s]'") from error
        self.place = place
        self.error: type[Exception] = client.ApiException
        settings = client.Configuration()
        settings.retries = urllib3.Retry(0)  # tries are counted here
        try:
            file = os.environ.get("KUBECONFIG") or "~/.kube/config"
            config.load_kube_config(file, place.context, settings, persist_config=False)
        except Exception as error:  # ConfigException as a rule; a file that is broken may raise anything
            where = "launch" if place.context is None else "launch.context"
            fix = "Set KUBECONFIG, or name one of `kubectl config get-contexts`; --print needs no cluster."
            raise ClusterError(f"no cluster is configured here: {_line(error)}", where=where, fix=fix) from error
        api = client.ApiClient(settings)
        self.objects, self.core = client.CustomObjectsApi(api), client.CoreV1Api(api)
        group, version, plural = RESOURCES[place.kind]
        self.resource = {"group": group, "version": version, "plural": plural, "namespace": place.namespace}
        self.host = settings.host

    def create(self, made: Object) -> bool:
        """False when there is one of this name."""
        call = self.objects.create_namespaced_custom_object
        return self._ask("create", call, {409: None}, **self.resource, body=made) is not None

    def read(self) -> Object | None:
        get = self.objects.get_namespaced_custom_object
        return self._ask("get", get, {404: None}, **self.resource, name=self.place.name)

    def delete(self) -> None:
        remove, how = self.objects.delete_namespaced_custom_object, {"propagation_policy": "Background"}
        self._ask("delete", remove, {404: None}, **self.resource, name=self.place.name, **how)

    def pods(self) -> Sequence[Any]:
        listed = self._ask("list the pods of", self.core.list_namespaced_pod, {}, **self._own)
        return sorted(listed.items, key=lambda pod: str(pod.metadata.name))

    def kill_pods(self) -> None:
        kill = self.core.delete_collection_namespaced_pod
        self._ask("kill the pods of", kill, {}, **self._own, grace_period_seconds=0)

    def log(self, pod: str) -> str:
        """Each line begins with its time."""

        def whole(**given: Any) -> str:
            answer: Any = self.core.read_namespaced_pod_log(**given, timestamps=True, _preload_content=False)
            return str(answer.read().decode(errors="replace"))

        where = {"namespace": self.place.namespace, "name": pod}
        return str(self._ask("read the logs of", whole, {404: ""}, **where))

    @property
    def _own(self) -> dict[str, str]:
        return {"namespace": self.place.namespace, "label_selector": f"{RUN_LABEL}={self.place.name}"}

    def _ask(self, verb: str, call: Callable[..., Any], instead: Mapping[int, Any], **given: Any) -> Any:
        """What the call returns; `instead` has what statuses that are no fault return."""
        for pause_s in (*PAUSES_S, None):
            try:
                return call(**given, _request_timeout=TIMEOUT_S)
            except self.error as error:
                status: int = getattr(error, "status", 0) or 0
                if status in instead:
                    return instead[status]
                if status not in PASSING or pause_s is None:
                    raise self._explained(verb, status, error) from error
                asked_for = (getattr(error, "headers", None) or {}).get("Retry-After", "")
                if asked_for.isdigit():
                    pause_s = min(float(asked_for), LONGEST_PAUSE_S)
            except urllib3.exceptions.HTTPError as error:
                if pause_s is None:
                    what = f"the API server at {self.host} does not answer: {_line(error)}"
                    fix = "Is it reachable from here, and the right context? Then try again."
                    raise ClusterError(what, where="launch.context", fix=fix) from error
            time.sleep(pause_s)
        raise AssertionError("the last try returns or raises")

    def _explained(self, verb: str, status: int, error: Exception) -> ClusterError:
        kind, namespace = self.place.kind, self.place.namespace
        said = _message(error)
        if status == 401:
            return ClusterError(
                f"the API server at {self.host} does not know you (401)",
                where="launch.context",
                fix="Log in again: what the kubeconfig holds is not valid, or not any more.",
            )
        if status == 403:
            fix = "Have the Role of k8s/rbac.yaml bound to you, or name a launch.namespace of yours."
            what = f"you may not {verb} a {kind} in namespace {namespace} (403: {said})"
            return ClusterError(what, where="launch.namespace", fix=fix)
        if status == 404 and "namespaces" in said:
            fix = "Make it, as in `kubectl apply -k k8s`, or name another one."
            return ClusterError(f"there is no namespace {namespace}", where="launch.namespace", fix=fix)
        if status == 404:
            fix = f"Have {OPERATOR[kind]} installed there: docs/kubernetes.md names the versions."
            return ClusterError(f"the cluster knows no {kind} (404)", where="launch", fix=fix)
        if status in PASSING:
            what = f"the API server at {self.host} answers {status} to {len(PAUSES_S) + 1} tries ({said})"
            return ClusterError(what, where="launch.context", fix="Try again later.")
        return ClusterError(f"the cluster refuses to {verb} {self.place} ({status}: {said})", where="launch")


def _message(error: Exception) -> str:
    """The server's own words."""
    body = getattr(error, "body", None) or getattr(error, "reason", None) or ""
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body)
    with suppress(ValueError, KeyError, TypeError):
        text = str(json.loads(text)["message"])
    return " ".join(text.split())[:300]


def _line(error: Exception) -> str:
    return re.sub(r"^.*?Caused by ", "", " ".join(str(error).split())).strip("()")
