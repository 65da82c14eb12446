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
    r"--(job-name|comment|nodes|ntasks|ntasks-per-node|requeue|no-requeue|open-mode|signal|output|error|time)\b"
)


@dataclass
class LaunchConfig:
    name: str = MISSING
    # Further attempts after ones that failed or got no further; one that saved and got further is free. A failed one is
    # repeated only when it had got further.
    max_retries: int = 3
    secrets_file: str | None = (
        None  # NAME=value lines for the job's environment; nobody but you may read it (mode 0600)
    )

    def problems(self) -> Iterator[Problem]:
        yield from at_least(self, max_retries=0)


@option("launch", "local")
@dataclass
class LocalLaunch(LaunchConfig):
    """On this machine, detached: it goes on when the shell is closed."""

    name: str = "local"


class Container(Enum):
    """What holds the job's Python on the nodes."""

    venv = "venv"  # the environment that submits, at the same path on every node
    pyxis = "pyxis"  # srun --container-image
    apptainer = "apptainer"  # apptainer exec


@option("launch", "slurm")
@dataclass
class SlurmLaunch(LaunchConfig):
    """One job of Slurm. Ranks and workers are those of `cluster`; here stands on what nodes they run."""

    name: str = "slurm"
    nodes: int | None = None  # null: 1, or the sum of role_nodes. A supervised stage has as many ranks on each
    role_nodes: dict[str, int] = field(
        default_factory=dict
    )  # role -> nodes for it alone, as in {policy: 2, rollout: 6}
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None  # features of the nodes
    exclude: str | None = None  # nodes that it must not get
    time: str = "24:00:00"  # of one attempt; the job saves before it is over and goes back into the queue
    gpus_per_node: int | None = None  # null: what the workers of `cluster` ask for
    cpus_per_node: int | None = None  # null: what the workers of `cluster` ask for
    mem_per_node: str | None = None  # as in 64G; null: what the site gives
    gres: str | None = None  # in place of gpus_per_node, where the site wants it so, as in gpu:a100:8
    exclusive: bool = False  # nobody else on the nodes
    signal_lead_s: int = 120  # how long before its end the job is told; a step and a save have to fit in
    extra: list[str] = field(default_factory=list)  # more options of sbatch, as in ['--reservation=night']
    container: Container = Container.venv
    image: str | None = None  # of the container
    mounts: list[str] = field(default_factory=list)  # folders for the container beside this one and the run directory

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
        if not _TIME.fullmatch(self.time):
            yield "time", f"{self.time!r} is no time limit", "Write minutes, hours:minutes:seconds or days-hours."
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


@option(STAGE, "submit", builds="llmscale.launch.submit:run")
@dataclass
class SubmitConfig:
    """Where a stage runs. `submit` composes it from the overrides that begin with `launch`; the rest is the stage's."""

    stage: str = "submit"
    launch: LaunchConfig = MISSING
