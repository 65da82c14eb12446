"""What the tree must not hold: catch-all modules, stubs, paths of one machine, addresses of a package index."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
CATCH_ALL = {"utils", "util", "helpers", "common", "misc", "base"}
HOME = re.compile(r"(?<![\w.])/(?:home|root|Users)/\w")
INDEX = re.compile(r"index[-]url|find[-]links|https?://[\w.-]*(?:pypi|download\.pytorch|pythonhosted)", re.IGNORECASE)


def tracked() -> list[Path]:
    """Files of the checkout that git tracks or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def lines(path: Path) -> Iterator[tuple[int, str]]:
    data = path.read_bytes()
    if b"\0" not in data:
        yield from enumerate(data.decode().splitlines(), start=1)


def test_no_catch_all_module():
    modules = [p.relative_to(ROOT) for p in tracked() if p.suffix == ".py"]
    assert modules
    found = [str(p) for p in modules if CATCH_ALL & {part.removesuffix(".py") for part in p.parts}]
    assert not found, f"name them by what they hold: {found}"


def test_no_path_of_one_machine_and_no_package_index():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in tracked()
        for number, line in lines(path)
        if HOME.search(line) or INDEX.search(line)
    ]
    assert not found, "\n".join(["", *found])


def test_no_stub():
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in (ROOT / "llmscale").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Name) and node.id == "NotImplementedError"
    ]
    assert not found, f"a part that is not there yet has no function: {found}"


def test_the_patterns_see():
    assert HOME.search("open('/home" + "/someone/file')") and not HOME.search("see docs/home/page and $HOME/x")
    assert INDEX.search("pip install --extra-index" + "-url x") and INDEX.search("--find" + "-links=x")
