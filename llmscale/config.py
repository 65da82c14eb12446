"""Config as typed dataclasses: the registry of a group's options, freezing into a run directory and back, and checks.

Dataclasses hold every default, with its type and one line of meaning. A group's dataclasses register here under a name,
together with the class that they configure, so that a config can be composed (`llmscale/compose.py`) and checked without
importing torch, and nothing that a YAML names is ever instantiated.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import yaml

from llmscale.errors import ConfigError, LlmscaleError

T = TypeVar("T")
Problem = tuple[str, str, str]  # dotted path within the object, what is wrong, what to do


@dataclass(frozen=True)
class Option:
    """One choice of a config group: its dataclass, and `module:Class` of what it configures."""

    group: str
    name: str
    config: type
    builds: str | None


_OPTIONS: dict[tuple[str, str], Option] = {}
STAGE = "stage"  # the group of primary configs; a stage's dataclass is the root of its config


def option(group: str, name: str, builds: str | None = None) -> Callable[[type[T]], type[T]]:
    """Register a config dataclass as `group=name`; `builds` names the class that takes it as first argument."""

    def register(config: type[T]) -> type[T]:
        known = _OPTIONS.get((group, name))
        if known is not None and known.config.__qualname__ != config.__qualname__:
            raise ConfigError(f"{group}={name} is registered twice, by {known.config} and {config}")
        _OPTIONS[group, name] = Option(group, name, config, builds)
        return config

    return register


def options(group: str) -> dict[str, Option]:
    return {o.name: o for o in _OPTIONS.values() if o.group == group}


def all_options() -> list[Option]:
    return list(_OPTIONS.values())


def groups() -> list[str]:
    return sorted({o.group for o in _OPTIONS.values()} - {STAGE})


def build(config: Any, *args: Any, **kwargs: Any) -> Any:
    """Make what `config` configures: `Class(config, *args, **kwargs)` of its registered `module:Class`."""
    found = next((o for o in _OPTIONS.values() if o.config is type(config)), None)
    if found is None or found.builds is None:
        raise ConfigError(f"nothing is registered to build from {type(config).__name__}")
    module, _, name = found.builds.partition(":")
    return getattr(importlib.import_module(module), name)(config, *args, **kwargs)


def import_plugins(modules: Sequence[str]) -> None:
    """Import the modules that the user allowed by name; they register their own options."""
    for module in modules:
        try:
            importlib.import_module(module)
        except LlmscaleError:
            raise
        except Exception as error:  # the user's code may raise anything
            what = f"cannot import plugin {module!r}: {type(error).__name__}: {error}"
            raise ConfigError(what, where="plugins", fix="Put its folder on PYTHONPATH, or mend it.") from error


def from_file(path: str, where: str) -> Any:
    """What a Python file of the user's calls NAME, where `path` is FILE.py:NAME and the value of the key `where`.

    Raises: ConfigError when there is no such file or name, or the file cannot be run.
    """
    file, _, name = path.rpartition(":")
    spec = importlib.util.spec_from_file_location(f"llmscale_user:{Path(file).resolve()}", file)
    if spec is None or spec.loader is None or not Path(file).is_file():
        raise ConfigError(f"no such file: {file}", where=where, fix="Give it as FILE.py:NAME.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's file may fail in any way
        raise ConfigError(f"cannot run {file}: {type(error).__name__}: {error}", where=where) from error
    if not callable(getattr(module, name, None)):
        raise ConfigError(f"{file} defines no {name!r}", where=where)
    return getattr(module, name)


# ---------------------------------------------------------------- freezing


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values of a config, enums by name, secrets left out."""
    return {f.name: _plain(getattr(config, f.name), f.name) for f in dataclasses.fields(config)}


def _plain(value: Any, key: str = "") -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if value is not None and re.search(r"(^|_)(token|secret|password|key)$", key, re.IGNORECASE):
        return "<redacted>"
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Mapping):
        return {k: _plain(v, str(k)) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def to_yaml(config: Any) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def load(path: Path) -> Any:
    """The config dataclass of a frozen file."""
    values = yaml.safe_load(path.read_text())
    import_plugins(values.get("plugins") or [])
    return from_dict(_OPTIONS[STAGE, values["stage"]].config, values)


def from_dict(kind: type[T], values: Mapping[str, Any]) -> T:
    """Inverse of `to_dict`; a field of a group's base class becomes the dataclass registered under its `name`."""
    hints = typing.get_type_hints(kind)
    return kind(**{key: _typed(hints[key], value) for key, value in values.items()})


def _typed(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    if len(members(hint)) > 1:
        return _typed(next(m for m in members(hint) if m is not type(None)), value)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint[value]
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        for known in _OPTIONS.values():
            if known.name == value.get("name") and issubclass(known.config, hint):
                return from_dict(known.config, value)
        return from_dict(hint, value)
    args = typing.get_args(hint)
    if isinstance(value, list):
        return [_typed(args[0], v) if args else v for v in value]
    if isinstance(value, Mapping):
        return {k: _typed(args[1], v) if args else v for k, v in value.items()}
    return value


def members(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type that it is."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines `path: old -> new` where two frozen configs differ."""
    old_leaves, new_leaves = dict(leaves(old)), dict(leaves(new))
    paths = [*old_leaves, *(p for p in new_leaves if p not in old_leaves)]
    absent = "(absent)"
    pairs = [(p, old_leaves.get(p, absent), new_leaves.get(p, absent)) for p in paths]
    return [f"{path}: {before} -> {after}" for path, before, after in pairs if before != after]


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of a config's plain values."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# ---------------------------------------------------------------- checking


def check(config: Any) -> None:
    """Ask every dataclass of the tree that has `problems()`; the first one found is raised with its dotted path."""
    for path, what, fix in _problems(config, ""):
        raise ConfigError(what, where=path, fix=fix)


def _problems(config: Any, prefix: str) -> Iterator[Problem]:
    known = next((o for o in _OPTIONS.values() if o.config is type(config)), None)
    if known is not None and known.group != STAGE and config.name != known.name:
        yield f"{prefix}name", "is not set, but chosen", f"Write {prefix.rstrip('.')}={config.name}."
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    items = {
        f"{name}.{key}": v for name, value in fields.items() if isinstance(value, dict) for key, v in value.items()
    }
    for name, value in (fields | items).items():
        if dataclasses.is_dataclass(value):
            yield from _problems(value, f"{prefix}{name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{prefix}{name}", f"must be a finite number, is {value}", "Give it in digits."
    if hasattr(config, "problems"):
        for path, what, fix in config.problems():
            yield f"{prefix}{path}", what, fix


def at_least(config: Any, **minimums: float) -> Iterator[Problem]:
    """Problems of numeric fields below their minimum; a field that is None is fine."""
    for name, minimum in minimums.items():
        value = getattr(config, name)
        if value is not None and value < minimum:
            yield name, f"must be at least {minimum}, is {value}", f"Set it to {minimum} or more."
