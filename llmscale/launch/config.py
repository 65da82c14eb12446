"""How a run is started elsewhere than in this shell: `llmscale submit STAGE launch=NAME`. It is no part of a run's own
config, which stays what it was on the laptop."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from llmscale.config import STAGE, Problem, at_least, option

ROLES = ("policy", "critic", "reference", "reward", "rollout")
_TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}")  # sbatch(1)
# What the script writes itself: a second line of it would win or lose by its place.
_OWN = re.compile(
    r"--(job-name|comment|nodes|ntasks|ntasks-per-node|requeue|no-requeue|open-mode|signal|output|error|time|array)\b|-[JNnoeta]"
)

_LONGEST_LEAD_S = 65536  # sbatch(1), --signal
_LONGEST_NAME = 63
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")  # DNS-1123
_LABEL = re.compile(r"([a-z0-9][a-z0-9.-]{0,251}[a-z0-9]/)?[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?", re.ASCII)
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?)?", re.ASCII)
_QUANTITY = re.compile(r"[1-9]\d*(Ki|Mi|Gi|Ti|k|M|G|T)?", re.ASCII)
TAINT = re.compile(
    rf"(?P<key>{_LABEL.pattern})(=(?P<value>{_LABEL_VALUE.pattern}))?"
    r":(?P<effect>NoSchedule|PreferNoSchedule|NoExecute)",
    re.ASCII,
)


def seconds(limit: str) -> int:
    """Of a time limit as sbatch takes it: minutes[:seconds], hours:minutes:seconds or days-hours[:minutes[:seconds]]."""
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:
        parts = [0, *parts]  # of hours
    hours, minutes, own = [*parts, 0, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + own


@dataclass
class LaunchConfig:
    name: str = MISSING
    # Further attempts after ones that failed or got no further; one that saved and got further is free. A failed one is
    # repeated only when it had got further.
    max_retries: int = 3

    def problems(self) -> Iterator[Problem]:
        yield from at_least(self, max_retries=0)


@dataclass
class ScriptLaunch(LaunchConfig):
    """What runs as a script, in the folder from which it is submitted."""

    secrets_file: str | None = (
        None  # NAME=value lines for the job's environment; nobody but you may read it (mode 0600)
    )


@dataclass
class NodesLaunch(LaunchConfig):
    """What takes nodes of its own; on Kubernetes a node is a pod. Ranks and workers are those of `cluster`; here stands on
    what nodes they run."""

    # null: 1, or the sum of role_nodes; on Kubernetes, where neither is given, one for each role. A supervised stage has as
    # many ranks on each
    nodes: int | None = None
    role_nodes: dict[str, int] = field(
        default_factory=dict
    )  # role -> nodes for it alone, as in {policy: 2, rollout: 6}
    gpus_per_node: int | None = None  # null: what the workers of `cluster` ask for
    cpus_per_node: int | None = None  # null: what the workers of `cluster` ask for
    mem_per_node: str | None = None  # as in 64G, on Kubernetes 64Gi; null: what the site gives
    signal_lead_s: int = 120  # how long before its end the job is told; a step and a save have to fit in

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from at_least(self, nodes=1, gpus_per_node=0, cpus_per_node=1, signal_lead_s=1)
        for role, number in self.role_nodes.items():
            if role not in ROLES:
                yield f"role_nodes.{role}", "is no role", f"There is: {', '.join(ROLES)}."
            elif number < 1:
                yield f"role_nodes.{role}", f"must be at least 1, is {number}", "Leave the role out to let it share."
        own = sum(self.role_nodes.values())
        if self.nodes is not None and self.nodes < own:
            yield "nodes", f"{self.nodes} nodes are fewer than the {own} of role_nodes", f"Set it to {own} or more."


@option("launch", "local")
@dataclass
class LocalLaunch(ScriptLaunch):
    """On this machine, detached: it goes on when the shell is closed."""

    name: str = "local"


class Container(Enum):
    """What holds the job's Python on the nodes."""

    venv = "venv"  # the environment that submits, at the same path on every node
    pyxis = "pyxis"  # srun --container-image
    apptainer = "apptainer"  # apptainer exec


@option("launch", "slurm")
@dataclass
class SlurmLaunch(NodesLaunch, ScriptLaunch):
    """One job of Slurm."""

    name: str = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None  # features of the nodes
    exclude: str | None = None  # nodes that it must not get
    time: str = "24:00:00"  # of one attempt; the job saves before it is over and goes back into the queue
    gres: str | None = None  # in place of gpus_per_node, where the site wants it so, as in gpu:a100:8
    exclusive: bool = False  # nobody else on the nodes
    extra: list[str] = field(default_factory=list)  # more options of sbatch, as in ['--reservation=night']
    container: Container = Container.venv
    image: str | None = None  # of the container
    mounts: list[str] = field(default_factory=list)  # folders for the container beside this one and the run directory

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if not _TIME.fullmatch(self.time):
            yield "time", f"{self.time!r} is no time limit", "Write minutes, hours:minutes:seconds or days-hours."
        elif self.signal_lead_s >= min(seconds(self.time), _LONGEST_LEAD_S):
            what = f"{self.signal_lead_s} s before the end of {self.time} is no time at which a job can be told"
            yield "signal_lead_s", what, f"Set it below the time limit, and below {_LONGEST_LEAD_S}."
        for name in ("partition", "account", "qos", "constraint", "exclude", "gres", "mem_per_node"):
            value = getattr(self, name)
            if value is not None and (not value or any(c.isspace() for c in value)):
                yield name, f"{value!r} is not one word", "sbatch takes it without spaces."
        for line in self.extra:
            if not line.startswith("-") or "\n" in line:
                yield "extra", f"{line!r} is no option of sbatch", "Write ['--name=value']."
            elif found := _OWN.match(line):
                yield "extra", f"{found[0]} is set by llmscale itself", "Use its own key of launch, or leave it out."
        if (self.image is None) != (self.container is Container.venv):
            fix = "Give launch.image with launch.container=pyxis or apptainer."
            yield "image", f"container {self.container.name} and image {self.image} do not go together", fix


@option("launch", "kubernetes")
@dataclass
class KubernetesLaunch(NodesLaunch):
    """Pods of a cluster: RLHF, collect and rollout as a RayJob of KubeRay, all else as a JobSet."""

    name: str = "kubernetes"
    image: str = MISSING  # as made by k8s/Dockerfile; best by digest, registry/llmscale@sha256:...
    context: str | None = None  # of the kubeconfig; null: the current one
    namespace: str = "llmscale"
    volume: str = "llmscale-runs"  # a PersistentVolumeClaim that many nodes may write to
    folder: str = "/llmscale"  # where the pods have it, and work: relative paths of the command lie there
    secrets: str | None = None  # a Secret; its entries are variables in the environment of every pod
    queue: str | None = None  # a LocalQueue of Kueue
    service_account: str | None = None  # null: the namespace's default one; its token is in no pod
    node_selector: dict[str, str] = field(default_factory=dict)  # labels of the nodes
    tolerations: list[str] = field(default_factory=list)  # taints to put up with, as in ['gpu=true:NoSchedule']
    head_cpus: int = 2  # of the pod of Ray's head and of the driver, which has no worker
    head_mem: str = "8Gi"

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from at_least(self, head_cpus=1)
        for key in ("namespace", "volume", "secrets", "queue", "service_account"):
            value = getattr(self, key)
            if value is not None and not (_NAME.fullmatch(value) and len(value) <= _LONGEST_NAME):
                yield key, f"{value!r} is no name of Kubernetes", "Use lower-case letters, digits and - alone."
        for key in ("mem_per_node", "head_mem"):
            value = getattr(self, key)
            if value is not None and not _QUANTITY.fullmatch(value):
                yield key, f"{value!r} is no amount of memory", "Write 500Mi, 64Gi or bytes."
        if not self.image or any(c.isspace() for c in self.image):
            yield "image", f"{self.image!r} names no image", "Write registry/name:tag or registry/name@sha256:..."
        if not self.folder.startswith("/") or self.folder.strip("/") in ("", "tmp", "dev/shm") or ":" in self.folder:
            yield "folder", f"{self.folder!r} is no place for a volume", "Write an absolute path, such as /llmscale."
        for label, value in self.node_selector.items():
            if not _LABEL.fullmatch(label) or not _LABEL_VALUE.fullmatch(value):
                yield "node_selector", f"{label}={value} is no label", "`kubectl get nodes --show-labels` lists them."
        for taint in self.tolerations:
            if not TAINT.fullmatch(taint):
                yield "tolerations", f"{taint!r} is no taint", "Write [key=value:NoSchedule] or [key:NoExecute]."


@option(STAGE, "submit", builds="llmscale.launch.submit:run")
@dataclass
class SubmitConfig:
    """Where a stage runs. `submit` composes it from the overrides that begin with `launch`; the rest is the stage's."""

    stage: str = "submit"
    launch: LaunchConfig = MISSING
