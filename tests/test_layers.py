"""A package imports only from rows above its own, and heavy libraries stay in their one place."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = [
    ["errors"],
    [
        "config",
        "compose",
        "randomness",
        "packing",
        "batch",
        "protocols",
        "functional",
        "phases",
        "disk",
        "steps",
        "distributed",
        "tracking",
    ],
    ["models", "checkpoint", "optim"],
    ["objectives", "data", "engine", "rewards", "rl", "rollout"],
    ["training", "cluster", "evaluation"],
    ["icl"],
    ["stages"],
    ["launch"],
    ["cli"],
]
ROW = {unit: number for number, row in enumerate(ROWS, start=1) for unit in row}
MAY_MEET = 2  # in this row modules import each other, without a cycle
ONLY_IN = {
    "ray": "llmscale/cluster/",
    "deepspeed": "llmscale/engine/deepspeed.py",
    "vllm": "llmscale/rollout/vllm.py",
    "wandb": "llmscale/tracking/wandb.py",
    "kubernetes": "llmscale/launch/kubernetes.py",
}
REFERENCE = re.compile(r"(llmscale(?:\.\w+)+):\w+")  # `module:Class`, as options name what they build


def imports(path: Path, root: Path = ROOT) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a file imports or names as `module:Class`, functions' bodies included."""
    package = path.relative_to(root).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if found := REFERENCE.fullmatch(node.value):
                yield node.lineno, found[1]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            constants = [a.value for a in node.args if isinstance(a, ast.Constant)]
            yield from ((node.lineno, value) for value in constants if isinstance(value, str))


def violations(path: Path, root: Path = ROOT) -> Iterator[str]:
    """`file:line: what is wrong` of one module."""
    file = path.relative_to(root).as_posix()
    unit = path.relative_to(root).with_suffix("").parts[1]
    if unit not in ROW and unit != "__init__":
        yield f"{file}:1: {unit} stands in no row"
        return
    own = ROW.get(unit, 1)
    for line, name in imports(path, root):
        library, *inner = name.split(".")
        if library in ONLY_IN and not file.startswith(ONLY_IN[library]):
            yield f"{file}:{line}: {library} is imported only in {ONLY_IN[library]}"
        if library != "llmscale" or not inner or inner[0] == unit or inner[0].startswith("__"):
            continue
        if inner[0] not in ROW:
            yield f"{file}:{line}: {name} stands in no row"
        elif ROW[inner[0]] > own or (ROW[inner[0]] == own != MAY_MEET):
            yield f"{file}:{line}: {unit} (row {own}) imports {inner[0]} (row {ROW[inner[0]]})"


def modules() -> list[Path]:
    return sorted((ROOT / "llmscale").rglob("*.py"))


def test_imports_go_up():
    assert modules()
    found = [line for path in modules() for line in violations(path)]
    assert not found, "\n".join(["", *found])


def test_row_two_has_no_cycle():
    graph: dict[str, set[str]] = {}
    for path in modules():
        unit = path.relative_to(ROOT).with_suffix("").parts[1]
        targets = {name.split(".")[1] for _, name in imports(path) if name.startswith("llmscale.")}
        graph.setdefault(unit, set()).update(t for t in targets - {unit} if ROW.get(t) == MAY_MEET)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    ("file", "source", "fault"),
    [
        ("rl/losses.py", "from llmscale.errors import LlmscaleError\nimport llmscale.functional\n", None),
        ("rl/losses.py", "from . import advantages\nfrom .config import AlgorithmConfig\n", None),
        ("rl/losses.py", "def f():\n    from llmscale.rollout import hf\n", ":2: rl (row 4) imports rollout"),
        ("rl/losses.py", "from llmscale import stages\n", ":1: rl (row 4) imports stages"),
        ("rl/losses.py", "from ..cluster import pool\n", ":1: rl (row 4) imports cluster"),
        ("rl/losses.py", "option('algorithm', 'x', builds='llmscale.stages.x:Y')\n", ":1: rl (row 4) imports stages"),
        ("rl/losses.py", "importlib.import_module('llmscale.cli')\n", ":1: rl (row 4) imports cli"),
        ("rl/losses.py", "import ray.util\n", ":1: ray is imported only in llmscale/cluster/"),
        ("tracking/jsonl.py", "from llmscale.config import build\n", None),
        ("shared/thing.py", "", ":1: shared stands in no row"),
        ("engine/deepspeed.py", "import deepspeed\n", None),
    ],
)
def test_the_guard_sees(tmp_path: Path, file: str, source: str, fault: str | None):
    path = tmp_path / "llmscale" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    found = list(violations(path, tmp_path))
    assert found == [] if fault is None else len(found) == 1 and fault in found[0]
