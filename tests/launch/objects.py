"""What an API server and its operators would say to an object, without one: the schema of its kind, strictly (an unknown key
is a fault), then the rules that a schema does not say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate

from tests.conftest import ROOT

SCHEMAS = ROOT.parent / "shared" / "schemas"  # of the kinds that are no part of Kubernetes itself
LABEL = re.compile(r"([A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?)?", re.ASCII)
DNS_1035 = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
Object = dict[str, Any]


def faults(made: Object) -> list[str]:
    own_schema = sorted(SCHEMAS.glob(f"*{made['kind'].lower()}-v*.json"))
    found = _of_schema(made, own_schema[0]) if own_schema else _of_core(made)
    for name, pod in pods(made):
        core = {"apiVersion": "v1", "kind": "Pod", "metadata": pod.get("metadata", {}), "spec": pod["spec"]}
        found += [f"{name}: {fault}" for fault in [*_of_core(core), *_of_pod(pod)]]
    if made["kind"] == "JobSet":
        for number, jobs in enumerate(made["spec"]["replicatedJobs"]):
            job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": jobs["template"]["spec"]}
            found += [f"replicatedJobs/{number}: {fault}" for fault in _of_core(job)]
    rules = {"RayJob": _of_kuberay, "JobSet": _of_jobset}.get(made["kind"])
    return found + (list(rules(made)) if rules else [])


def pods(made: Object) -> list[tuple[str, Object]]:
    """(where, template) of each kind of pod in it."""
    if made["kind"] == "RayJob":
        cluster = made["spec"]["rayClusterSpec"]
        groups = cluster["workerGroupSpecs"]
        return [("head", cluster["headGroupSpec"]["template"]), *((g["groupName"], g["template"]) for g in groups)]
    if made["kind"] == "JobSet":
        return [(jobs["name"], jobs["template"]["spec"]["template"]) for jobs in made["spec"]["replicatedJobs"]]
    return []


# ---------------------------------------------------------------- schemas


def _of_core(made: Object) -> list[str]:
    try:
        kubernetes_validate.validate(made, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{made['kind']}: {error.args[0].message if error.args else error}"[:200]]
    return []


def _of_schema(made: Object, file: Path) -> list[str]:
    version, validator = _validator(file)
    wrong = [] if made["apiVersion"] == version else [f"apiVersion {made['apiVersion']} is not {version}"]
    return wrong + [
        f"{'/'.join(map(str, error.absolute_path))}: {error.message}"[:200] for error in validator.iter_errors(made)
    ]


@cache
def _validator(file: Path) -> tuple[str, jsonschema.Draft4Validator]:
    """(apiVersion, validator of the schema) of a CRD."""
    described = json.loads(file.read_text())
    root = described["openAPIV3Schema"]
    root["properties"] |= {"apiVersion": {}, "kind": {}, "metadata": {"type": "object"}}
    return f"{described['group']}/{described['version']}", jsonschema.Draft4Validator(_strict(root))


def _strict(schema: Any) -> Any:
    """A CRD's schema as one of JSON Schema that takes no key that it does not name. Defaults are filled in before a server
    validates, so that a key with one is not required."""
    if not isinstance(schema, dict):
        return schema
    made = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes") and key != "default"}
    for key in ("items", "additionalProperties", "not"):
        if key in made:
            made[key] = _strict(made[key])
    for key in ("allOf", "anyOf", "oneOf"):
        if key in made:
            made[key] = [_strict(inner) for inner in made[key]]
    if schema.get("x-kubernetes-int-or-string"):
        made = {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    if made.pop("nullable", False) and "type" in made:
        made["type"] = [made["type"], "null"]
    if "properties" in made:
        required = [key for key in made.pop("required", []) if "default" not in schema["properties"].get(key, {})]
        made["properties"] = {key: _strict(inner) for key, inner in made["properties"].items()}
        made |= {"required": required} if required else {}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    return made


# ---------------------------------------------------------------- rules that schemas do not say


def _of_names(made: Object) -> Iterator[str]:
    metadata = made["metadata"]
    if len(metadata["name"]) > 47 or not DNS_1035.fullmatch(metadata["name"]):
        yield f"name {metadata['name']!r} is not DNS-1035 of at most 47 characters"
    yield from (f"label {key}" for key, value in metadata.get("labels", {}).items() if not LABEL.fullmatch(value))


def _of_kuberay(made: Object) -> Iterator[str]:
    """ValidateRayJobSpec, ValidateRayClusterSpec and Kueue's limits."""
    yield from _of_names(made)
    spec, cluster = made["spec"], made["spec"].get("rayClusterSpec") or {}
    mode = spec.get("submissionMode", "K8sJobMode")
    if mode not in ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"):
        yield f"submissionMode {mode}"
    shuts_down = spec.get("shutdownAfterJobFinishes", False)
    if (spec.get("suspend") or spec.get("ttlSecondsAfterFinished")) and not shuts_down:
        yield "suspend or ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if spec.get("backoffLimit") and (mode == "InteractiveMode" or spec.get("clusterSelector")):
        yield "backoffLimit with InteractiveMode or clusterSelector"
    ray = tuple(int(n) for n in cluster.get("rayVersion", "0.0").split(".")[:2])
    if cluster.get("authOptions", {}).get("mode") == "token" and ray < (2, 52):
        yield "token authentication needs rayVersion 2.52"
    groups = cluster.get("workerGroupSpecs", [])
    fits_kueue = shuts_down and spec.get("suspend") and len(groups) <= 17
    fits_kueue = fits_kueue and not cluster.get("enableInTreeAutoscaling")
    if "kueue.x-k8s.io/queue-name" in made["metadata"].get("labels", {}) and not fits_kueue:
        yield "Kueue wants suspend, shutdownAfterJobFinishes, 17 groups at most and no autoscaler"
    if len({g["groupName"] for g in groups}) < len(groups):
        yield "two groups have one name"
    for group in groups:
        if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            yield f"{group['groupName']}: replicas are not between minReplicas and maxReplicas"
        given = group["rayStartParams"].get("resources")
        if given and not all(n > 0 for n in json.loads(json.loads(given)).values()):  # as a shell and then Ray read it
            yield f"{group['groupName']}: resources {given}"


def _of_jobset(made: Object) -> Iterator[str]:
    """JobSet's webhook and the API server's rules for a Job's pod failure policy."""
    yield from _of_names(made)
    names = [jobs["name"] for jobs in made["spec"]["replicatedJobs"]]
    for jobs in made["spec"]["replicatedJobs"]:
        job = jobs["template"]["spec"]
        pod = f"{made['metadata']['name']}-{jobs['name']}-{jobs['replicas'] - 1}-{job['completions'] - 1}-abcde"
        if len(pod) > 63:
            yield f"pod name {pod} is longer than 63 characters"
        if "podFailurePolicy" in job and job["template"]["spec"].get("restartPolicy") != "Never":
            yield "a pod failure policy needs restartPolicy Never"
        for rule in job.get("podFailurePolicy", {}).get("rules", []):
            codes = rule.get("onExitCodes", {"values": [1], "operator": "In"})
            if codes["values"] != sorted(set(codes["values"])) or (codes["operator"] == "In" and 0 in codes["values"]):
                yield f"exit codes {codes['values']}"
            containers = [c["name"] for c in job["template"]["spec"]["containers"]]
            if codes.get("containerName", containers[0]) not in containers:
                yield f"no container {codes['containerName']}"
    rules = made["spec"].get("failurePolicy", {}).get("rules", [])
    if len({rule["name"] for rule in rules}) < len(rules):
        yield "two rules have one name"
    for rule in rules:
        if not set(rule.get("targetReplicatedJobs", [])) <= set(names):
            yield f"rule {rule['name']} is of no replicated job"
        for pattern in rule.get("onJobFailureMessagePatterns", []):
            re.compile(pattern)


def _of_pod(pod: Object) -> Iterator[str]:
    """Pod security `restricted`, and what a pod names has to be there."""
    spec = pod["spec"]
    security = spec.get("securityContext", {})
    if not security.get("runAsNonRoot") or security.get("runAsUser", 0) == 0:
        yield "may run as root"
    if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "seccomp profile"
    if spec.get("automountServiceAccountToken") is not False:
        yield "has the token of a service account"
    yield from (f"label {k}" for k, v in pod.get("metadata", {}).get("labels", {}).items() if not LABEL.fullmatch(v))
    volumes = {volume["name"] for volume in spec.get("volumes", [])}
    for container in spec["containers"]:
        own = container.get("securityContext", {})
        if own.get("allowPrivilegeEscalation") is not False or own.get("capabilities", {}).get("drop") != ["ALL"]:
            yield f"{container['name']}: privileges"
        if missing := {mount["name"] for mount in container["volumeMounts"]} - volumes:
            yield f"{container['name']}: no volumes {missing}"
        paths = [mount["mountPath"] for mount in container["volumeMounts"]]
        if len(set(paths)) < len(paths):
            yield f"{container['name']}: two volumes at one path"
        names = [variable["name"] for variable in container.get("env", [])]
        if len(set(names)) < len(names):
            yield f"{container['name']}: a variable twice"
