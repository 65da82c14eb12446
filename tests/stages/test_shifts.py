"""Roles that share a device have it by turns, and the numbers are those of a run that shares nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmscale.cluster.local import LocalPool
from llmscale.stages.roles import Colocatable
from llmscale.stages.shifts import Shifts
from tests.stages.runs import arguments, from_chain, records, succeed, weights, without_times
from tests.stages.test_on_ray import weight_difference

PAIR = "cluster.colocated=[policy,rollout]"
SHORT = "training.num_steps=3"


class Device(list):
    """Which roles have been on it, and left it."""

    def role(self, name: str) -> Colocatable:
        role = Colocatable()
        role.engine = Turner(name, self)
        return role


class Turner:
    def __init__(self, name: str, device: Device):
        self.name, self.device = name, device

    def sleep(self) -> None:
        self.device.append(f"-{self.name}")

    def wake(self) -> None:
        self.device.append(f"+{self.name}")


def test_who_leaves_is_gone_before_another_comes() -> None:
    device, told = Device(), []
    pools = {name: LocalPool(name, lambda name=name: device.role(name)) for name in ("policy", "critic", "rollout")}
    shifts = Shifts(
        ["policy", "rollout", "critic"], pools, lambda kind, **details: told.append((kind, details["role"]))
    )
    for begin in (shifts.of_rollouts, shifts.of_rollouts, shifts.of_training, shifts.of_training, shifts.of_rollouts):
        begin()
    assert device == ["+rollout", "-rollout", "+policy", "+critic", "-policy", "-critic", "+rollout"]
    assert told == [("colocated", "rollout"), ("colocated", "policy"), ("colocated", "critic")]
    Shifts([], {}, lambda *_, **__: None).of_training()


def test_colocated_and_separate_runs_have_the_same_numbers(chain: Path, tmp_path: Path) -> None:
    """In one process bit for bit, also saved and evaluated between two updates."""
    runs = {name: tmp_path / name / "demo" / "rlhf" for name in ("separate", "colocated")}
    for name, overrides in {"separate": [], "colocated": [PAIR, "cluster.transport=file"]}.items():
        log = tmp_path / f"{name}.log"
        succeed(arguments("rlhf", tmp_path / name, *from_chain("rlhf", chain), SHORT, *overrides), log)
    separate, colocated = (without_times(records(runs[name] / "metrics.jsonl")) for name in ("separate", "colocated"))
    assert separate == colocated and weights(runs["separate"]) == weights(runs["colocated"])
    told = {e["role"]: e["note"] for e in records(runs["colocated"] / "events.jsonl") if e["kind"] == "colocated"}
    assert told == {"policy": "on a CPU nothing is moved", "rollout": "on a CPU nothing is moved"}


@pytest.mark.slow
def test_colocated_on_ray_and_separate_runs_have_the_same_numbers(chain: Path, tmp_path: Path) -> None:
    """With DeepSpeed and files."""
    runs = {name: tmp_path / name / "demo" / "rlhf" for name in ("separate", "ray")}
    succeed(arguments("rlhf", tmp_path / "separate", *from_chain("rlhf", chain), SHORT), tmp_path / "separate.log")
    on_ray = arguments("rlhf", tmp_path / "ray", *from_chain("rlhf", chain), SHORT, "cluster.transport=file")
    instead = {"cluster=local": "cluster=colocated", "engine=single": "engine=deepspeed"}
    succeed([instead.get(argument, argument) for argument in on_ray], tmp_path / "ray.log")
    assert weight_difference(runs["ray"], runs["separate"]) < 1e-3
    assert not (runs["ray"] / "weights").exists()
