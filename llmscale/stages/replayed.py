"""`rollout=replay`: does a recording fit the run that is to train from it, and whose samples are they to it?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from llmscale.batch import Prompt
from llmscale.checkpoint.run_directory import read_result
from llmscale.config import build, leaves, to_dict
from llmscale.data.splits import Split
from llmscale.errors import ConfigError, RunError
from llmscale.rollout.config import ReplayConfig
from llmscale.rollout.recording import COMPLETIONS
from llmscale.rollout.replay import Replay
from llmscale.stages.rlhf_config import RlhfConfig

# What decides how a sample comes about, besides the weights and the prompts.
SAMPLED_BY = ("rollout.temperature", "rollout.top_k", "rollout.top_p", "rollout.max_new_tokens", "environment")
# What the weights after a step do not follow from, given its samples; how many there are is `rollout.group_size`.
ASIDE = (
    *("run.dir", "run.name", "tracking.", "cluster.", "plugins", "rollout.", "environment", "record", "true_reward"),
    *("data.cache_dir", "data.validation", "engine.micro_batch_size", "engine.rows", "publish", "training.num_steps"),
    *("training.eval_every_steps", "training.save_every_steps", "training.keep_checkpoints"),
)
GROUP_SIZE = "rollout.group_size"


def open_replay(config: RlhfConfig, prompts: Split[Prompt]) -> tuple[Replay, dict[str, Any]]:
    """The recording of `rollout.path`, and on what terms the run trains from it, for people.

    Raises: ConfigError or RunError when it was not sampled as this run would have, or holds fewer samples than the run takes.
    """
    assert isinstance(config.rollout, ReplayConfig)
    path = Path(config.rollout.path)
    recorded = _recorded(path)
    own = to_dict(config)
    _check_sampling(recorded, own, path)
    another = _another_policy(recorded, own)
    if another and not config.algorithm.corrects:
        what = f"the replayed samples are not of the policy that is trained: {another}"
        raise ConfigError(
            what, where="algorithm.correction", fix="Set it to truncated, or see docs/recorded_rollouts.md."
        )
    order = prompts.order(config.run.seed)

    def place(draw: int) -> int:
        return int(order.at(np.array([draw]))[0])

    def drawn(draw: int) -> Prompt | None:
        return prompts.train[place(draw)]

    def placed(draw: int) -> Prompt | None:
        return prompts.train[draw] if draw < len(prompts.train) else None

    maps: tuple[Callable[[int], int], Callable[[int], Prompt | None]]
    maps = (lambda draw: draw, drawn) if recorded["stage"] == "rlhf" else (place, placed)
    replay: Replay = build(config.rollout, *maps, on_policy=not another)
    _check_enough(config, replay, path)
    terms = {
        "samples": len(replay.offsets),
        "policy": f"another: {another}" if another else "the one that sampled",
        "max_logprob_diff": "no bound" if another else config.max_logprob_diff,
        "evaluation": "none, there is no engine",
    }
    return replay, terms


def _recorded(path: Path) -> dict[str, Any]:
    """The frozen config of the recorded run."""
    try:
        recorded = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        stage = recorded["stage"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        fix = "Name the directory of a run, such as runs/demo/rlhf."
        raise RunError("there is no run in this directory", where=str(path), fix=fix) from error
    switch = {"rlhf": "record", "rollout": "record_logprobs"}.get(stage)
    if switch is None or not recorded.get(switch) or not (path / COMPLETIONS).exists():
        fix = "Record one: llmscale rlhf record=true, or llmscale rollout record_logprobs=true."
        raise RunError("this run recorded nothing to train from", where=str(path), fix=fix)
    return dict(recorded)


def _differences(recorded: Mapping[str, Any], own: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted path, value there, value here)"""
    before, now = dict(leaves(recorded)), dict(leaves(own))
    keys = [*before, *(key for key in now if key not in before)]
    return [(key, before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)]


def _check_sampling(recorded: Mapping[str, Any], own: Mapping[str, Any], path: Path) -> None:
    keys = SAMPLED_BY if recorded["stage"] == "rollout" else ("run.seed", *SAMPLED_BY)
    for key, before, now in _differences(recorded, own):
        if key.startswith(keys):
            what = f"is {now} here, and was {before} when {path} was recorded"
            raise ConfigError(what, where=key, fix="Set it to the same, or record anew.")


def _another_policy(recorded: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Why the weights that sampled are not those that are trained; empty where they are."""
    if recorded["stage"] == "rollout":
        return "llmscale rollout sampled them all with one"
    found = [d for d in _differences(recorded, own) if d[0] == GROUP_SIZE or not d[0].startswith(ASIDE)]
    return "{} was {} and is {}".format(*found[0]) if found else ""


def _check_enough(config: RlhfConfig, replay: Replay, path: Path) -> None:
    """Every sample that the run is sure to take; one that draws again for equal rewards may take more."""
    per_step = config.training.prompts_per_step
    for draw in range(config.training.num_steps * per_step):
        for sample in range(config.group_size):
            if (lacking := replay.lacking(draw, sample)) is None:
                continue
            if draw == 0 and sample:  # a later draw may be the one in which the recording ends
                raise ConfigError(lacking, where=GROUP_SIZE, fix=f"Set it to {sample}, or record more samples.")
            early = "" if read_result(path) is not None else ", and its run has not ended"
            enough = draw // per_step
            fix = (
                f"Set training.num_steps={enough}, or record more."
                if enough
                else "Record more, or take the recorded prompts alone."
            )
            raise RunError(f"{lacking}{early}", where=str(path), fix=fix)
