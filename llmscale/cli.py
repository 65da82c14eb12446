"""The command line: `llmscale STAGE [path=value ...]`. Hydra composes the config; torch is loaded only when a stage runs."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import llmscale.stages.config  # noqa: F401  registers every option
from llmscale.config import STAGE, compose, groups, import_plugins, options, to_yaml
from llmscale.errors import LlmscaleError

SUMMARY = {
    "pretrain": "a new language model from raw text",
    "sft": "supervised fine-tuning on conversations",
    "reward": "a reward model from rankings",
    "rlhf": "reinforcement learning from a reward",
    "pipeline": "all of the above, one after the other",
    "generate": "answers from a trained model",
    "chat": "talk to a trained model",
}
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_intermixed_args(argv)
    sys.path.insert(0, os.getcwd())  # plugins and reward functions lie beside the user, as with `python -m`
    try:
        status = _run(arguments)
    except LlmscaleError as error:
        _report(error, arguments.debug)
        status = error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        status = EXIT_INTERRUPTED
    sys.stdout.flush()
    sys.exit(status)


def _run(arguments: argparse.Namespace) -> int:
    import_plugins(arguments.plugin)
    plugins = [f"plugins=[{','.join(arguments.plugin)}]"] if arguments.plugin else []
    overrides = [*plugins, *arguments.overrides]
    if arguments.stage == "pipeline":
        from llmscale.stages.pipeline import compose_stages

        configs = compose_stages(overrides, arguments.config_dir)
    else:
        configs = {arguments.stage: compose(arguments.stage, overrides, arguments.config_dir)}
    if arguments.cfg:
        for stage, config in configs.items():
            print(f"# {stage}\n{to_yaml(config)}", end="")
        return 0
    signal.signal(signal.SIGTERM, _raise_interrupt)
    module, _, function = str(options(STAGE)[arguments.stage].builds).partition(":")
    entry = getattr(importlib.import_module(module), function)
    if arguments.stage == "pipeline":
        results = entry(configs)
    else:
        result = entry(configs[arguments.stage])
        results = {arguments.stage: result} if result is not None else {}
    if results:
        from llmscale.stages.summary import print_summary

        print_summary(results)
    return 0


def _report(error: LlmscaleError, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    print(f"error: {error}", file=sys.stderr)


def _raise_interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmscale",
        description="Pretraining, fine-tuning, reward modelling and RLHF from one config.",
        epilog=_help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", choices=list(SUMMARY), metavar="STAGE", help="what to run; listed below")
    parser.add_argument("overrides", nargs="*", metavar="path=value", help="config overrides, as in Hydra")
    parser.add_argument("--config-dir", metavar="DIR", help="a folder with config groups and experiments of yours")
    parser.add_argument(
        "--plugin", action="append", default=[], metavar="MODULE", help="import a module of yours first"
    )
    parser.add_argument("--cfg", choices=["job"], help="print the composed config and stop")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _help_text() -> str:
    stages = "\n".join(f"  {name:<10} {text}" for name, text in SUMMARY.items())
    listed = "\n".join(f"  {group:<10} {', '.join(sorted(options(group)))}" for group in groups())
    return f"""stages:
{stages}

groups (chosen by name, as in engine=deepspeed):
{listed}

common overrides:
  experiment=demo              a folder of conf/experiment with one YAML a stage
  run.name=trial run.seed=1    where it goes (runs/<name>/<stage>); the same name resumes
  data.train=texts.jsonl       .txt, .jsonl, .json, a folder, or hub:NAME
  model.path=runs/demo/sft     a run, a Hugging Face folder, or a hub name
  training.num_steps=200 optim.lr=3e-4 engine.micro_batch_size=16 engine.precision=bf16
  cluster.trainer.num_workers=2   ranks of a supervised stage;  cluster.rollout.num_workers=8  of rollouts
  tracking.wandb=disabled      or offline, online

example:
  llmscale pretrain data.train=texts.jsonl model=tiny training.num_steps=100
  llmscale pipeline experiment=demo"""


if __name__ == "__main__":
    main()
