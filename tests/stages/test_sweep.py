"""Sweeps that run: every job a process of its own, what stops them and what does not, and the table at the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmscale.cli import main
from llmscale.stages.grid import Sweep, compose_sweep
from llmscale.stages.summary import print_sweep
from llmscale.stages.sweep import report, run_sweep
from tests.conftest import ROOT
from tests.stages.runs import num_lines, records
from tests.tracking.wandb_file import read_wandb

DEADLINE_S = 400.0  # these machines are slow when they are shared
SMALL = ["model=tiny", "model.hidden_size=32", "model.intermediate_size=32", "model.num_layers=1", "model.num_heads=2"]
RUN = [*SMALL, "model.vocab_size=261", "data.max_seq_len=48", "training.num_steps=2", "training.global_batch_size=4"]
PRETRAIN = ["pretrain", "-m", "run.name=trial", *RUN]


@pytest.fixture
def ground(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        lines = [json.dumps({"text": f"the cat sat on mat {name} {i}"}) + "\n" for i in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "random.py").write_text("raise RuntimeError('a file of the user came before the library')\n")
    return tmp_path


def start(ground: Path, *argv: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "llmscale.cli", *argv]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ground, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def llmscale(ground: Path, *argv: str) -> tuple[int, str]:
    process = start(ground, *argv)
    printed, _ = process.communicate(timeout=DEADLINE_S)
    return process.returncode, printed


def wait_until(condition: Callable[[], Any], process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert process is None or process.poll() is None, f"it ended too early: {process.communicate()[0]}"
        assert time.monotonic() < deadline, "waited for too long"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""  # that of a process that nobody has waited for is empty
    except (FileNotFoundError, ProcessLookupError):
        return False


def jobs_of(ground: Path) -> list[dict[str, Any]]:
    return json.loads((ground / "runs/trial/sweep.json").read_text())["jobs"]


# ---------------------------------------------------------------- running


def test_a_job_that_fails_stops_no_other_and_the_same_command_resumes(ground: Path) -> None:
    argv = [*PRETRAIN, "data.train=a.jsonl,missing.jsonl,b.jsonl", "tracking.wandb=offline"]
    code, printed = llmscale(ground, *argv)
    assert code == 1
    runs = ground / "runs/trial"
    started = [line for line in printed.splitlines() if line.startswith("job ")]
    assert started == [f"job {i}/3: train={name}.jsonl" for i, name in enumerate(("a", "missing", "b"), start=1)]
    assert "error: data.train=missing.jsonl: no such file" in printed, "what a job prints is shown"
    assert [job["status"] for job in jobs_of(ground)] == ["done", "failed", "done"]
    assert [job["exit_code"] for job in jobs_of(ground)] == [0, 2, 0]
    table = printed[printed.rindex("┏") :]
    assert all(text in table for text in ("train/loss", "missing.jsonl", "failed (2)", " *", "runs/trial/sweep.json"))
    for name in ("a", "b"):
        run = runs / f"train={name}.jsonl/pretrain"
        (offline,) = run.glob("wandb/offline-run-*/*.wandb")
        found = read_wandb(offline)
        assert (found.group, found.name, found.job_type) == ("trial", f"train={name}.jsonl", "pretrain")
        (job,) = (job for job in jobs_of(ground) if job["job"] == run.parent.name)
        assert job["metrics"]["pretrain"] == json.loads((run / "result.json").read_text())["metrics"]
        command = json.loads((run / "run.json").read_text())["command"]
        assert f"run.name=trial/train={name}.jsonl" in command and "-m" not in command

    (ground / "missing.jsonl").write_text((ground / "a.jsonl").read_text())
    before = (runs / "train=a.jsonl/pretrain/metrics.jsonl").read_bytes()
    code, printed = llmscale(ground, *argv)
    assert code == 0, printed
    assert printed.count("(finished before)") == 2 and printed.count("building a new model") == 1
    assert printed.count("training loss") == 3, "finished jobs print their results again"
    assert [job["status"] for job in jobs_of(ground)] == ["done"] * 3
    assert (runs / "train=a.jsonl/pretrain/metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_sweep_that_is_stopped_or_killed_resumes(ground: Path) -> None:
    argv = [*PRETRAIN, "run.seed=0,1", "data.train=a.jsonl", "tracking.wandb=disabled", "training.save_every_steps=4"]
    argv += ["training.num_steps=100"]
    first, second = (ground / f"runs/trial/seed={seed}/pretrain" for seed in (0, 1))

    sweep = start(ground, *argv)
    wait_until(lambda: any(first.glob("checkpoints/step-*")), sweep)
    holder = int((first / ".lock").read_text().split()[1])
    sweep.kill()
    sweep.communicate()
    wait_until(lambda: not is_running(holder))  # a job does not outlive its sweep
    assert not (first / "result.json").exists()

    for how, expected in ((signal.SIGINT, 130), (signal.SIGTERM, 75)):
        at = num_lines(first / "metrics.jsonl")
        sweep = start(ground, *argv)
        wait_until(lambda at=at: num_lines(first / "metrics.jsonl") >= at + 3, sweep)
        sweep.send_signal(how)  # to the sweep alone
        printed, _ = sweep.communicate(timeout=DEADLINE_S)
        assert sweep.returncode == expected, printed
        assert "stopped at job 1/2; the same command resumes" in printed
        assert [job["status"] for job in jobs_of(ground)] == ["interrupted", "not run"]
        assert not second.exists()

    code, printed = llmscale(ground, *argv)
    assert code == 0, printed
    kinds = [event["kind"] for event in records(first / "events.jsonl")]
    assert kinds.count("started") == 1 and kinds.count("resumed") == 3
    assert [job["status"] for job in jobs_of(ground)] == ["done", "done"]
    (over_seeds,) = json.loads((ground / "runs/trial/sweep.json").read_text())["over_seeds"]
    assert over_seeds["metrics"]["pretrain"]["train/loss"]["n"] == 2


def test_a_pipeline_is_swept_whole(ground: Path) -> None:
    chats = "".join(json.dumps({"prompt": f"q {i}", "completion": f"a {i}"}) + "\n" for i in range(8))
    (ground / "chats.jsonl").write_text(chats)
    steps = ["pretrain.training.num_steps=2", "sft.training.num_steps=2", "data.max_seq_len=48"]
    own = [f"pretrain.{override}" for override in SMALL] + ["pretrain.model.vocab_size=261"]
    argv = ["pipeline", "-m", "experiment=real", "stages=[pretrain,sft]", "run.name=trial", "sft.optim.lr=1e-3,1e-2"]
    data = ["pretrain.data.train=a.jsonl", "sft.data.train=chats.jsonl", "tracking.wandb=disabled"]
    code, printed = llmscale(ground, *argv, *data, *own, *steps, "engine=single", "cluster=local")
    assert code == 0, printed
    for job in jobs_of(ground):
        assert job["run_dirs"] == {stage: f"runs/trial/{job['job']}/{stage}" for stage in ("pretrain", "sft")}
        assert job["metrics"].keys() == {"pretrain", "sft"}
    table = printed[printed.rindex("┏") :]
    assert "pretrain" in table and "sft" in table and "0.01" in table


# ---------------------------------------------------------------- before anything runs


def reached(sweep: Sweep, *losses: float | None) -> dict[str, Any]:
    """The report of a sweep whose jobs reached these losses; None: failed."""
    for job, loss in zip(sweep.jobs, losses, strict=True):
        for stage, config in job.configs.items():
            if loss is not None:
                metrics = {"train/loss": loss, "eval/accuracy": 1 - loss, "eval/loss": None, "train/lr": 0.1}
                config.run_dir.mkdir(parents=True)
                (config.run_dir / "result.json").write_text(json.dumps({"stage": stage, "metrics": metrics}))
    return report(sweep, {job.name: int(loss is None) for job, loss in zip(sweep.jobs, losses, strict=True)})


def grid(tmp_path: Path, *overrides: str) -> Sweep:
    return compose_sweep("pretrain", ["data.train=x", f"run.dir={tmp_path}", *overrides], None)


def test_a_finished_job_of_another_config_is_refused_at_once(ground: Path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(ground)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sweep = grid(ground, "run.seed=0,1")
    reached(sweep, None, 0.5)
    (sweep.jobs[1].configs["pretrain"].run_dir / "config.yaml").write_text("optim: {lr: 0.5}\n")
    with pytest.raises(SystemExit) as ended:
        main(["pretrain", "-m", "data.train=x", f"run.dir={ground}", "run.seed=0,1"])
    out, err = capfd.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert err.startswith(f"error: {ground}/default/seed=1/pretrain: ") and "job 1/2" not in err


# ---------------------------------------------------------------- what they reached


def test_the_best_job_of_each_metric(tmp_path: Path) -> None:
    found = reached(grid(tmp_path, "optim.lr=0.1,0.2,0.3,0.4"), 0.5, None, 0.25, 0.75)
    assert found["best"] == {"pretrain": {"train/loss": "lr=0.3", "eval/accuracy": "lr=0.3"}}
    assert [job["status"] for job in found["jobs"]] == ["done", "failed", "done", "done"]
    assert found["jobs"][1]["metrics"] == {}
    assert found["over_seeds"] == []


def test_mean_and_deviation_over_seeds(tmp_path: Path) -> None:
    found = reached(grid(tmp_path, "run.seed=0,1,2", "optim.lr=0.1,0.2,0.3"), 1, 3, 5, 2, None, None, 6, 4, None)
    rows = {row["values"]["optim.lr"]: row["metrics"] for row in found["over_seeds"]}
    # By hand: mean of 1, 2, 6 is 3; squares of -2, -1, 3 sum to 14; divided by 3 - 1 is 7.
    assert rows[0.1]["pretrain"]["train/loss"] == {"mean": 3, "std": pytest.approx(7**0.5, rel=1e-12), "n": 3}
    assert rows[0.2]["pretrain"]["train/loss"] == {"mean": 3.5, "std": pytest.approx(0.5**0.5, rel=1e-12), "n": 2}
    assert rows[0.3]["pretrain"]["train/loss"] == {"mean": 5, "std": None, "n": 1}
    assert json.loads(json.dumps(found)) == found


def test_the_tables(tmp_path: Path, capsys) -> None:
    found = reached(grid(tmp_path, "run.seed=0,1", "model.tie_embeddings=true,false"), 0.5, 0.25, 0.75, None)
    print_sweep(found, tmp_path / "sweep.json")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert [row for row in rows if row] == [
        ["0", "True", "0.5000", "0.5000", "done"],
        ["0", "False", "0.2500 *", "0.7500 *", "done"],
        ["1", "True", "0.7500", "0.2500", "done"],
        ["1", "False", "", "", "failed (1)"],
        ["True", "0.6250 ± 0.18", "0.3750 ± 0.18", "2"],
        ["False", "0.2500 *", "0.7500 *", "1"],
    ]


def test_text_with_brackets_is_shown_as_it_is(tmp_path: Path, capsys) -> None:
    found = reached(
        grid(tmp_path, "optim.betas=[0.9,0.95],[0.9,0.99]", "tracking.wandb_project='[red]','[b]'"), *[0.5] * 4
    )
    print_sweep(found, tmp_path / "sweep.json")
    printed = capsys.readouterr().out
    assert "[0.9,0.95]" in printed and "[red]" in printed and "[b]" in printed


def test_nothing_is_run_where_all_is_finished(tmp_path: Path, monkeypatch, capsys) -> None:
    """And the exit code is that of a sweep that went well."""
    sweep = grid(tmp_path, "run.seed=0,1")
    reached(sweep, 0.5, 0.25)
    for job in sweep.jobs:
        run_dir = job.configs["pretrain"].run_dir
        result = json.loads((run_dir / "result.json").read_text()) | {
            "steps": 2,
            "seconds": 1.0,
            "run_dir": str(run_dir),
        }
        (run_dir / "result.json").write_text(json.dumps(result))
    monkeypatch.setattr(sys, "executable", "/nowhere")
    assert run_sweep(sweep, []) == 0
    out, err = capsys.readouterr()
    assert out.count("training loss 0.") == 2 and err.count("(finished before)") == 2
