"""Programs in a sandbox: what its tests share."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from pathlib import Path

import pytest

from llmscale.rewards.inside.limits import Limits
from llmscale.rewards.sandbox import Program, Result, Sandbox

LIMITS = Limits(timeout_s=20.0, memory_bytes=192 * 2**20, max_processes=3, output_bytes=20_000, files_bytes=4 * 2**20)
TESTS = ("assert f(1) == 2",)
RIGHT = "def f(x):\n    return x + 1\n"


def python_for_nobody() -> str:
    """An interpreter that nobody may read too: Landlock alone gives root's Python to no one else."""
    if os.geteuid() != 0 or all(os.stat(p).st_mode & 1 for p in Path(os.path.realpath(os.__file__)).parents):
        return sys.executable
    found = shutil.which("python3", path="/usr/bin")
    if found is None:
        pytest.skip("needs a Python that user nobody may read")
    return found


def descendants(pid: int, command: str) -> list[int]:
    """Processes below `pid` with `command` in their command line; a fork has its parent's."""
    parents, found = {}, []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    for child in parents:
        line, above = child, []
        while line in parents:
            above.append(line := parents[line])
        try:
            if pid in above and command in Path(f"/proc/{child}/cmdline").read_text():
                found.append(child)
        except OSError:
            continue
    return found


def run(sandbox: Sandbox, source: str, *tests: str) -> Result:
    return sandbox.run([Program(textwrap.dedent(source), tests or TESTS)])[0]
