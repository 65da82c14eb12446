"""What the policy speaks with while it writes a completion: a tool, a game, a person who is simulated."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple, Protocol

from llmscale.config import from_file
from llmscale.errors import ConfigError
from llmscale.rollout.config import ClassConfig


class Observation(NamedTuple):
    """What the policy is told, what its turn was worth (for `reward=environment`), and whether that was the last: then it is
    told nothing."""

    text: str = ""
    done: bool = False
    reward: float = 0.0


class Environment(Protocol):
    """One episode; every sample has an object of its own.

    What it says must depend on nothing but the prompt and what the policy said, or a run that is resumed is not the run that
    was interrupted. An exception leaves the sample out of the step, with the exception as the reason. So does a call that
    takes too long, but Python cannot end that: bound what you compute.
    """

    def reset(self, prompt: str, fields: Mapping[str, Any]) -> None:
        """Begin. `fields` are the columns of the prompt's record."""
        ...

    def step(self, said: str) -> Observation:
        """Answer what the policy said in this turn, special tokens left out."""
        ...


def own(config: ClassConfig) -> Environment:
    """Raises: ConfigError where the file does not define such a class, or the class cannot be called without arguments."""
    kind = _of(config.path)
    try:
        environment: Environment = kind()
    except Exception as error:  # the user's code may raise anything
        what = f"cannot make {config.path}: {type(error).__name__}: {error}"
        raise ConfigError(what, where="environment.path", fix="It is made without arguments.") from error
    return environment


@cache
def _of(path: str) -> type:
    found: type = from_file(path, "environment.path")
    lacking = [name for name in ("reset", "step") if not callable(getattr(found, name, None))]
    if lacking:
        what = f"{path} has no method {' and no method '.join(lacking)}"
        raise ConfigError(what, where="environment.path", fix="See llmscale/rollout/environment.py.")
    return found
