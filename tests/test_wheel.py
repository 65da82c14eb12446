"""The wheel is complete: every module, every config, and each shipped stage and experiment composes from it alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ["pyproject.toml", "setup.py", "README.md", "LICENSE", "llmscale", "conf"]
EXPERIMENTS = sorted(p.relative_to(ROOT / "conf/experiment").with_suffix("") for p in ROOT.glob("conf/experiment/*/*"))

# Some values have no default: what a stage starts from, and its data. Name each once and compose again; an experiment
# leaves open only what it starts from, and perhaps its data.
COMPOSE = """
import sys
from pathlib import Path
import llmscale.conf, llmscale.launch.config, llmscale.stages
from llmscale import compose, config
from llmscale.errors import ConfigError

assert all(Path(m.__file__).is_relative_to(sys.argv[1]) for m in (config, llmscale.conf)), config.__file__
for stage, *overrides in [[s] for s in config.options("stage")] + [a.split("+") for a in sys.argv[2:]]:
    named = {}
    while True:
        try:
            compose.compose(stage, [*overrides, *(f"{path}=anywhere" for path in named)])
            break
        except ConfigError as error:
            if not error.where or error.where in named or (overrides and not error.where.endswith(("path", "data.train"))):
                raise
            named[error.where] = True
    print(stage, *overrides)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:  # a copy, because a build writes into its source tree
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source))
    return next(out.glob("llmscale-*.whl"))


def pip(*args: str) -> None:
    command = [sys.executable, "-m", "pip", args[0], "--no-index", "--quiet", *args[1:]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_holds_every_module_and_config(wheel: Path):
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "llmscale").rglob("*.py")}
    configs = {f"llmscale/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "conf").rglob("*.yaml")}
    assert configs
    assert modules | configs <= set(zipfile.ZipFile(wheel).namelist())


def test_every_stage_and_experiment_composes_from_it(wheel: Path, tmp_path: Path):
    target = tmp_path / "site"
    pip("install", "--no-deps", "--target", str(target), str(wheel))
    experiments = [f"{e.name}+experiment={e.parent}" for e in EXPERIMENTS]
    done = subprocess.run(
        [sys.executable, "-c", COMPOSE, str(target), *experiments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    stages = [p.stem for p in (ROOT / "conf").glob("*.yaml")]
    expected = {*stages, *(e.replace("+", " ") for e in experiments)}
    assert set(done.stdout.splitlines()) == expected
