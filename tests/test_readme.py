"""The README is true: its files are written, its commands run, in order, as a reader would."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from llmscale.data.tasks import read_task
from tests.conftest import ROOT
from tests.hosts.commands import documented

README = (ROOT / "README.md").read_text()
DEMO = "make demo"
STEPS = {"pretrain": 60, "sft": 40, "reward": 20, "rlhf": 3}  # of the demo made short


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    lines = [line.partition("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line and line != "make test"]  # that is what runs this


def recipe(target: str) -> str:
    """What the Makefile runs for a target, in the environment that this test runs in."""
    lines = (ROOT / "Makefile").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"{target}:"))
    return lines[start + 1].strip().replace("$(BIN)/", "")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data files that the README speaks of, and the files that it shows."""
    folder = tmp_path_factory.mktemp("reader")
    splits = {"chats": "sft", "rankings": "rankings", "prompts": "prompts"}
    for name, split in splits.items():
        lines = [json.dumps(record) for record in read_task(f"task:sorting/{split}?size=300")]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    texts = [record["text"] for record in read_task("task:sorting/pretrain?size=2000")]
    (folder / "texts.txt").write_text("\n".join(texts))
    (folder / "rewards.py").write_text("def brevity(prompt, completion, fields):\n    return -len(completion)\n")
    (folder / "my_algorithm.py").write_text(blocks("python")[0])
    (folder / "my_conf" / "algorithm").mkdir(parents=True)
    (folder / "my_conf" / "algorithm" / "reinforce.yaml").write_text(blocks("yaml")[0])
    return folder


def test_the_makefile_has_what_the_readme_names() -> None:
    assert commands()[0] == DEMO and recipe("demo") == "llmscale pipeline experiment=demo"


def test_the_sections_come_in_order() -> None:
    titles = re.findall(r"^## (.*)", README, re.MULTILINE)
    assert titles[:5] == [
        "The two commands",
        "What the demo does and prints",
        "Your own data",
        "How it is laid out",
        "How to add an algorithm",
    ]


def test_more_rollouts_are_the_number_that_runs_over_hosts() -> None:
    """The README's override is one of the command of docs/hosts.md that tests/hosts/test_ray.py runs."""
    section = README.partition("\n### More rollouts\n")[2].partition("\n## ")[0].partition("\n### ")[0]
    (number,) = re.findall(r"cluster\.rollout\.num_workers=\d+", section)
    _, over_hosts = documented("Ray")[5]
    assert over_hosts.startswith("export") and f" {number} " in over_hosts and "llmscale rlhf" in over_hosts


def run(line: str, folder: Path) -> str:
    """What it prints."""
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, env=dict(os.environ), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme_runs(command: str, reader: Path) -> None:
    """The demo with all its parts and few steps; what comes after it takes up its models."""
    short = "".join(f" {stage}.training.num_steps={steps}" for stage, steps in STEPS.items())
    printed = run(recipe("demo") + short if command == DEMO else command, reader)
    assert printed.strip()
    if command == DEMO:
        assert "held-out true score" in printed and "Try next" in printed
