"""Config: from a command line to typed dataclasses, and back from the frozen file in a run directory.

Dataclasses hold every default, with its type and one line of meaning. Hydra chooses among them and applies YAML and
overrides. A group's dataclasses register here under a name, together with the class that they configure, so that a
config can be composed and checked without importing torch, and nothing that a YAML names is ever instantiated.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import yaml

from llmscale.errors import ConfigError, UsageError

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
        except ImportError as error:
            raise ConfigError(
                f"cannot import plugin {module!r}: {error}", where="plugins", fix="Put its folder on PYTHONPATH."
            ) from error


# ---------------------------------------------------------------- composing


def compose(stage: str, overrides: Sequence[str] = (), config_dir: str | None = None) -> Any:
    """The stage's config dataclass with YAML and overrides applied, complete and checked.

    Raises: ConfigError naming the dotted path and, for an unknown name, the nearest right one.
    """
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    store = ConfigStore.instance()
    for known in _OPTIONS.values():
        group = None if known.group == STAGE else known.group
        store.store(name=f"{known.name}_schema", group=group, node=known.config)
    given = _quote_text(_expand_experiment(overrides, stage), stage)
    composed = _compose_with_hydra(stage, [*_search_path(config_dir), *given])
    try:
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise ConfigError("this value is needed and has no default", where=missing[0], fix=f"Add {missing[0]}=...")
        config = OmegaConf.to_object(composed)
    except ConfigError:
        raise
    except Exception as error:
        raise _explained(error, stage) from error
    check(config)
    return config


def _compose_with_hydra(stage: str, overrides: list[str]) -> Any:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir, initialize_config_module

    # A bare checkout has conf/ beside the package; an installation has it inside, as llmscale.conf.
    if find_spec("llmscale.conf") is not None:
        opened = initialize_config_module(config_module="llmscale.conf", version_base="1.3")
    else:
        opened = initialize_config_dir(str(Path(__file__).parent.parent / "conf"), version_base="1.3")
    with opened:
        try:
            return hydra_compose(config_name=stage, overrides=overrides)
        except Exception as error:
            raise _explained(error, stage) from error


def _search_path(config_dir: str | None) -> list[str]:
    if config_dir is None:
        return []
    folder = Path(config_dir).resolve()
    if not folder.is_dir():
        raise UsageError(f"no such directory: {folder}", where="--config-dir")
    return [f"hydra.searchpath=[file://{folder}]"]


def _expand_experiment(overrides: Sequence[str], stage: str) -> list[str]:
    """An experiment is a folder with one YAML a stage: `experiment=demo` means `experiment=demo/<stage>` here."""
    return [
        f"{o}/{stage}" if re.fullmatch(r"experiment=[\w-]+", o) and o != "experiment=null" else o for o in overrides
    ]


def _quote_text(overrides: Sequence[str], stage: str) -> list[str]:
    """Quote the values of text fields, so that a prompt with a comma or a path with `=` needs no second quoting."""
    text = {path for path, hint in _paths(_OPTIONS[STAGE, stage].config, "") if str in (hint, *typing.get_args(hint))}
    quoted = []
    for override in overrides:
        path, _, value = override.partition("=")
        if path in text and value not in ("", "null", "???") and value[0] not in "\"'":
            escaped = value.replace("\\", "\\\\").replace('"', '\\"')
            override = f'{path}="{escaped}"'
        quoted.append(override)
    return quoted


# ---------------------------------------------------------------- freezing


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values of a config, enums by name, secrets left out."""
    return {f.name: _plain(getattr(config, f.name), f.name) for f in dataclasses.fields(config)}


def _plain(value: Any, key: str = "") -> Any:
    if value is not None and re.search(r"(^|_)(token|secret|password|key)$", key, re.IGNORECASE):
        return "<redacted>"
    if dataclasses.is_dataclass(value):
        return to_dict(value)
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
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return _typed(next(a for a in typing.get_args(hint) if a is not type(None)), value)
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
    return value


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines `path: old -> new` where two frozen configs differ."""
    old_leaves, new_leaves = dict(_leaves(old)), dict(_leaves(new))
    paths = [*old_leaves, *(p for p in new_leaves if p not in old_leaves)]
    absent = "(absent)"
    pairs = [(p, old_leaves.get(p, absent), new_leaves.get(p, absent)) for p in paths]
    return [f"{path}: {before} -> {after}" for path, before, after in pairs if before != after]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# ---------------------------------------------------------------- checking


def check(config: Any) -> None:
    """Ask every dataclass of the tree that has `problems()`; the first one found is raised with its dotted path."""
    for path, what, fix in _problems(config, ""):
        raise ConfigError(what, where=path, fix=fix)


def _problems(config: Any, prefix: str) -> Iterator[Problem]:
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from _problems(value, f"{prefix}{f.name}.")
    if hasattr(config, "problems"):
        for path, what, fix in config.problems():
            yield f"{prefix}{path}", what, fix


def at_least(config: Any, **minimums: float) -> Iterator[Problem]:
    """Problems of numeric fields below their minimum; a field that is None is fine."""
    for name, minimum in minimums.items():
        value = getattr(config, name)
        if value is not None and value < minimum:
            yield name, f"must be at least {minimum}, is {value}", f"Set it to {minimum} or more."


# ---------------------------------------------------------------- explaining


def known_paths(stage: str) -> list[str]:
    """Every dotted path that the stage's config can have, over all options of its groups."""
    return sorted({path for path, _ in _paths(_OPTIONS[STAGE, stage].config, "")})


def _paths(kind: type, prefix: str) -> Iterator[tuple[str, Any]]:
    """Each path with its type."""
    for name, hint in typing.get_type_hints(kind).items():
        yield f"{prefix}{name}", hint
        for arg in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(arg) and isinstance(arg, type):
                choices = [o.config for o in _OPTIONS.values() if issubclass(o.config, arg)]
                for choice in [arg, *choices]:
                    yield from _paths(choice, f"{prefix}{name}.")


def nearest(path: str, candidates: Sequence[str]) -> str | None:
    """The candidate most like `path`: the same last name elsewhere first, then the closest spelling."""
    leaf = path.rsplit(".", 1)[-1]
    same_leaf = [c for c in candidates if c.rsplit(".", 1)[-1] == leaf and c != path]
    found = difflib.get_close_matches(path, same_leaf or candidates, n=1, cutoff=0.0 if same_leaf else 0.6)
    return found[0] if found else None


def _explained(error: Exception, stage: str) -> ConfigError:
    """Hydra's and OmegaConf's errors as one line with the dotted path and the nearest right name."""
    from hydra.errors import MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, OverrideParseException):
        what = f"cannot parse the override: {str(error).splitlines()[0]}"
        fix = "Write it as path=value; a value with =, a comma or brackets in it as 'path=\"value\"'."
        return ConfigError(what, where=error.override, fix=fix)
    if isinstance(error, MissingConfigException):
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        choices = [str(o) for o in error.options or []]
        found = difflib.get_close_matches(name, choices, n=1)
        hint = f"Did you mean {group}={found[0]}? " if found else ""
        listed = ", ".join(c for c in choices if not c.endswith("_schema"))
        return ConfigError(f"there is no {name!r} here", where=group or stage, fix=f"{hint}There is: {listed}.")
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    message = str(cause).split("\n")[0]
    overridden = re.search(r"Could not override '([^']+)'", str(error))
    path = getattr(cause, "full_key", None) or (overridden.group(1) if overridden else None)
    unknown = re.search(r"not in|No match", f"{error} {cause}") is not None
    if path is None or not unknown:
        return ConfigError(message, where=path, fix="llmscale STAGE --cfg job shows every value with its path.")
    found_path = nearest(path, [*known_paths(stage), *groups()])
    fix = f"Did you mean {found_path}?" if found_path else "llmscale STAGE --cfg job shows every path."
    return ConfigError("there is no such key", where=path, fix=fix)
