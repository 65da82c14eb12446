"""From a command line to a stage's config: Hydra chooses among the registered dataclasses and applies YAML and overrides. What
is wrong with a command is one ConfigError, with the dotted path and what is right there.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from llmscale.config import STAGE, Option, all_options, check, import_plugins, members, options
from llmscale.errors import ConfigError, UsageError

EXPERIMENT = "experiment"
_IN_QUOTES = re.compile(r"""(["'])(\\.|(?!\1)[^\\])*\1""", re.DOTALL)


def compose(stage: str, overrides: Sequence[str] = (), config_dir: str | None = None) -> Any:
    """The stage's config dataclass with YAML and overrides applied, complete and checked.

    Raises: ConfigError naming the dotted path and, for an unknown name, the nearest right one.
    """
    from omegaconf import OmegaConf

    given = _as_hydra(overrides, stage, config_dir)
    composed = compose_unchecked(stage, given, config_dir)
    try:
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise _missing(missing[0], stage)
        config: Any = OmegaConf.to_object(composed)
    except ConfigError:
        raise
    except Exception as error:
        raise _explained(error, stage, given) from error
    import_plugins(getattr(config, "plugins", []))  # a worker will; better to fail here
    if config.stage != stage:
        raise ConfigError(f"is {stage} here, not {config.stage}", where="stage", fix="The command names the stage.")
    check(config)
    return config


def compose_unchecked(stage: str, overrides: Sequence[str] = (), config_dir: str | None = None) -> Any:
    """What Hydra makes of it: values may be missing or impossible together."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    for known in all_options():
        _store_schema(known)
    shipped, *own = _config_dirs(config_dir)
    search = [f"hydra.searchpath=[{_quoted(f'file://{folder}')}]" for folder in own]
    with initialize_config_dir(str(shipped), version_base="1.3"):
        try:
            return hydra_compose(config_name=stage, overrides=[*search, *overrides])
        except Exception as error:
            twice = re.search(r"Multiple values for ([\w.@]*\w)", str(error))  # an experiment has that part already
            again = [o[1:] if twice and o.startswith(f"+{twice[1]}=") else o for o in overrides]
            if again == list(overrides):
                raise _explained(error, stage, overrides) from error
    return compose_unchecked(stage, again, config_dir)


@cache
def _store_schema(known: Option) -> None:
    from hydra.core.config_store import ConfigStore

    group = None if known.group == STAGE else known.group
    ConfigStore.instance().store(name=f"{known.name}_schema", group=group, node=known.config)


def _config_dirs(config_dir: str | None) -> list[Path]:
    """The shipped tree and the user's own, if there is one."""
    # A bare checkout has conf/ beside the package; an installation has it inside, as llmscale.conf.
    installed = find_spec("llmscale.conf")
    shipped = Path(installed.origin).parent if installed and installed.origin else Path(__file__).parent.parent / "conf"
    if config_dir is None:
        return [shipped]
    folder = Path(config_dir).resolve()
    if not folder.is_dir():
        raise UsageError(f"no such directory: {folder}", where="--config-dir", fix="Name a folder of config groups.")
    return [shipped, folder]


def choices(group: str, config_dir: str | None = None) -> list[str]:
    """What `group=` can be: the YAML files of the group, or the folders of the group `experiment`."""
    entries = [entry for folder in _config_dirs(config_dir) for entry in (folder / group).glob("[!._]*")]
    return sorted({e.stem for e in entries if (e.is_dir() if group == EXPERIMENT else e.suffix == ".yaml")})


def defaults(stage: str) -> dict[str, str | None]:
    """The groups that a stage chooses from, and what it chooses by itself."""
    shipped = yaml.safe_load((_config_dirs(None)[0] / f"{stage}.yaml").read_text(encoding="utf-8"))
    return {group: name for entry in shipped["defaults"] if isinstance(entry, dict) for group, name in entry.items()}


def _as_hydra(overrides: Sequence[str], stage: str, config_dir: str | None) -> list[str]:
    """Overrides as Hydra wants them.

    A prompt with a comma or a path with `=` needs no second quoting. A key of an open mapping needs no `+`, and no
    other key may be added. `group=null` takes a choice back. `experiment=demo` is `experiment=demo/<stage>` here.
    """
    hints = dict(_paths(options(STAGE)[stage].config, ""))
    given = []
    for override in overrides:
        path, equals, value = override.partition("=")
        path = path.lstrip("+")
        if not equals or not path or path.startswith("~"):
            fix = "Write path=value; a value can be null, but no key can be taken away."
            raise ConfigError("this is not path=value", where=override, fix=fix)
        if path == EXPERIMENT:
            value = _experiment(value, stage, config_dir)
        general = _general(path, hints)
        group = _group_of(hints.get(general))
        if group and value == "null" and general != path:
            fix = f"Set {'.weights.'.join(path.rsplit('.parts.', 1))}=0, and it is only watched."
            raise ConfigError("a part cannot be taken away", where=path, fix=fix)
        if group not in (None, path):
            path = f"{group}@{path}"  # true_reward=answer chooses from the group `reward`
        if value == "null" and (group or path == EXPERIMENT):
            given.append(f"~{path}")
            continue
        if group and general.endswith(".*"):
            given = [g for g in given if not g.startswith(f"+{path}=")]
            given.append(f"+{path}={value}")  # a choice that no defaults list has yet
            continue
        dicts = [p for p in _parents(path) if typing.get_origin(hints.get(p)) is dict]
        parent = dicts[0] if dicts and general == path else None  # below a choice, keys are its own and not open
        hint = typing.get_args(hints[parent])[1] if parent else hints.get(general)
        if str in (hint, *members(hint)) and value not in ("", "null", "???") and not _IN_QUOTES.fullmatch(value):
            value = _quoted(value)
        is_open = parent or typing.get_origin(hints.get(general)) is dict
        given.append(f"{'++' if is_open else ''}{path}={value}")
    return given


def _experiment(name: str, stage: str, config_dir: str | None) -> str:
    """An experiment is a folder with one YAML a stage."""
    if name == "null" or "/" in name:
        return name
    known = [e for e in choices(EXPERIMENT, config_dir) if _has_stage(e, stage, config_dir)]
    if name in known:
        return f"{name}/{stage}"
    listed = f"There is: {', '.join(known)}." if known else f"No experiment has a {stage}.yaml."
    raise ConfigError(f"no experiment {name!r} for {stage}", where=EXPERIMENT, fix=_did_you_mean(name, known) + listed)


def _has_stage(experiment: str, stage: str, config_dir: str | None) -> bool:
    return any((d / EXPERIMENT / experiment / f"{stage}.yaml").is_file() for d in _config_dirs(config_dir))


def _quoted(text: str) -> str:
    """Text in Hydra's quotes, where a backslash is special only in front of a quote."""
    escaped = re.sub(r'(\\+)(?="|\Z)', r"\1\1", text).replace('"', r"\"")
    return f'"{escaped}"'


# ---------------------------------------------------------------- explaining


def comments(config: type) -> dict[str, str]:
    """The comment of each field, which stands behind it or above it in the source."""
    found: dict[str, str] = {}
    for kind in [k for k in reversed(config.__mro__) if dataclasses.is_dataclass(k)]:
        lines = textwrap.dedent(inspect.getsource(kind)).splitlines()
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                texts = [line.partition("  # ")[2] for line in lines[node.lineno - 1 : node.end_lineno]]
                for line in reversed(lines[: node.lineno - 1]):
                    if not line.strip().startswith("# "):
                        break
                    texts.insert(0, line.strip().removeprefix("# "))
                found[node.target.id] = " ".join(filter(None, texts))
    return found


def known_paths(stage: str) -> list[str]:
    """Every dotted path that the stage's config can have, over all options of its groups."""
    return sorted({path for path, _ in _paths(options(STAGE)[stage].config, "")})


def _paths(kind: type, prefix: str) -> Iterator[tuple[str, Any]]:
    """Each path with its type."""
    for name, hint in typing.get_type_hints(kind).items():
        yield f"{prefix}{name}", hint
        for config in _configs_of(hint):
            yield from _paths(config, f"{prefix}{name}.")
        element = typing.get_args(hint)[1] if typing.get_origin(hint) is dict else None
        if configs := _configs_of(
            element
        ):  # a mapping whose keys are the user's and whose values are choices of a group
            yield f"{prefix}{name}.*", element
            for config in configs:
                if config is not kind:  # one that held its own kind would have no end
                    yield from _paths(config, f"{prefix}{name}.*.")


def _general(path: str, hints: Mapping[str, Any]) -> str:
    """`reward.parts.brief.max` -> `reward.parts.*.max`, as `_paths` has it."""
    parent = next((p for p in _parents(path) if f"{p}.*" in hints), None)
    if parent is None:
        return path
    rest = path.removeprefix(f"{parent}.").partition(".")[2]
    return f"{parent}.*.{rest}" if rest else f"{parent}.*"


def _configs_of(hint: Any) -> list[type]:
    """The dataclasses that a field of this type can hold."""
    bases = [a for a in members(hint) if dataclasses.is_dataclass(a) and isinstance(a, type)]
    return bases + [o.config for base in bases for o in all_options() if issubclass(o.config, base)]


def _group_of(hint: Any) -> str | None:
    """The group whose options a field of this type can hold."""
    return next((o.group for o in all_options() if o.config in _configs_of(hint)), None)


def _parents(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1)]


def nearest(path: str, candidates: Sequence[str]) -> str | None:
    """The candidate most like `path`: a like name in the same place, the same last name elsewhere, a like spelling."""
    parent, _, leaf = path.rpartition(".")
    beside = {c.rpartition(".")[2]: c for c in candidates if c.rpartition(".")[0] == parent and c != path}
    if parent and (found := difflib.get_close_matches(leaf, list(beside), n=1, cutoff=0.7)):
        return beside[found[0]]
    same_leaf = [c for c in candidates if c.rpartition(".")[2] == leaf and c != path]
    anywhere = same_leaf or ([] if parent and beside else candidates)
    found = difflib.get_close_matches(path, anywhere, n=1, cutoff=0.0 if same_leaf else 0.6)
    return found[0] if found else None


def _did_you_mean(name: str, candidates: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, candidates, n=1)
    return f"Did you mean {found[0]}? " if found else ""


def _missing(path: str, stage: str) -> ConfigError:
    hints = dict(_paths(options(STAGE)[stage].config, ""))
    group = _group_of(hints.get(_general(path.removesuffix(".name"), hints)))
    if group is not None and path.endswith(".name"):
        fix = f"Begin its YAML with `defaults: [NAME_schema]`; NAME is one of {', '.join(options(group))}."
        return ConfigError(f"this choice of {group} does not say what it configures", where=path, fix=fix)
    return ConfigError("this value is needed and has no default", where=path, fix=f"Add {path}=...")


def _unknown(path: str, stage: str) -> ConfigError:
    """A path that the composed config lacks: of another option, of another stage, or of none."""
    hints = dict(_paths(options(STAGE)[stage].config, ""))
    if (general := _general(path, hints)) != path:  # below a name of the user's: speak of that one, not of `*`
        part = path.removesuffix(general.partition(".*")[2])
        if part == path:
            fix = f"Choose what it is: {path}=NAME, one of {', '.join(options(_group_of(hints[general]) or ''))}."
            return ConfigError("there is no such part", where=path, fix=fix)
        hints = {p.replace(general.partition("*")[0] + "*", part, 1): hint for p, hint in hints.items()}
    for parent in _parents(path) if path in hints else ():
        field, group = path.removeprefix(f"{parent}."), _group_of(hints.get(parent))
        owners = [o.name for o in options(group or "").values() if field in dict(_paths(o.config, ""))]
        if owners:
            fix = f"Choose {' or '.join(f'{parent}={name}' for name in owners)}, or leave it out."
            return ConfigError(f"belongs to {parent}={owners[0]}, which is not chosen", where=path, fix=fix)
    others = [
        s for s in options(STAGE) if s != stage and any(p in known_paths(s) for p in (path, path.partition("@")[0]))
    ]
    if others == ["submit"] and path not in hints:
        what, fix = f"{stage} runs here and now", f"Write llmscale submit {stage} {path}=... to start it elsewhere."
        return ConfigError(what, where=path, fix=fix)
    if others and path not in hints:
        what = f"{stage} has no such key; it is one of {', '.join(others)}"
        return ConfigError(what, where=path, fix=f"Leave it out; in a pipeline, write {others[0]}.{path}=...")
    found = nearest(path, list(hints))
    parent = path.rpartition(".")[0]
    beside = [p.rpartition(".")[2] for p in hints if parent and p.rpartition(".")[0] == parent]
    hint = f"Did you mean {found}? " if found else ""
    listed = f"{parent} has: {', '.join(beside)}." if beside else f"llmscale {stage} --help lists every key."
    return ConfigError(f"{stage} has no such key", where=path, fix=hint + listed)


def _expected(hint: Any) -> str:
    """What a value of this type must be, in words."""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    words = []
    for member in members(hint):
        if isinstance(member, type) and issubclass(member, Enum):
            words.append(f"one of {', '.join(member.__members__)}")
        elif dataclasses.is_dataclass(member):
            return "holds keys of its own and is not set as a whole"
        elif typing.get_origin(member) is list:
            words.append("a list, such as [a,b]")
        elif typing.get_origin(member) is dict:
            words.append("a mapping, such as {a: b}")
        else:
            words.append(names.get(member, "a value"))
    return f"must be {' or '.join(words)}"


def _explained(error: Exception, stage: str, overrides: Sequence[str]) -> ConfigError:
    """Hydra's and OmegaConf's errors as one line with the dotted path and what is right there."""
    from hydra.errors import MissingConfigException, OverrideParseException
    from omegaconf.errors import InterpolationKeyError, InterpolationResolutionError, OmegaConfBaseException

    if isinstance(error, MissingConfigException):
        return _unknown_choice(error, stage)
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        where = f"{error.problem_mark.name}:{error.problem_mark.line + 1}"
        return ConfigError(f"this is not YAML: {error.problem}", where=where, fix="Mend the file.")
    beneath = error.__cause__ or error.__context__
    is_wrapped = not isinstance(error, OmegaConfBaseException) and isinstance(beneath, OmegaConfBaseException)
    cause: Any = beneath if is_wrapped else error
    message = str(cause).split("\n")[0]
    hints = dict(_paths(options(STAGE)[stage].config, ""))
    given = {path.lstrip("+~"): value for path, _, value in (o.partition("=") for o in overrides)}
    unreadable = next((p for p, o in zip(given, overrides, strict=False) if f"'{o}'" in str(error)), None)
    if isinstance(error, OverrideParseException):
        unreadable = str(error.override).partition("=")[0].lstrip("+")
    if unreadable is not None and " parent " not in str(error):
        fix = "Give one value, or -m to run each of several; put one with a comma, brackets or = in it in quotes: "
        fix += "'path=\"value\"'."
        return ConfigError("this value cannot be read", where=unreadable, fix=fix)
    named = re.search(r"Could not (?:override|append to config)\W+([\w.@/]+)", str(error))
    path = getattr(cause, "full_key", None) or (named[1] if named else None)
    if "NoneType" in message and path is None:  # a key below a choice that was not made
        path = next((p for p in given if any(type(None) in members(hints.get(q)) for q in _parents(p))), None)
    if isinstance(cause, InterpolationKeyError | InterpolationResolutionError):
        return ConfigError(message, where=path, fix="${...} names another key of this config, or oc.env:VARIABLE.")
    if path is None:
        in_file = re.match("In '([^']+)'", str(error))
        fix = f"llmscale {stage} --help shows every key with its default."
        return ConfigError(message, where=f"{in_file[1]}.yaml" if in_file else None, fix=fix)
    field, _, item = path.partition("[")
    hint = hints.get(_general(field, hints))
    if hint is None and typing.get_origin(hints.get(field.rpartition(".")[0])) is dict:  # a key of the user's
        hint = typing.get_args(hints[field.rpartition(".")[0]])[1]
    if item and hint is not None:
        hint = next(typing.get_args(member)[0] for member in members(hint) if typing.get_args(member))
    if hint is None or re.search(r"not in|No match|for root: NoneType", f"{error} {cause}"):
        return _unknown(path, stage)
    found = re.search(r"[Vv]alue '([^']*)'", message)
    value = given.get(path, found[1] if found else None)
    if _group_of(hint) and not value:
        return _missing(path, stage)
    what = _expected(hint) + (f", is {value or 'empty'}" if value is not None else "")
    return ConfigError(what, where=path, fix=f"llmscale {stage} --help shows every key with its default.")


def _unknown_choice(error: Any, stage: str) -> ConfigError:
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    known = [str(o) for o in error.options or [] if not str(o).endswith("_schema")]
    hint = _did_you_mean(name, known)
    return ConfigError(f"there is no {name!r}", where=group or stage, fix=f"{hint}There is: {', '.join(known)}.")
