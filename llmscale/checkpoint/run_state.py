"""The run state: everything beside weights and optimizer that must survive a restart, in one file, whole or not at all.

It is read with `weights_only=True`, so that a checkpoint cannot run code; what that cannot read back is refused when
it is written, not when it is needed.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmscale.errors import CheckpointError
from llmscale.protocols import State, Stateful

FILE = "state.pt"


class RunState:
    """Named components that are saved and restored together."""

    def __init__(self) -> None:
        self._components: dict[str, Stateful] = {}

    def register(self, name: str, component: Stateful) -> None:
        if name in self._components:
            raise CheckpointError(f"two components of the run state are called {name!r}")
        self._components[name] = component

    def save(self, path: Path) -> None:
        """Write every component's state into `path`/state.pt."""
        self.snapshot()(path)

    def snapshot(self) -> Callable[[Path], None]:
        """Every component's state as it is now; what this returns writes it into `path`/state.pt, at any time."""
        states = {name: component.state_dict() for name, component in self._components.items()}
        for name, state in states.items():
            _check(state, name)
        return lambda path: _write(states, path / FILE)

    def load(self, path: Path) -> None:
        """Give each component its state from `path`/state.pt, tensors on the CPU.

        Raises: CheckpointError, before any component has changed, when the file holds other components than these.
        """
        states = read_states(path)
        missing = sorted(self._components.keys() - states.keys())
        unknown = sorted(states.keys() - self._components.keys())
        if missing or unknown:
            problems = [f"it has no state of {name}" for name in missing]
            problems += [f"it has state of {name}, which this run lacks" for name in unknown]
            raise CheckpointError(
                f"the run state does not fit this run: {'; '.join(problems)}",
                where=str(path / FILE),
                fix="Resume with the config and the version that wrote it.",
            )
        for name, component in self._components.items():
            component.load_state_dict(states[name])


def _write(states: dict[str, State], file: Path) -> None:
    with file.open("wb") as opened:  # given a path, torch does not tell why it cannot write
        torch.save(states, opened)


def read_states(path: Path) -> dict[str, State]:
    """The state of each component in `path`/state.pt, tensors on the CPU.

    Raises: CheckpointError when the file cannot be read.
    """
    file = path / FILE
    try:
        states: dict[str, State] = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise CheckpointError(
            f"the run state cannot be read: {reason}",
            where=str(file),
            fix="Resume from another checkpoint.",
        ) from error
    return states


def _check(value: Any, where: str) -> None:
    """Raises: CheckpointError unless `value` is made of JSON values and tensors (tuples and int keys pass too).

    Types are compared exactly: a numpy.float64 is a float, and yet could not be read back.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            if type(key) not in (str, int):
                raise _unsavable(key, f"a key of {where}")
            _check(item, f"{where}.{key}")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check(item, f"{where}[{index}]")
    elif not (isinstance(value, Tensor) or type(value) in (str, int, float, bool, type(None))):
        raise _unsavable(value, where)


def _unsavable(value: Any, where: str) -> CheckpointError:
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    return CheckpointError(
        f"state of type {kind} cannot be saved", where=where, fix="state_dict() returns JSON values and tensors only."
    )
