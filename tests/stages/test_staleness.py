"""Training on samples of older weights, with the real parts in one process: there all that is under way is sampled at once, so
that a bound of k makes samples k updates old, the same ones every time."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.stages.runs import arguments, kill_when, records, run, succeed, weights, without_times

SIZES = ["experiment=grpo", "run.name=demo", "rollout.group_size=4", "training.prompts_per_step=8", "optim.lr=3e-3"]
# Of what a model says that has learned next to nothing.
SOME_ARE_RIGHT = ["reward=regex", "reward.pattern=q", "optim.warmup_steps=0"]
STALE = ["training.max_staleness=2", "training.num_steps=7", *SIZES, *SOME_ARE_RIGHT]


def rlhf(folder: Path, chain: Path, *overrides: str) -> list[str]:
    return arguments("rlhf", folder, f"model.path={chain}/demo/sft", *overrides)


@pytest.fixture(scope="module")
def whole(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an undisturbed run."""
    folder = tmp_path_factory.mktemp("stale")
    succeed(rlhf(folder, chain, *STALE), folder / "log")
    return folder / "demo" / "rlhf"


def test_samples_are_as_old_as_allowed_and_weighed(whole: Path) -> None:
    (plan,) = (e for e in records(whole / "events.jsonl") if e["kind"] == "plan")
    assert (plan["max_staleness"], plan["correction"]) == (2, "truncated")
    steps = records(whole / "metrics.jsonl")[1:]
    assert [s["rollout/staleness_max"] for s in steps] == [0, 1, 2, 2, 2, 2, 2]
    first, *later = steps
    assert first["rollout/logprob_diff"] < 1e-4 and first["policy/importance"] == pytest.approx(1, abs=1e-4)
    assert all(s["policy/importance"] != pytest.approx(1, abs=1e-4) for s in later)
    # What is older is not compared with the trainer's; samples of the weights that are trained always are.
    assert all(s.get("rollout/logprob_diff", 0) < 1e-4 for s in later)
    evals = [s["eval/rollout/logprob_diff"] for s in steps if "eval/reward/mean" in s]
    assert len(evals) == 3 and all(0 < difference < 1e-4 for difference in evals)


def test_a_killed_run_neither_loses_nor_repeats_a_draw(chain: Path, whole: Path, tmp_path: Path) -> None:
    """What was sampled ahead is in the checkpoint, with the versions that made it."""
    killed = tmp_path / "demo" / "rlhf"
    at = killed / "checkpoints" / "step-000004"
    assert kill_when(at.exists, rlhf(tmp_path, chain, *STALE), tmp_path / "log") == -signal.SIGKILL
    succeed(rlhf(tmp_path, chain, *STALE), tmp_path / "log")
    assert any(e["kind"] == "resumed" for e in records(killed / "events.jsonl"))
    assert records(killed / "draws.jsonl") == records(whole / "draws.jsonl")
    assert without_times(records(killed / "metrics.jsonl")) == without_times(records(whole / "metrics.jsonl"))
    assert weights(killed) == weights(whole)


def test_inspect_tells_what_became_of_every_draw(whole: Path, tmp_path: Path) -> None:
    heavy = "import sys; from llmscale.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    argv = [sys.executable, "-c", heavy, "inspect", str(whole), "--json"]
    shown = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    draws, ends = found["draws"], records(whole / "draws.jsonl")
    assert (found["step"], found["attempts"], found["status"]) == (7, 1, "done")
    assert draws["ended"] == len(ends) == draws["trained"] + draws["dropped"] and draws["wrong"] == []
    assert sum(draws["staleness"].values()) == draws["trained"] and set(draws["staleness"]) == {"0", "1", "2"}
    assert sum(draws["why"]["dropped"].values()) == draws["dropped"]
    assert found["max_staleness"] == 2 and found["correction"] == "truncated" and found["versions"] == 7

    text = succeed(["inspect", str(whole)], tmp_path / "log")
    assert f"draws: {len(ends)} ended, each once" in text and "algorithm.correction=truncated" in text
    assert run(["inspect", str(tmp_path)], tmp_path / "log") == 2
    assert "this run has drawn no prompts" in (tmp_path / "log").read_text()
