"""The grid of a sweep: from a command line with several values to its jobs, each an ordinary run with a config of its own.

It is written in Hydra's syntax (comma lists, `choice`, `range`, `glob` over a group) and read by Hydra's parser.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from llmscale.compose import EXPERIMENT, choices, compose
from llmscale.config import STAGE, leaves, options, to_dict
from llmscale.errors import ConfigError, UsageError
from llmscale.stages.config import StageConfig
from llmscale.stages.pipeline import compose_stages

GIVEN = ("run.name", "tracking.wandb_group")  # what a job is told of its sweep
MAX_VALUE_LEN, MAX_NAME_LEN = 40, 120  # characters of a folder's name, which file systems end at 255


@dataclass(frozen=True)
class Job:
    name: str  # its folder, below that of the sweep
    title: str
    values: dict[str, Any]  # of the swept keys
    overrides: list[str]  # the job alone is `llmscale STAGE` with these
    configs: dict[str, StageConfig]  # by stage


@dataclass(frozen=True)
class Sweep:
    stage: str
    name: str
    directory: Path
    keys: dict[str, str]  # swept path -> its short name
    jobs: list[Job]


@dataclass(frozen=True)
class Setting:
    """One override, and the value that it has in this job where its path is swept."""

    override: str
    path: str | None = None
    value: Any = None
    text: str = ""


def compose_sweep(stage: str, overrides: Sequence[str], config_dir: str | None) -> Sweep:
    """Every job with its config, checked. The first key varies slowest.

    Raises: UsageError where there is nothing to sweep, ConfigError for a value that is wrong in any job.
    """
    _check_can_sweep(stage)
    grid = [_settings(override, config_dir) for override in overrides]
    swept = [settings[0].path for settings in grid if settings[0].path is not None]
    _check_swept(swept, overrides)
    points = list(itertools.product(*grid))
    first = next(iter(_compose(stage, [s.override for s in points[0]], config_dir).values()))
    keys, name = _short_names(swept), first.run.name
    common = [] if first.tracking.wandb_group else [f"tracking.wandb_group={name}"]
    jobs = {}
    for point in points:
        texts = {keys[s.path]: s.text for s in point if s.path is not None}
        values = {s.path: s.value for s in point if s.path is not None}
        folder, title = _folder(texts), " ".join(f"{key}={text}" for key, text in texts.items())
        try:
            own, configs = _compose_job(stage, [*(s.override for s in point), *common], f"{name}/{folder}", config_dir)
        except ConfigError as error:
            raise ConfigError(f"{error.what} (job {title})", where=error.where, fix=error.fix) from error
        jobs[folder] = Job(folder, title, values, own, configs)  # a value that is given twice is one job
    return Sweep(stage, name, Path(first.run.dir) / name, keys, list(jobs.values()))


def _check_can_sweep(stage: str) -> None:
    if stage != "pipeline" and not issubclass(options(STAGE)[stage].config, StageConfig):
        fix = "Leave out -m; it is for stages that train, and for pipeline."
        raise UsageError(f"-m runs a sweep, and {stage} trains nothing", fix=fix)
    num_ranks = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1)
    if num_ranks > 1:
        fix = "Start it once; cluster.trainer.num_workers=N gives each job its ranks."
        raise UsageError(f"-m would run the whole sweep in each of the {num_ranks} ranks that were started", fix=fix)


def _check_swept(swept: Sequence[str], overrides: Sequence[str]) -> None:
    if not swept:
        fix = "Give a key several values, as in optim.lr=1e-3,3e-4 or 'run.seed=range(0,3)'."
        raise UsageError("-m runs a sweep, and every key here has one value", fix=fix)
    given = [override.partition("=")[0].lstrip("+") for override in overrides]
    for path in swept:
        if path in ("run.name", "run.dir"):
            raise ConfigError("names the whole sweep and cannot be swept", where=path, fix="Give it one value.")
        if given.count(path) > 1:
            raise ConfigError("is swept and given once more", where=path, fix="Give it once, with all its values.")
    if EXPERIMENT in swept and "run.name" not in given:
        raise ConfigError("the sweep needs a name: its experiments bring their own", where="run.name", fix="Give one.")


def _settings(override: str, config_dir: str | None) -> list[Setting]:
    """What an override stands for in the jobs; one that is not swept stands for itself in all of them."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Glob, QuotedString, RangeSweep, Transformer
    from hydra.errors import HydraException

    path, _, given = override.partition("=")
    path = path.lstrip("+")
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException as error:  # text may hold what Hydra would not take; in a sweep, a comma has a meaning
        if "," not in given:
            return [Setting(override)]
        fix = 'Put a value with =, brackets or a comma of its own in quotes: \'path="value","value"\'.'
        raise ConfigError("these values cannot be read", where=path, fix=fix) from error
    if not parsed.is_sweep_override():
        return [Setting(override)]
    if parsed.is_interval_sweep():
        raise ConfigError(f"{given} names no single values", where=path, fix="Write choice(...) or range(...).")
    found: Any = parsed.value()
    if isinstance(found, RangeSweep) and float in map(type, (found.start, found.stop, found.step)):
        # Binary fractions add up to 0.30000000000000004, and past a stop that is not to be reached.
        exact: Any = [Decimal(str(number)) for number in (found.start, found.stop, found.step)]
        found.start, found.stop, found.step = exact
    group = path.rpartition(".")[2]
    items: list[Any] = (
        found.filter(choices(group, config_dir)) if isinstance(found, Glob) else [*parsed.sweep_iterator()]
    )
    if not items:
        raise ConfigError(f"{given} gives no value", where=path, fix="Give it at least one.")
    settings = []
    for item in items:
        written = item if isinstance(item, str) else Transformer.str(item)
        text = item.text if isinstance(item, QuotedString) else written
        value = item if item is None or isinstance(item, bool | int | float) else text
        settings.append(Setting(f"{path}={written}", path, value, text))
    return settings


def _short_names(paths: Sequence[str]) -> dict[str, str]:
    """The last parts of each path, as many as tell it from the others."""

    def endings(path: str) -> Iterator[str]:
        parts = path.split(".")
        yield from (".".join(parts[i:]) for i in range(len(parts) - 1, 0, -1))

    def is_own(ending: str) -> bool:
        return sum(f".{path}".endswith(f".{ending}") for path in paths) == 1

    return {path: next(filter(is_own, endings(path)), path) for path in paths}


def _folder(texts: Mapping[str, str]) -> str:
    """The job's name on disk. It depends on nothing but the values, so that a grown sweep finds its old jobs again."""
    name = ",".join(f"{key}={_safe(text, MAX_VALUE_LEN)}" for key, text in texts.items())
    return name if len(name) <= MAX_NAME_LEN else f"{name[:MAX_NAME_LEN]}-{_digest(name)}"


def _safe(text: str, max_len: int) -> str:
    """Text that any file system and shell takes as it is; where something had to go, a digest keeps it apart."""
    if re.fullmatch(rf"[\w.+-]{{1,{max_len}}}", text, re.ASCII):
        return text
    readable = re.sub(r"[^\w.+]+", "-", text, flags=re.ASCII).strip("-")[:max_len]
    return f"{readable}-{_digest(text)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def _compose(stage: str, overrides: Sequence[str], config_dir: str | None) -> dict[str, StageConfig]:
    if stage == "pipeline":
        return compose_stages(overrides, config_dir)
    return {stage: compose(stage, overrides, config_dir)}


def _compose_job(
    stage: str, overrides: list[str], run_name: str, config_dir: str | None
) -> tuple[list[str], dict[str, StageConfig]]:
    """The overrides of the job alone, and what they compose to.

    The stages of a pipeline find each other by run.name, and so in the job's own folder. A single stage starts from what
    lies outside: a path that its config derives from run.name, such as ${run.dir}/${run.name}/sft, is that of the sweep.
    """
    renamed = [*overrides, f"run.name={run_name}"]
    if stage == "pipeline":
        return renamed, compose_stages(renamed, config_dir)
    config = compose(stage, overrides, config_dir)
    before = dict(leaves(to_dict(config)))
    derived = [p for p, v in before.items() if p not in GIVEN and config.run.name in str(v)]
    if derived:
        after = dict(leaves(to_dict(compose(stage, renamed, config_dir))))
        kept = {p: before[p] for p in derived if after.get(p) != before[p]}
        renamed += [f"{path}={value if isinstance(value, str) else json.dumps(value)}" for path, value in kept.items()]
    config.run.name = run_name
    return renamed, {stage: config}
