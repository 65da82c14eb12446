"""Several stages one after the other. Each is an ordinary run under the pipeline's name, so the same command resumes in the
stage that was interrupted, and each can be run alone by its own command.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from llmscale.compose import compose
from llmscale.config import STAGE, groups, options
from llmscale.errors import ConfigError, UsageError
from llmscale.stages.config import StageConfig


def compose_stages(overrides: Sequence[str], config_dir: str | None) -> dict[str, StageConfig]:
    """Every stage's config, checked before the first one starts. `<stage>.path=value` is for that stage (`sft.engine=single`
    chooses its group), `stages=[...]` for the pipeline itself, anything else for all of them."""
    own = [o for o in overrides if o.startswith("stages=")]
    stages: list[str] = compose("pipeline", own).stages
    trained = [name for name, o in options(STAGE).items() if issubclass(o.config, StageConfig)]
    for stage in stages:
        if stage not in trained:
            raise UsageError(
                f"{stage!r} is not a stage of a pipeline", where="stages", fix=f"Use: {', '.join(trained)}."
            )
    named = [stage for stage in trained if stage in stages or stage not in groups()]  # else rollout.x is the group's
    return {stage: _compose_stage(stage, _for_stage(stage, named, overrides), config_dir) for stage in stages}


def run(configs: Mapping[str, StageConfig]) -> dict[str, Any]:
    results = {}
    for stage, config in configs.items():
        module, _, function = str(options(STAGE)[stage].builds).partition(":")
        results[stage] = getattr(importlib.import_module(module), function)(config)
    return results


def _compose_stage(stage: str, overrides: Sequence[str], config_dir: str | None) -> StageConfig:
    try:
        return compose(stage, overrides, config_dir)
    except ConfigError as error:
        where = f"{stage}.{error.where}" if error.where else stage
        raise ConfigError(error.what, where=where, fix=error.fix) from error


def _for_stage(stage: str, stages: Sequence[str], overrides: Sequence[str]) -> list[str]:
    mine = []
    for override in overrides:
        prefix = next((s for s in stages if override.startswith(f"{s}.")), None)
        if prefix == stage:
            mine.append(override.removeprefix(f"{stage}."))
        elif prefix is None and not override.startswith("stages="):
            mine.append(override)
    return mine
