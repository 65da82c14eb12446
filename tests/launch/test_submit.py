"""`launch=local` and the verbs: a run that is detached here, followed, cancelled and taken up again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmscale.cli import main
from llmscale.launch.cancel import cancel
from llmscale.launch.status import first_traceback, look
from tests.conftest import ROOT
from tests.stages.runs import DEADLINE_S, TINY, num_lines, records

NUM_STEPS = 400
WORDS = [
    "pretrain", "experiment=demo", *TINY["pretrain"], "engine=single", "cluster=local", "tracking.wandb=disabled",
    f"training.num_steps={NUM_STEPS}",
]  # fmt: skip
Verb = Callable[..., str]


@pytest.fixture
def llmscale(tmp_path: Path) -> Iterator[Verb]:
    """Runs a command in a folder of its own and returns what it printed."""

    def verb(*words: str, exit_code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "llmscale.cli", *words],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == exit_code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    yield verb
    for file in tmp_path.rglob("submission.json"):  # a failed test must not leave a run behind
        try:
            os.killpg(int(json.loads(file.read_text())["job"]), signal.SIGKILL)
        except ProcessLookupError:
            continue


def wait_until(condition: Callable[[], Any], run: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        logs = "\n".join(f.read_text() for f in run.rglob("*.log"))
        assert time.monotonic() < deadline, logs
        time.sleep(0.1)


@pytest.mark.slow
def test_a_run_that_is_detached_is_followed_cancelled_and_resumed(llmscale: Verb, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "demo" / "pretrain"
    submitted = json.loads(llmscale("submit", *WORDS, "--json"))
    assert submitted["run"] == str(run) and submitted["launch"] == "local"
    assert "running already" in llmscale("submit", *WORDS, exit_code=2)
    wait_until(lambda: num_lines(run / "metrics.jsonl") > 3, run)

    assert look(run).state == "running"
    cancel(run, now=False)  # not the command: the run may be over before that has started
    wait_until(lambda: look(run).state == "cancelled", run)
    stopped = look(run)
    assert (stopped.exit_code, stopped.reason, stopped.attempt) == (75, "saved", 1)
    assert "not running" in llmscale("cancel", "runs/demo", exit_code=2)

    resumed = json.loads(llmscale("resume", "runs/demo", "training.save_every_steps=50", "--json"))
    assert resumed["id"] == submitted["id"] and resumed["job"] != submitted["job"]
    assert "==> " in llmscale("logs", "runs/demo", "-f", "--role", "driver")  # until it has ended
    found = json.loads(llmscale("status", "--json"))
    assert (found["state"], found["attempt"], found["step"]) == ("done", 2, NUM_STEPS)
    steps = [m["step"] for m in records(run / "metrics.jsonl") if "train/loss" in m]
    assert steps == list(range(1, NUM_STEPS + 1))
    assert "runs/demo/pretrain  done" in llmscale("runs")
    assert "validation loss" in llmscale("resume", "runs/demo")  # what it found, again


def test_cancel_now_leaves_nothing(llmscale: Verb, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "demo" / "pretrain"
    llmscale("submit", *WORDS)
    wait_until(lambda: (run / ".lock").exists(), run)
    assert json.loads(llmscale("cancel", "runs/demo", "--now", "--json"))["state"] == "cancelled"
    listed = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True).stdout
    left = [line for line in listed.splitlines() if str(run) in line or "num_steps=400" in line]
    assert not left


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["submit"], "no stage is named"),
        (["submit", "pretrian"], "Did you mean pretrain?"),
        (["submit", "chat"], "is no stage with a run"),
        (["submit", *WORDS, "launch=slrum"], "launch"),
        (["submit", *WORDS, "launch.partition=x"], "belongs to launch=slurm"),
        (["submit", *WORDS, "data.train=http://me:secret@host/x"], "a secret on the command line"),
        (["submit", *WORDS, "run.dir=/proc"], "cannot be used"),
        (["pretrain", "launch=slurm", *WORDS[1:]], "llmscale submit pretrain launch"),
        (["status"], "there is no run here"),
        (["status", "nowhere"], "there is no run here"),
        (["logs"], "RUN"),
        (["resume"], "no run is named"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(words)
    printed = capsys.readouterr().err
    assert ended.value.code == 2
    assert says in printed and "Traceback" not in printed


def test_a_file_of_secrets_that_others_may_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "keys.env"
    for mode, says in ((None, "no such file"), (0o644, "chmod 600 keys.env")):
        if mode is not None:
            file.write_text("KEY=1\n")
            file.chmod(mode)
        with pytest.raises(SystemExit) as ended:
            main(["submit", *WORDS, "launch.secrets_file=keys.env"])
        printed = capsys.readouterr().err
        assert ended.value.code == 2 and "launch.secrets_file" in printed and says in printed
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flag", ["--print", "--dry-run"])
def test_print_and_dry_run_touch_nothing(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*WORDS, "launch=slurm", "cluster=laptop", "engine=deepspeed", "launch.nodes=2", flag]
    for more in ([], ["--json"]):
        with pytest.raises(SystemExit):
            main(["submit", *words, *more])
        printed = capsys.readouterr().out
        expected = "#SBATCH --nodes=2" if flag == "--print" else '"nodes": 2' if more else "nodes                2"
        assert expected in printed
    assert json.loads(printed)
    assert not list(tmp_path.iterdir())


def test_a_sweep_is_shown_as_one_array_or_plan_by_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)

    def shown(*words: str, exit_code: int = 0) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["submit", *WORDS, "launch=slurm", "-m", *words])
        assert ended.value.code == exit_code
        printed = capsys.readouterr()
        return printed.out + printed.err

    assert "#SBATCH --array=0-2\n" in shown("run.seed=0,1,2", "--print")
    unlike = ["engine=deepspeed", "cluster=laptop", "cluster.trainer.num_workers=1,2"]
    assert [plan["per_node"]["tasks"] for plan in json.loads(shown(*unlike, "--dry-run", "--json"))] == [1, 2]
    assert "want different nodes" in shown(*unlike, "--print", exit_code=2)
    assert "take turns" in shown("launch=local", "run.seed=0,1", exit_code=2)
    assert not list(tmp_path.iterdir())


def test_the_first_traceback_is_that_of_the_rank_that_failed_first(tmp_path: Path) -> None:
    trace = 'Traceback (most recent call last):\n  File "x.py", line 1, in f\n    f()\nValueError: no\n'
    (tmp_path / "trainer-node1.log").write_text("error: trainer 0: lost contact with the other ranks: x\n  Resume.\n")
    (tmp_path / "trainer-node2.log").write_text(
        "".join(f"1: {line}\n" for line in ["step 1", *trace.splitlines(), "z"])
    )
    assert first_traceback(tmp_path) == f"{tmp_path / 'trainer-node2.log'}:\n{trace.strip()}"
    assert first_traceback(tmp_path / "none") is None
