"""The run directory: resume, refuse, finish."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from llmscale.checkpoint.run_directory import (
    ATTEMPT_DIR,
    RUN_ID,
    claim,
    holder,
    is_locked,
    next_attempt,
    open_run,
    run_id,
    without_secrets,
)
from llmscale.errors import RunError


@dataclass
class Optim:
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    extra: dict[str, int] = field(default_factory=dict)


@dataclass
class Config:
    stage: str = "pretrain"
    optim: Optim = field(default_factory=Optim)
    api_key: str | None = None


def test_a_new_run_freezes_its_config_and_says_where_it_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["llmscale", "pretrain", "api_key=hunter2"])
    run = open_run(tmp_path / "runs" / "a", Config(api_key="hunter2"))
    assert yaml.safe_load((run.path / "config.yaml").read_text())["optim"]["lr"] == 0.1
    origin = json.loads((run.path / "run.json").read_text())
    assert origin["schema_version"] == 1
    assert origin["command"] == ["llmscale", "pretrain", "api_key=<redacted>"]
    assert (run.checkpoints, run.hf) == (run.path / "checkpoints", run.path / "hf")
    run.close()
    assert not any("hunter2" in path.read_text() for path in run.path.iterdir() if path.is_file())


def test_a_run_that_was_claimed_elsewhere_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(RUN_ID, "trial-rlhf-a1b2c3")
    claim(tmp_path / "there", Config())
    monkeypatch.setenv(RUN_ID, "another")
    claim(tmp_path / "there", Config())
    assert run_id(tmp_path / "there") == "trial-rlhf-a1b2c3"


def test_the_same_config_resumes_in_a_new_attempt(tmp_path: Path):
    for number in range(1, 12):
        run = open_run(tmp_path, Config(api_key=f"secret {number}"))
        assert run.attempt_dir == tmp_path / "attempts" / str(number)
        assert run.attempt_dir.is_dir()
        assert run.result() is None
        run.close()


def begun(directory: Path) -> None:
    """A run that has trained."""
    open_run(directory, Config()).close()
    (directory / "metrics.jsonl").write_text('{"step": 1}\n')


def test_a_first_try_that_a_typo_stopped_does_not_claim_the_name(tmp_path: Path):
    open_run(tmp_path, Config()).close()
    open_run(tmp_path, Config(optim=Optim(lr=0.2))).close()
    assert "lr: 0.2" in (tmp_path / "config.yaml").read_text()


def test_what_results_do_not_depend_on_may_change(tmp_path: Path):
    @dataclass
    class Later(Config):
        cluster: dict[str, int] = field(default_factory=lambda: {"workers": 1})

    open_run(tmp_path, Later()).close()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    open_run(tmp_path, Later(cluster={"workers": 2})).close()
    assert "workers: 2" in (tmp_path / "config.yaml").read_text()
    with pytest.raises(RunError, match="lr"):
        open_run(tmp_path, Later(cluster={"workers": 3}, optim=Optim(lr=0.2)))


def test_another_config_is_refused_with_the_difference_and_leaves_no_lock(tmp_path: Path):
    begun(tmp_path)
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(RunError) as caught:
        open_run(tmp_path, Config(optim=Optim(lr=0.2)))
    assert "optim.lr: 0.1 -> 0.2" in caught.value.what
    assert "betas" not in caught.value.what
    assert "run.name" in (caught.value.fix or "")
    assert (tmp_path / "config.yaml").read_text() == before
    open_run(tmp_path, Config()).close()


def test_a_long_difference_is_cut_after_ten_lines(tmp_path: Path):
    begun(tmp_path)
    with pytest.raises(RunError) as caught:
        open_run(tmp_path, Config(optim=Optim(lr=0.2, extra={f"x{i:02d}": i for i in range(13)})))
    lines = caught.value.what.splitlines()
    assert len(lines) == 12
    assert lines[-1].strip() == "and 5 more"  # lr, the empty extra, 13 keys


def test_a_finished_run_has_its_result(tmp_path: Path):
    run = open_run(tmp_path, Config())
    run.finish({"loss": 1.5})
    run.close()
    again = open_run(tmp_path, Config())
    assert again.result() == {"loss": 1.5}
    again.close()


def test_a_crash_before_the_config_was_frozen_is_a_first_use(tmp_path: Path):
    open_run(tmp_path, Config()).close()
    (tmp_path / "config.yaml").rename(tmp_path / ".tmp-config.yaml")
    open_run(tmp_path, Config(optim=Optim(lr=0.2))).close()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["optim"]["lr"] == 0.2


@pytest.mark.parametrize("content", ['{"schema_version": 2}', "{", None])
def test_another_schema_is_refused(tmp_path: Path, content: str | None):
    open_run(tmp_path, Config()).close()
    (tmp_path / "run.json").unlink()
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunError, match=r"schema version (2|unknown)"):
        open_run(tmp_path, Config())


@pytest.mark.parametrize("content", ["a: [", "just text"])
def test_a_config_that_was_damaged_by_hand_is_refused(tmp_path: Path, content: str):
    open_run(tmp_path, Config()).close()
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(RunError, match="not a frozen config"):
        open_run(tmp_path, Config())


HOLDER = """
import sys
from pathlib import Path
from tests.checkpoint.test_run_directory import Config, open_run
run = open_run(Path(sys.argv[1]), Config())
print("open", flush=True)
sys.stdin.read()
"""


def test_a_second_driver_is_refused_until_the_first_is_gone(tmp_path: Path):
    pipe, root = subprocess.PIPE, Path(__file__).parents[2]
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=root) as first:
        assert first.stdout is not None and first.stdout.readline() == "open\n"
        with pytest.raises(RunError, match=rf"another process \(pid {first.pid} on .+\) is using this run"):
            open_run(tmp_path, Config())
        first.kill()
    second = open_run(tmp_path, Config())
    assert second.attempt_dir.name == "2"
    second.close()


@pytest.mark.parametrize("parent", ["a file", "proc"])
def test_an_unwritable_place_is_named(tmp_path: Path, parent: str):
    (tmp_path / "file").write_text("x")
    directory = (tmp_path / "file" if parent == "a file" else Path("/proc/sys")) / "run"
    with pytest.raises(RunError, match="cannot be used") as caught:
        open_run(directory, Config())
    assert caught.value.where == str(directory)


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("tracking.api_key=abc", "tracking.api_key=<redacted>"),
        ("+env.WANDB_API_KEY=abc", "+env.WANDB_API_KEY=<redacted>"),
        ("tracking={name:wandb,api_key:'a,b'}", "tracking={name:wandb,api_key:<redacted>"),
        ("--hf-token=abc", "--hf-token=<redacted>"),
        ("reward.url=https://user:pw@host/path", "reward.url=https://<redacted>@host/path"),
        ("rollout.max_tokens=64", "rollout.max_tokens=64"),
        ("data.monkey=1", "data.monkey=1"),
        ("model.tokenizer=gpt2", "model.tokenizer=gpt2"),
    ],
)
def test_secrets_leave_the_command_line(argument: str, shown: str):
    assert without_secrets(["llmscale", argument, "last"]) == ["llmscale", shown, "last"]


def test_the_value_after_a_secret_flag_leaves_too():
    assert without_secrets(["llmscale", "--token", "abc", "x"]) == ["llmscale", "--token", "<redacted>", "x"]


def test_a_run_is_claimed_for_one_who_starts_it_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    named = claim(tmp_path / "a", Config())
    assert named == run_id(tmp_path / "a") == claim(tmp_path / "a", Config())
    assert not is_locked(tmp_path / "a" / ".lock") and not (tmp_path / "a" / "attempts").exists()

    attempt = next_attempt(tmp_path / "a" / "attempts")
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.setenv(ATTEMPT_DIR, str(tmp_path / "link" / "a" / ".." / "a" / "attempts" / attempt.name))
    monkeypatch.chdir(tmp_path)
    run, other = open_run(Path("a"), Config()), open_run(Path("b"), Config())
    assert run.attempt_dir.resolve() == attempt
    assert other.attempt_dir == Path("b/attempts/1"), "the attempt that was given is another run's"
    for opened in (run, other):
        opened.close()


def test_who_holds_a_run_is_seen_and_not_disturbed(tmp_path: Path):
    assert holder(tmp_path / "a") is None
    run = open_run(tmp_path / "a", Config())
    assert holder(tmp_path / "a") == (os.getpid(), socket.gethostname())
    with pytest.raises(RunError, match="another process"):
        claim(tmp_path / "a", Config())
    run.close()
    assert holder(tmp_path / "a") is None
