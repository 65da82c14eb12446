"""The command lines of status, logs, cancel and runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from llmscale.errors import UsageError
from llmscale.launch import cancel as cancelling
from llmscale.launch import logs as reading
from llmscale.launch import status as looking


def status(argv: Sequence[str]) -> int:
    parser = Parser("status", "How a run is; without RUN, the one that has changed last.")
    parser.add_argument("run", metavar="RUN", type=Path, nargs="?")
    arguments = parser.parse_args(argv)
    return looking.show(arguments.run, arguments.json)


def runs(argv: Sequence[str]) -> int:
    parser = Parser("runs", "Every run below a folder, the one that has changed last first.")
    parser.add_argument("folder", metavar="DIR", type=Path, nargs="?", default=Path("runs"))
    arguments = parser.parse_args(argv)
    return looking.list_runs(arguments.folder, arguments.json)


def logs(argv: Sequence[str]) -> int:
    parser = Parser("logs", "What the processes of an attempt have written.")
    parser.add_argument("run", metavar="RUN", type=Path)
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the run has ended")
    parser.add_argument("--role", help="driver, trainer, policy, rollout, ray, health, job, ...")
    parser.add_argument("--attempt", type=int, help="default: the last")
    arguments = parser.parse_args(argv)
    if arguments.follow:
        return reading.follow(arguments.run, arguments.role, arguments.attempt)
    return reading.show(arguments.run, arguments.role, arguments.attempt, arguments.json)


def cancel(argv: Sequence[str]) -> int:
    parser = Parser("cancel", "End a run: it saves after its step, and llmscale resume goes on with it.")
    parser.add_argument("run", metavar="RUN", type=Path)
    parser.add_argument("--now", action="store_true", help="at once, without saving")
    arguments = parser.parse_args(argv)
    after = cancelling.cancel(arguments.run, arguments.now)
    if arguments.json:
        print(json.dumps(asdict(after)))
    else:
        saving = after.state == "running" and not arguments.now
        print(f"{after.run}  {'saves after its step, then ends' if saving else after.state}")
    return 0


class Parser(argparse.ArgumentParser):
    def __init__(self, verb: str, text: str, epilog: str | None = None):
        layout = argparse.RawDescriptionHelpFormatter if epilog else argparse.HelpFormatter
        prog = f"llmscale {verb}"
        super().__init__(prog=prog, description=text, epilog=epilog, formatter_class=layout, allow_abbrev=False)
        self.add_argument("--json", action="store_true", help="print JSON")
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        usage = " ".join(self.format_usage().removeprefix("usage: ").split())
        raise UsageError(message, fix=f"Write {usage}.")
