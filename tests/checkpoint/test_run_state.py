"""The run state: what is registered comes back, and nothing else does."""

from __future__ import annotations

import pickle
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmscale.checkpoint.run_state import FILE, RunState
from llmscale.errors import CheckpointError
from llmscale.protocols import Stateful


class Part:
    def __init__(self, state: dict[str, Any]):
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def run_state(**parts: Stateful) -> RunState:
    state = RunState()
    for name, part in parts.items():
        state.register(name, part)
    return state


def test_each_component_gets_its_own_part(tmp_path: Path):
    numpy_rng = np.random.default_rng(0).bit_generator.state  # integers of 128 bits
    ledger = {"next": 7, "open": [1, 2], "note": "ü", "rate": 0.5, "none": None, "done": True, "by_id": {3: (1, 2)}}
    rng: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.Random(1).getstate(), "numpy": numpy_rng}
    run_state(ledger=Part(ledger), rng=Part(rng)).save(tmp_path)
    first, second = Part({}), Part({})
    run_state(rng=second, ledger=first).load(tmp_path)
    assert first.state == ledger
    assert torch.equal(second.state.pop("torch"), rng.pop("torch"))
    assert second.state == rng


def test_the_state_of_a_real_optimizer_and_schedule_comes_back(tmp_path: Path):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    run_state(optimizer=optimizer, schedule=schedule).save(tmp_path)
    fresh = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))], lr=0.2)
    run_state(optimizer=fresh, schedule=torch.optim.lr_scheduler.StepLR(fresh, 10)).load(tmp_path)
    assert fresh.param_groups[0]["lr"] == 0.1
    assert torch.equal(fresh.state_dict()["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


@pytest.mark.parametrize(
    ("in_file", "in_run", "problem"),
    [
        ([], ["kl"], "this run: it has no state of kl$"),
        (["ema"], [], "this run: it has state of ema, which this run lacks$"),
        (["ema"], ["kl"], "this run: it has no state of kl; it has state of ema, which this run lacks$"),
    ],
)
def test_another_set_of_components_is_refused_and_nothing_changes(
    tmp_path: Path, in_file: list[str], in_run: list[str], problem: str
):
    run_state(ledger=Part({"n": 1}), **{name: Part({}) for name in in_file}).save(tmp_path)
    ledger = Part({"n": 0})
    with pytest.raises(CheckpointError) as caught:
        run_state(ledger=ledger, **{name: Part({}) for name in in_run}).load(tmp_path)
    assert re.search(problem, caught.value.what)
    assert ledger.state == {"n": 0}


def test_a_name_is_registered_once():
    state = run_state(ledger=Part({}))
    with pytest.raises(CheckpointError, match="'ledger'"):
        state.register("ledger", Part({}))


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (np.zeros(2), r"^buffer\.items\[1\]: state of type numpy\.ndarray"),
        (np.float64(1.0), r"^buffer\.items\[1\]: state of type numpy\.float64"),
        (Path("x"), r"^buffer\.items\[1\]: state of type pathlib"),
        ({(1, 2): 3}, r"^a key of buffer\.items\[1\]: state of type builtins\.tuple"),
    ],
)
def test_what_could_not_be_read_back_is_refused_when_it_is_saved(tmp_path: Path, value: Any, where: str):
    with pytest.raises(CheckpointError, match=where):
        run_state(buffer=Part({"items": [1, value]})).save(tmp_path)
    assert not (tmp_path / FILE).exists()


class Planted:
    def __reduce__(self):
        return print, ("code from a checkpoint ran",)


def test_a_checkpoint_cannot_run_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.save({"ledger": Planted()}, tmp_path / FILE)
    with pytest.raises(CheckpointError, match="cannot be read"):
        run_state(ledger=Part({})).load(tmp_path)
    assert capsys.readouterr().out == ""


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content", [None, b"", b"no archive at all", pickle.dumps([1])])
def test_an_unreadable_file_is_named(tmp_path: Path, content: bytes | None):
    if content is not None:
        (tmp_path / FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"state\.pt: the run state"):
        run_state(ledger=Part({})).load(tmp_path)
