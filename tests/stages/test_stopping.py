"""A run that is asked to stop saves, says so, and goes on as if nothing had happened; one that cannot learn any more ends."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import pytest

from tests.stages.runs import (
    DEADLINE_S,
    arguments,
    from_chain,
    kill_when,
    num_lines,
    records,
    run,
    start,
    succeed,
    weights,
    without_times,
)
from tests.stages.test_resume import NUM_STEPS

SAVED = 75
RARE = ["training.save_every_steps=1000", "training.eval_every_steps=1000"]
SIGNALS = {"pretrain": signal.SIGTERM, "sft": signal.SIGUSR1, "reward": signal.SIGTERM, "rlhf": signal.SIGUSR1}


@pytest.mark.parametrize("stage", SIGNALS)
def test_a_signal_saves_at_the_step_boundary(stage: str, chain: Path, tmp_path: Path) -> None:
    """SIGTERM or SIGUSR1 in the midst of a step: exit code 75, and the same command gives the numbers of an undisturbed run."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    rare = [f"training.num_steps={NUM_STEPS[stage]}", "training.save_every_steps=1000"]
    succeed(arguments(stage, whole, *from_chain(stage, chain), *rare), tmp_path / "whole.log")

    argv = arguments(stage, stopped, *from_chain(stage, chain), *rare)
    run_dir, log = stopped / "demo" / stage, tmp_path / "log"
    metrics = run_dir / "metrics.jsonl"
    assert kill_when(lambda: num_lines(metrics) >= 3, argv, log, SIGNALS[stage]) == SAVED
    said = re.search(r"^stopped and saved at step (\d+); the same command resumes$", log.read_text(), re.MULTILINE)
    assert said and "error" not in log.read_text()
    step = int(said[1])
    assert step == records(metrics)[-1]["step"] < NUM_STEPS[stage]
    assert [p.name for p in (run_dir / "checkpoints").glob("step-*")] == [f"step-{step:06d}"]
    assert records(run_dir / "events.jsonl")[-1]["status"] == "stopped"

    succeed(argv, tmp_path / "resumed.log")
    assert weights(run_dir) == weights(whole / "demo" / stage)
    assert without_times(records(metrics)) == without_times(records(whole / "demo" / stage / "metrics.jsonl"))


def test_a_signal_before_the_first_step_leaves_nothing(chain: Path, tmp_path: Path) -> None:
    argv = arguments("sft", tmp_path, *from_chain("sft", chain), "training.num_steps=2000")
    run_dir, log = tmp_path / "demo" / "sft", tmp_path / "log"
    code = kill_when(lambda: (run_dir / "config.yaml").exists(), argv, log, signal.SIGTERM)
    assert code == SAVED
    assert "SIGTERM; the same command resumes" in log.read_text() and "Traceback" not in log.read_text()
    assert not (run_dir / "checkpoints").exists() and not (run_dir / "hf").exists()


def test_a_file_asks_too(chain: Path, tmp_path: Path) -> None:
    argv = arguments("sft", tmp_path, *from_chain("sft", chain), *RARE, "training.num_steps=200")
    run_dir, log = tmp_path / "demo" / "sft", tmp_path / "log"

    child = start(argv, log)
    deadline = time.monotonic() + DEADLINE_S
    while num_lines(run_dir / "metrics.jsonl") < 3:
        assert child.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)
    (run_dir / "stop").touch()
    child.join(DEADLINE_S)
    assert child.exitcode == SAVED and "stopped and saved" in log.read_text()
    assert succeed(argv, log)  # what asked the first attempt does not ask the second


# ---------------------------------------------------------------- early stopping


def test_a_run_that_no_longer_gets_better_ends_and_says_why(chain: Path, tmp_path: Path) -> None:
    # A learning rate of nothing: the first evaluation is the best.
    still = ["optim.lr=1e-30", "training.early_stopping_evals=2", "training.num_steps=60"]
    argv = arguments("sft", tmp_path, *from_chain("sft", chain), *still)  # evaluates every 3 steps
    succeed(argv, tmp_path / "log")
    run_dir = tmp_path / "demo" / "sft"
    result = json.loads((run_dir / "result.json").read_text())
    assert result["steps"] == 9 and result["ended"].startswith("2 evaluations without a better eval/loss than ")
    assert (run_dir / "checkpoints" / "step-000009").exists()
    evaluated = [m for m in records(run_dir / "metrics.jsonl") if "eval/loss" in m]
    assert [m["step"] for m in evaluated] == [3, 6, 9]
    losses = [m["train/loss"] for m in records(run_dir / "metrics.jsonl")]
    for i, m in enumerate(evaluated):
        assert m["eval/gap"] == pytest.approx(m["eval/loss"] - sum(losses[3 * i : 3 * i + 3]) / 3, abs=1e-12)
    (event,) = [e for e in records(run_dir / "events.jsonl") if e["kind"] == "stopped_early"]
    assert event["step"] == 9 and event["why"] == result["ended"]


def test_early_stopping_needs_validation_data(chain: Path, tmp_path: Path) -> None:
    argv = arguments(
        "sft", tmp_path, *from_chain("sft", chain), "training.early_stopping_evals=2", "data.validation=null"
    )
    assert run(argv, tmp_path / "log") == 2
    assert "error: training.early_stopping_evals: there is no validation data" in (tmp_path / "log").read_text()


# ---------------------------------------------------------------- numbers that are none


def faulty(folder: Path, run_dir: Path, *overrides: str) -> list[str]:
    """SFT on 40 examples, each once in 20 steps, of which three make a loss that is not a number."""
    data = folder / "data.jsonl"
    examples = [{"prompt": f"q{i}", "completion": f"a{i}" + "~" * (i in (7, 19, 31))} for i in range(40)]
    data.write_text("".join(json.dumps(e) + "\n" for e in examples))
    batch = ["training.global_batch_size=2", "engine.micro_batch_size=1", "training.num_steps=20"]
    group = folder / "conf" / "objective"
    group.mkdir(parents=True, exist_ok=True)
    (group / "faulty.yaml").write_text("defaults: [faulty_schema]\n")
    plugin = ["--plugin", "tests.stages.faulty", "--config-dir", str(folder / "conf"), "objective=faulty"]
    return [*arguments("sft", run_dir, f"data.train={data}", "data.validation=null", *batch, *overrides), *plugin]


def test_a_few_bad_batches_are_skipped_and_written_down(chain: Path, tmp_path: Path) -> None:
    argv = faulty(tmp_path, tmp_path / "run", *from_chain("sft", chain))
    succeed(argv, tmp_path / "log")
    run_dir = tmp_path / "run" / "demo" / "sft"
    skipped = [e for e in records(run_dir / "events.jsonl") if e["kind"] == "step_skipped"]
    metrics = records(run_dir / "metrics.jsonl")
    assert len(skipped) == 3 and all(e["why"] == "the loss is nan" for e in skipped)
    assert [m["step"] for m in metrics if m.get("train/skipped")] == [e["step"] for e in skipped]
    assert [m["step"] for m in metrics] == list(range(1, 21))
    assert [m["step"] for m in metrics if m["train/loss"] is None] == [e["step"] for e in skipped]


def test_too_many_roll_back_and_killed_and_resumed_is_the_same(chain: Path, tmp_path: Path) -> None:
    budget = ["training.max_skipped_steps=1", "training.save_every_steps=4"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    succeed(faulty(tmp_path, whole, *from_chain("sft", chain), *budget), tmp_path / "whole.log")
    (back,) = [e for e in records(whole / "demo" / "sft" / "events.jsonl") if e["kind"] == "rolled_back"]
    assert back["to"] == back["step"] // 4 * 4 or back["to"] == back["step"] - 4

    argv = faulty(tmp_path, killed, *from_chain("sft", chain), *budget)
    metrics = killed / "demo" / "sft" / "metrics.jsonl"
    kill_when(lambda: num_lines(metrics) >= back["step"], argv, tmp_path / "log")
    succeed(argv, tmp_path / "resumed.log")
    assert weights(killed / "demo" / "sft") == weights(whole / "demo" / "sft")
    assert without_times(records(metrics)) == without_times(records(whole / "demo" / "sft" / "metrics.jsonl"))


def test_without_a_rollback_left_the_run_stops_and_lists_what_happened(chain: Path, tmp_path: Path) -> None:
    argv = faulty(
        tmp_path,
        tmp_path / "run",
        *from_chain("sft", chain),
        "training.max_skipped_steps=0",
        "training.max_rollbacks=1",
    )
    assert run(argv, tmp_path / "log") == 1
    printed = (tmp_path / "log").read_text()
    error = printed.partition("error: ")[2]
    assert (
        error.startswith("optim.lr: step ") and error.count("the loss is nan") == 2 and "rolled back to step" in error
    )
    assert "Traceback" not in printed and not (tmp_path / "run" / "demo" / "sft" / "hf").exists()
