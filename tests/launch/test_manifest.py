"""Objects of Kubernetes: each is one that a cluster would take, and says what the config says."""

from __future__ import annotations

import copy
import json
import os
import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from llmscale.cluster.config import RLHF_ROLES
from llmscale.compose import compose
from llmscale.config import check
from llmscale.errors import ConfigError
from llmscale.launch.config import KubernetesLaunch
from llmscale.launch.manifest import ID_ANNOTATION, MAX_NAME, manifest, object_name, run_dir_in_pod, to_yaml
from llmscale.launch.plan import plan
from llmscale.launch.script import Job
from tests.conftest import ROOT
from tests.launch.objects import DNS_1035, SCHEMAS, faults, pods

if not SCHEMAS.is_dir():
    pytest.skip("needs ../shared/schemas beside the checkout", allow_module_level=True)

IMAGE = "registry.example/llmscale@sha256:" + "0" * 64
RLHF = ["data.train=x", "model.path=m", "reward=answer", "cluster=ray"]
PRETRAIN = ["data.train=x", "engine=deepspeed"]
STAGES = ("pretrain", "sft", "reward", "rlhf", "collect", "rollout")  # what can be submitted
EXPERIMENTS = sorted((p.parent.name, p.stem) for p in ROOT.glob("conf/experiment/*/*.yaml") if p.stem in STAGES)
EXAMPLES = {  # of k8s/: what the objects look like
    "sft": ["experiment=demo", "launch.nodes=2"],
    "rlhf": ["experiment=demo", "launch.role_nodes={policy: 1, critic: 1, rollout: 1}", "launch.nodes=4"],
}


def made_from(config: Any, launch: KubernetesLaunch, overrides: list[str], run_id: str = "trial-1") -> dict[str, Any]:
    check(launch)
    run_dir = Path(run_dir_in_pod(PurePosixPath(config.run_dir), launch))
    here = Path("/here")
    return manifest(Job(config.stage, overrides, [], here, here, run_dir, run_id, launch, plan(config, launch)))


def made(stage: str, overrides: list[str], *launch: str, run_id: str = "trial-1") -> dict[str, Any]:
    launched = composed("submit", "launch=kubernetes", f"launch.image={IMAGE}", *launch).launch
    return made_from(composed(stage, *overrides), launched, overrides, run_id)


composed = cache(lambda stage, *overrides: compose(stage, overrides))


@pytest.mark.parametrize(("experiment", "stage"), EXPERIMENTS)
def test_every_shipped_experiment_is_one_that_a_cluster_takes(experiment: str, stage: str) -> None:
    overrides = [f"experiment={experiment}"]
    while True:
        try:
            config = compose(stage, overrides)
            break
        except ConfigError as error:  # an experiment may leave open what it starts from
            assert error.where and error.where.endswith(("path", "data.train")) and len(overrides) < 5
            overrides.append(f"{error.where}=anywhere")
    launch = KubernetesLaunch(image=IMAGE)
    found = made_from(config, launch, overrides)
    assert faults(found) == []
    assert found["kind"] == ("RayJob" if stage in ("rlhf", "collect", "rollout") else "JobSet")
    assert yaml.safe_load(to_yaml(found)) == found


# ---------------------------------------------------------------- any valid config

QUICK = (Phase.explicit, Phase.generate)  # to shrink one that fails takes minutes
NAMES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
MEMORY = st.sampled_from(["500Mi", "64Gi", "1073741824"])
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=30)
LAUNCHES = st.builds(
    KubernetesLaunch,
    image=st.sampled_from([IMAGE, "llmscale:0.1.0"]),
    namespace=NAMES,
    volume=NAMES,
    folder=st.sampled_from(["/llmscale", "/mnt/runs"]),
    secrets=st.none() | NAMES,
    queue=st.none() | NAMES,
    service_account=st.none() | NAMES,
    node_selector=st.dictionaries(st.sampled_from(["a", "site.example/kind"]), st.sampled_from(["", "b", "A.1_c"])),
    tolerations=st.lists(st.sampled_from(["gpu=true:NoSchedule", "a.example/b:NoExecute"]), unique=True),
    head_cpus=st.integers(1, 64),
    head_mem=MEMORY,
    max_retries=st.integers(0, 9),
    nodes=st.none() | st.integers(1, 6),
    role_nodes=st.dictionaries(st.sampled_from(RLHF_ROLES), st.integers(1, 3)),
    gpus_per_node=st.none() | st.integers(0, 8),
    cpus_per_node=st.none() | st.integers(1, 64),
    mem_per_node=st.none() | MEMORY,
    signal_lead_s=st.integers(1, 900),
)


@pytest.fixture(scope="module")
def configs() -> dict[str, Any]:
    overrides = {"pretrain": PRETRAIN, "rlhf": RLHF, "rollout": ["data.train=x", "model.path=m"]}
    return {stage: compose(stage, given) for stage, given in overrides.items()}


@given(
    launch=LAUNCHES,
    stage=st.sampled_from(["pretrain", "rlhf", "rollout"]),
    workers=st.integers(1, 8),
    gpus=st.sampled_from([0, 0.5, 1, 4]),
    overrides=st.lists(TEXT.map(lambda text: f"prompt={text}"), max_size=2),
    run_id=TEXT,
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True, phases=QUICK)
def test_any_valid_config_is_one_that_a_cluster_takes(
    configs: dict[str, Any], launch: KubernetesLaunch, stage: str, workers: int, gpus: float, overrides: list[str],
    run_id: str,
) -> None:  # fmt: skip
    """One that is not is refused here, by its key."""
    config = copy.deepcopy(configs[stage])
    for role in ("trainer", "rollout", "policy"):
        setattr(config.cluster, role, replace(getattr(config.cluster, role), num_workers=workers, num_gpus=gpus))
    try:
        found = made_from(config, launch, overrides, run_id)
    except ConfigError as error:
        assert error.where and error.fix
        return
    assert faults(found) == []
    assert found["metadata"]["annotations"][ID_ANNOTATION] == run_id
    words = shlex.split(found["spec"]["entrypoint"]) if stage != "pretrain" else container(found)["command"]
    assert {override.replace("$(", "$$(") if stage == "pretrain" else override for override in overrides} <= set(words)
    fits = sum(group["replicas"] for group in groups(found)) if stage != "pretrain" else 0
    assert stage == "pretrain" or fits >= 1
    yaml.safe_load(to_yaml(found))


@given(TEXT)
@settings(deadline=None, derandomize=True, phases=QUICK)
def test_a_runs_id_becomes_a_name_or_is_refused(run_id: str) -> None:
    try:
        name = object_name(run_id)
    except ConfigError as error:
        assert error.where == "run.name" and error.fix
    else:
        assert DNS_1035.fullmatch(name) and len(name) <= MAX_NAME


def test_a_name_stays_what_it_can_be() -> None:
    assert object_name("Trial_7.b-rlhf-a1b2c3") == "trial-7-b-rlhf-a1b2c3"
    assert object_name("7b-sft-a1b2c3") == "run-7b-sft-a1b2c3"
    with pytest.raises(ConfigError) as caught:
        object_name("a" * 50)
    assert caught.value.where == "run.name" and "by 3" in str(caught.value.fix)


# ---------------------------------------------------------------- what is in them


def container(found: dict[str, Any], pod: int = 0) -> dict[str, Any]:
    return pods(found)[pod][1]["spec"]["containers"][0]


def groups(found: dict[str, Any]) -> list[dict[str, Any]]:
    return found["spec"]["rayClusterSpec"]["workerGroupSpecs"]


def test_a_role_has_a_group_with_its_resource_and_the_head_has_no_work() -> None:
    workers = ["cluster.policy.num_workers=2", "cluster.policy.num_gpus=4", "cluster.rollout.num_workers=6"]
    more = ["cluster.rollout.num_gpus=1", "engine=deepspeed"]
    found = made("rlhf", [*RLHF, *workers, *more], "launch.role_nodes={policy: 2, rollout: 3}", "launch.nodes=6")
    seen = {g["groupName"]: (g["replicas"], json.loads(json.loads(g["rayStartParams"].get("resources", '"{}"'))))
            for g in groups(found)}  # fmt: skip
    assert seen == {"policy": (2, {"policy": 1}), "rollout": (3, {"rollout": 2}), "shared": (1, {})}
    limits = [g["template"]["spec"]["containers"][0]["resources"]["limits"] for g in groups(found)]
    assert [limit.get("nvidia.com/gpu") for limit in limits] == ["4", "2", None]
    assert found["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    words = shlex.split(found["spec"]["entrypoint"])
    assert {"cluster.policy.resources={policy: 1}", "cluster.rollout.resources={rollout: 1}"} <= set(words)
    assert words[-1] == "cluster.address=auto" and words[3:6] == ["run", "/llmscale/runs/default/rlhf", "3"]


def test_where_nothing_is_said_each_role_has_a_group_and_colocated_ones_share_one() -> None:
    found = made("rlhf", RLHF)
    assert [g["groupName"] for g in groups(found)] == ["policy", "critic", "reference", "reward", "rollout"]
    found = made("rlhf", [*RLHF, "cluster=colocated", "engine=deepspeed"])
    assert [g["groupName"] for g in groups(found)][-1] == "shared"
    assert "rollout" not in [g["groupName"] for g in groups(found)]
    assert [(g["groupName"], g["replicas"]) for g in groups(made("rlhf", RLHF, "launch.nodes=3"))] == [("shared", 3)]


def test_ranks_are_torchruns_over_indexed_pods() -> None:
    found = made("pretrain", [*PRETRAIN, "cluster.trainer.num_workers=8"], "launch.nodes=4")
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 4, 4)
    command = container(found)["command"]
    assert command[command.index("torchrun") :][:4] == [
        "torchrun", "--nnodes=4", "--nproc-per-node=2", "--master-addr=trial-1-run-0-0.trial-1",
    ]  # fmt: skip
    assert command[command.index("llmscale.cli") + 1 :] == ["pretrain", *PRETRAIN, "cluster.trainer.num_workers=8"]


def test_keys_of_the_launch_are_where_they_belong() -> None:
    words = ["secrets=keys", "queue=research", "service_account=me", "volume=v", "folder=/data", "namespace=ns"]
    words += ["node_selector={kind: big}", "tolerations=['gpu=1:NoSchedule']", "mem_per_node=32Gi", "max_retries=5"]
    found = made("rlhf", RLHF, *(f"launch.{word}" for word in words))
    assert found["metadata"]["namespace"] == "ns" and found["spec"]["backoffLimit"] == 5
    assert found["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research" and found["spec"]["suspend"]
    for name, pod in pods(found):
        spec, inside = pod["spec"], pod["spec"]["containers"][0]
        assert inside["image"] == IMAGE and inside["workingDir"] == "/data"
        assert inside["envFrom"] == [{"secretRef": {"name": "keys"}}]
        assert spec["serviceAccountName"] == "me" and spec["nodeSelector"] == {"kind": "big"}
        assert spec["tolerations"] == [{"key": "gpu", "operator": "Equal", "value": "1", "effect": "NoSchedule"}]
        assert {"name": "work", "persistentVolumeClaim": {"claimName": "v"}} in spec["volumes"]
        assert {"name": "shm", "mountPath": "/dev/shm"} in inside["volumeMounts"]
        assert inside["resources"]["limits"]["memory"] == ("8Gi" if name == "head" else "32Gi")
    assert made("pretrain", PRETRAIN, "launch.queue=q")["spec"]["suspend"] is True


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("launch.namespace=Not_One", "launch.namespace"),
        ("launch.volume=''", "launch.volume"),
        ("launch.secrets=a.b/c", "launch.secrets"),
        ("launch.queue=-x", "launch.queue"),
        ("launch.image='a b'", "launch.image"),
        ("launch.folder=work", "launch.folder"),
        ("launch.folder=/dev/shm", "launch.folder"),
        ("launch.mem_per_node=64GB", "launch.mem_per_node"),
        ("launch.head_mem=0", "launch.head_mem"),
        ("launch.head_cpus=0", "launch.head_cpus"),
        ("launch.node_selector={'a b': c}", "launch.node_selector"),
        ("launch.tolerations=['gpu']", "launch.tolerations"),
        ("launch.role_nodes={rolout: 1}", "launch.role_nodes.rolout"),
        ("launch.secrets_file=x", "launch.secrets_file"),
        ("launch.partition=x", "launch.partition"),
    ],
)
def test_a_launch_that_cannot_be_is_refused(override: str, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose("submit", ["launch=kubernetes", f"launch.image={IMAGE}", override])
    assert caught.value.where == where and caught.value.fix


def test_an_image_is_needed_and_a_run_is_on_the_volume() -> None:
    with pytest.raises(ConfigError) as caught:
        compose("submit", ["launch=kubernetes"])
    assert caught.value.where == "launch.image"
    for folder in ("/elsewhere", "../up"):
        with pytest.raises(ConfigError) as caught:
            made("pretrain", [*PRETRAIN, f"run.dir={folder}"])
        assert caught.value.where == "run.dir" and "launch.folder" in str(caught.value.fix)
    made("pretrain", [*PRETRAIN, "run.dir=/llmscale/mine"])


# ---------------------------------------------------------------- the validator itself, and the examples

Spoil = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("stage", "spoil"),
    [
        ("rlhf", lambda o: o["spec"].update(entryPoint="x")),
        ("rlhf", lambda o: o["spec"].update(backoffLimit="3")),
        ("rlhf", lambda o: o["spec"].update(submissionMode="Http")),
        ("rlhf", lambda o: o["metadata"].update(name="a" * 48)),
        ("rlhf", lambda o: o["metadata"].update(name="7a")),
        ("rlhf", lambda o: o["spec"].update(suspend=True, shutdownAfterJobFinishes=False)),
        ("rlhf", lambda o: o["spec"]["rayClusterSpec"].update(rayVersion="2.51.0")),
        ("rlhf", lambda o: groups(o)[0].update(maxReplicas=0)),
        ("rlhf", lambda o: groups(o)[0]["rayStartParams"].update(resources='"{\\"a\\": 0}"')),
        ("rlhf", lambda o: container(o, 1)["securityContext"].update(allowPrivilegeEscalation=True)),
        ("rlhf", lambda o: container(o, 1).update(imagePullPolice="Always")),
        ("rlhf", lambda o: pods(o)[2][1]["spec"].pop("securityContext")),
        ("rlhf", lambda o: pods(o)[0][1]["spec"].update(automountServiceAccountToken=True)),
        ("pretrain", lambda o: o["spec"].update(replicatedJob=[])),
        ("pretrain", lambda o: pods(o)[0][1]["spec"].update(restartPolicy="OnFailure")),
        ("pretrain", lambda o: container(o)["volumeMounts"].append({"name": "x", "mountPath": "/x"})),
        ("pretrain", lambda o: o["spec"]["failurePolicy"]["rules"][0].update(action="Restart")),
        ("pretrain", lambda o: o["metadata"].update(name="a" * 48)),
        ("pretrain", lambda o: o.update(apiVersion="jobset.x-k8s.io/v1")),
    ],
)
def test_the_validator_sees(stage: str, spoil: Spoil) -> None:
    found = made(stage, RLHF if stage == "rlhf" else PRETRAIN)
    assert faults(found) == []
    spoil(found)
    assert faults(found)


@pytest.mark.parametrize("stage", sorted(EXAMPLES))
def test_the_examples_of_k8s_are_what_is_rendered(stage: str) -> None:
    """To write them again: WRITE=1."""
    words = EXAMPLES[stage]
    launch = [word for word in words if word.startswith("launch")]
    overrides = [word for word in words if word not in launch]
    found = made(stage, overrides, *launch, run_id=f"demo-{stage}")
    assert faults(found) == []
    file = ROOT / "k8s" / f"{stage}.yaml"
    text = to_yaml(found)
    if os.environ.get("WRITE"):
        file.write_text(text)
    assert file.read_text() == text


# ---------------------------------------------------------------- what k8s/ has besides


def documents(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text()))


def test_the_ground_of_k8s_is_valid_and_whole() -> None:
    """Kustomizations name every file beside them that is no example, and each object in those is one that a cluster takes."""
    for folder in (ROOT / "k8s", ROOT / "k8s" / "queue"):
        (kustomization,) = documents(folder / "kustomization.yaml")
        files = {file.name for file in folder.glob("*.yaml")} - {f"{stage}.yaml" for stage in EXAMPLES}
        assert set(kustomization["resources"]) == files - {"kustomization.yaml"}
        for name in kustomization["resources"]:
            for found in documents(folder / name):
                assert faults(found) == [], f"{name}: {found['kind']}"


def test_the_defaults_of_the_launch_are_the_names_of_k8s() -> None:
    objects = {(o["kind"], o["metadata"]["name"]): o for file in (ROOT / "k8s").glob("*.yaml") for o in documents(file)
               if "metadata" in o}  # fmt: skip
    launch = KubernetesLaunch()
    assert ("Namespace", launch.namespace) in objects
    assert objects["PersistentVolumeClaim", launch.volume]["spec"]["accessModes"] == ["ReadWriteMany"]
    selected = objects["NetworkPolicy", "llmscale-operator"]["spec"]["podSelector"]["matchLabels"]
    assert selected.items() <= pods(made("rlhf", RLHF))[0][1]["metadata"]["labels"].items()


def test_the_image_is_of_the_user_of_the_pods_and_holds_no_secret() -> None:
    text = (ROOT / "k8s" / "Dockerfile").read_text()
    user = pods(made("rlhf", RLHF))[0][1]["spec"]["securityContext"]["runAsUser"]
    assert f"USER {user}\n" in text and f"--uid {user} " in text
    assert not [line for line in text.splitlines() if line.startswith(("ARG", "ENV"))]
    copied = [word for line in text.splitlines() if line.startswith("COPY") for word in line.split()[1:-1]]
    ignored = (ROOT / "k8s" / "Dockerfile.dockerignore").read_text().split()
    assert all((ROOT / word).exists() and f"!{word}" in ignored for word in copied)


def test_an_elastic_pool_has_a_group_that_may_shrink() -> None:
    elastic = ["cluster.rollout.min_workers=2", "cluster.rollout.max_workers=6"]
    spec = made("rlhf", [*RLHF, *elastic], "launch.role_nodes={policy: 1, rollout: 3}")["spec"]
    groups = {group["groupName"]: group for group in spec["rayClusterSpec"]["workerGroupSpecs"]}
    sizes = [groups["rollout"][key] for key in ("minReplicas", "replicas", "maxReplicas")]
    assert sizes == [1, 3, 3]  # two workers a pod
    assert groups["policy"]["minReplicas"] == 1
