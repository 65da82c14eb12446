"""The command line: `llmscale STAGE [path=value ...]`. Hydra composes the config; torch loads when a stage runs."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import json
import os
import signal
import sys
import textwrap
import traceback
import typing
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, NoReturn, cast

import llmscale.launch.config  # noqa: F401  registers what `launch=` can be
from llmscale.compose import EXPERIMENT, choices, comments, compose, compose_unchecked, defaults, nearest
from llmscale.config import STAGE, groups, import_plugins, leaves, options, to_dict, to_yaml
from llmscale.errors import LlmscaleError, Requeue, UsageError
from llmscale.stages.config import RunConfig, StageConfig
from llmscale.training.stop import signals

SUMMARY = {
    "pretrain": "a new language model from raw text",
    "sft": "supervised fine-tuning on conversations",
    "reward": "a reward model from rankings",
    "rlhf": "reinforcement learning from a reward",
    "rollout": "completions of many prompts, by all rollout workers",
    "collect": "rankings and SFT data from a policy and a reward",
    "pipeline": "several of the above, one after the other",
    "generate": "answers from a trained model",
    "chat": "talk to a trained model",
}
VERBS = {  # what takes arguments of its own instead of a config
    "checkpoint": ("llmscale.stages.checkpoints:run", "list, verify, export or pin the checkpoints of a run"),
    "inspect": ("llmscale.stages.inspection:run", "what became of the draws of an RLHF run, and what happened to it"),
    "submit": ("llmscale.launch.submit:run", "start a stage on Slurm or Kubernetes, or detached on this machine"),
    "status": ("llmscale.launch.verbs:status", "how a run is"),
    "logs": ("llmscale.launch.verbs:logs", "what the processes of a run have written"),
    "cancel": ("llmscale.launch.verbs:cancel", "end a run, on whatever machine it is"),
    "resume": ("llmscale.launch.submit:resume", "submit a run again, which goes on where it was"),
    "runs": ("llmscale.launch.verbs:runs", "all runs and how they are"),
}
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    sys.path.append(os.getcwd())  # plugins and reward functions lie beside the user, as with `python -m`
    try:
        verb = next((argument for argument in argv if argument in VERBS), None)
        status = _run_verb(verb, argv) if verb and argv[0] in (verb, "--debug") else _run(_arguments(argv))
    except Requeue as saved:
        print(saved, file=sys.stderr)
        status = saved.exit_code
    except LlmscaleError as error:
        _report(error, debug)
        status = error.exit_code
    except KeyboardInterrupt:
        how = signals.received or "interrupted"
        print(f"{how}; the same command resumes from the last checkpoint", file=sys.stderr)
        status = Requeue.exit_code if signals.received else EXIT_INTERRUPTED
    sys.stdout.flush()
    sys.exit(status)


def _run_verb(verb: str, argv: list[str]) -> int:
    argv.remove(verb)
    return _entry(VERBS[verb][0])(argv)


def _run(arguments: argparse.Namespace) -> int:
    import_plugins(arguments.plugin)
    stage = arguments.stage
    if arguments.help:
        return _show(_stage_help(stage, arguments.config_dir) if stage else _help(arguments.config_dir))
    plugins = [f"plugins=[{','.join(arguments.plugin)}]"] if arguments.plugin else []
    overrides = [*plugins, *arguments.overrides]
    if arguments.multirun:
        return _multirun(arguments, overrides)
    if stage == "pipeline":
        from llmscale.stages.pipeline import compose_stages

        configs = compose_stages(overrides, arguments.config_dir)
    else:
        configs = {stage: compose(stage, overrides, arguments.config_dir)}
    if arguments.cfg:
        return _show(_frozen(configs))
    if all(isinstance(config, StageConfig) for config in configs.values()):
        signals.install()
    else:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    entry = _entry(str(options(STAGE)[stage].builds))
    try:
        result = entry(configs if stage == "pipeline" else configs[stage])
    except LlmscaleError as error:
        error.where = _named(error.where, [pair for c in configs.values() for pair in leaves(to_dict(c))])
        raise
    if results := result if stage == "pipeline" else {stage: result} if result else {}:
        from llmscale.stages.summary import print_summary

        print_summary(results)
    return 0


def _named(where: str | None, values: Sequence[tuple[str, Any]]) -> str | None:
    """The place of an error with the key that gave it, where it is a file or a model and no key itself."""
    if not where or any(f"{path}.".startswith(f"{where}.") for path, _ in values):
        return where or None
    return next((f"{path}={where}" for path, value in values if value == where), where)


def _entry(reference: str) -> Any:
    """The function that `module:function` names."""
    module, _, function = reference.partition(":")
    return getattr(importlib.import_module(module), function)


def _multirun(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from llmscale.stages.grid import compose_sweep
    from llmscale.stages.sweep import run_sweep

    sweep = compose_sweep(arguments.stage, overrides, arguments.config_dir)
    if arguments.cfg:
        return _show(_frozen({f"{job.name}/{s}": config for job in sweep.jobs for s, config in job.configs.items()}))
    flags = [f"--plugin={module}" for module in arguments.plugin]
    flags += [f"--config-dir={arguments.config_dir}"] if arguments.config_dir else []
    return run_sweep(sweep, [*flags, "--debug"] if arguments.debug else flags)


def _frozen(configs: Mapping[str, Any]) -> str:
    return "\n".join(f"# {name}\n{to_yaml(config).rstrip()}" for name, config in configs.items())


def _show(text: str) -> int:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # whoever reads has seen enough, as in `llmscale --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _report(error: LlmscaleError, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    print(f"error: {error}", file=sys.stderr)


# ---------------------------------------------------------------- arguments

USAGE = "llmscale STAGE [path=value ...] [-m] [--config-dir DIR] [--plugin MODULE] [--cfg job] [--debug]"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, fix=f"Write {USAGE}; overrides have no dashes, as in optim.lr=1e-3.")


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Raises: UsageError for an option or a stage that there is not."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("--config-dir")
    parser.add_argument("--plugin", action="append", default=[])
    parser.add_argument("--cfg", choices=["job"])
    parser.add_argument("--debug", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    arguments = parser.parse_intermixed_args(argv)
    arguments.stage = arguments.overrides.pop(0) if arguments.overrides else None
    if arguments.stage is None and not arguments.help:
        raise UsageError("no stage is named", fix="llmscale --help lists what there is.")
    if arguments.stage not in (None, *SUMMARY):
        known = [*SUMMARY, *VERBS]
        found = nearest(arguments.stage, known)
        fix = f"Did you mean {found}? " if found else ""
        raise UsageError(f"there is no stage {arguments.stage!r}", fix=f"{fix}There is: {', '.join(known)}.")
    return arguments


# ---------------------------------------------------------------- help


def _help(config_dir: str | None) -> str:
    stages = "\n".join(f"  {name:<10} {text}" for name, text in SUMMARY.items())
    verbs = "\n".join(f"  {name:<10} {text}" for name, (_, text) in VERBS.items())
    chosen = sorted({*groups(), "model", "cluster", EXPERIMENT})
    listed = "\n".join(_row(group, choices(group, config_dir), max(map(len, chosen))) for group in chosen)
    return f"""usage: {USAGE}

Pretraining, fine-tuning, reward modelling and RLHF from one config.

stages (llmscale STAGE --help lists its keys):
{stages}

verbs (llmscale VERB --help):
{verbs}

groups (chosen by name, as in engine=deepspeed):
{listed}

common overrides:
  experiment=demo              a folder of conf/experiment with one YAML a stage
  run.name=trial run.seed=1    where it goes (runs/<name>/<stage>); the same name resumes
  data.train=texts.jsonl       .txt, .jsonl, .json, .csv, .parquet, a folder, or hub:NAME
  model.path=runs/demo/sft     a run, a Hugging Face folder, or a hub name
  training.num_steps=200 optim.lr=3e-4 engine.micro_batch_size=16 engine.precision=bf16
  cluster.trainer.num_workers=2   ranks of a supervised stage;  cluster.rollout.num_workers=8  of rollouts
  tracking.wandb=disabled      or offline, online

options:
  -m, --multirun               a sweep: one job for each combination of several values
  --config-dir DIR             a folder with config groups and experiments of yours
  --plugin MODULE              import a module of yours first; may be given several times
  --cfg job                    print the composed config and stop
  --debug                      show the traceback of an error

examples:
  llmscale pretrain data.train=texts.jsonl model=tiny training.num_steps=100
  llmscale pipeline experiment=demo
  llmscale pretrain -m optim.lr=1e-3,3e-4 run.seed=0,1,2 data.train=texts.jsonl model=tiny run.name=trial"""


def _stage_help(stage: str, config_dir: str | None) -> str:
    """The stage's groups, and every key with its value before any override."""
    composed = compose_unchecked(stage, config_dir=config_dir)
    config = options(STAGE)[stage].config
    lines = [f"usage: {USAGE.replace('STAGE', stage)}", "", f"{stage}: {SUMMARY[stage]}"]
    if not str(config.__doc__).startswith(f"{config.__name__}("):  # which dataclass writes where there is none
        lines += inspect.cleandoc(str(config.__doc__)).splitlines()
    if groups := defaults(stage):
        width = max(map(len, groups))
        lines += ["", "groups (chosen by name; now the one in brackets):"]
        for group, chosen in groups.items():
            names = choices(group.partition("@")[0], config_dir)
            field = group.partition("@")[2] or group
            lines.append(_row(field, [f"[{n}]" if n == chosen else n for n in names], width))
    lines += ["", "keys:", *(f"  {f'{path}={value}':<44} {text}".rstrip() for path, value, text in _keys(composed))]
    return "\n".join([*lines, "", "llmscale --help shows common overrides and an example."])


def _row(name: str, listed: Sequence[str], width: int) -> str:
    return textwrap.fill(f"  {name:<{width}} {', '.join(listed)}", 110, subsequent_indent=" " * (width + 3))


def _keys(node: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(path, value, comment) of each key in a composed config."""
    from omegaconf import OmegaConf

    kind = cast(type, OmegaConf.get_type(node))
    texts, hints = comments(kind), typing.get_type_hints(kind)
    for name, value in cast(dict[str, Any], OmegaConf.to_container(node, enum_to_str=True)).items():
        path = f"{prefix}{name}"
        if isinstance(value, dict) and dataclasses.is_dataclass(OmegaConf.get_type(node, name)):
            yield from _keys(node[name], f"{path}.")
        elif name not in ("stage", "name") or kind is RunConfig:  # the others are chosen, not set
            shown = "(needed)" if value == "???" else json.dumps(value).strip('"').replace(" ", "")
            text = texts.get(name, "")
            if isinstance(hints[name], type) and issubclass(hints[name], Enum):
                text = ": ".join(filter(None, (text.rstrip("."), " | ".join(hints[name].__members__))))
            yield path, shown, text


if __name__ == "__main__":
    main()
