"""`llmscale checkpoint`: what it prints and with which exit code, and that an export is the model that the run would have
written at that step."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmscale.checkpoint.commit import CheckpointStore, is_pinned
from llmscale.checkpoint.manifest import MANIFEST
from llmscale.cli import main
from tests.stages.runs import arguments, run, succeed

ROOT = Path(__file__).parents[2]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def checkpoint(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """checkpoint(*argv) -> (exit code, standard output, standard error)"""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("COLUMNS", "200")

    def command(*argv: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["checkpoint", *map(str, argv)])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return command


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 10, 20 and 30."""

    def write(directory: Path) -> None:
        (directory / "weights").write_bytes(bytes(1500))

    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep=3)
    for step, score in ((10, 0.5), (20, None), (30, 0.25)):
        store.save(step, write, score=score)
    (tmp_path / "run" / "config.yaml").write_text("stage: sft\n")
    return tmp_path / "run"


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


# ---------------------------------------------------------------- list, verify, pin


def test_list_shows_them_newest_first(checkpoint: Command, run_dir: Path):
    checkpoint("pin", run_dir, 20)
    code, out, err = checkpoint("list", run_dir)
    assert (code, err) == (0, "")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert [[row[0], *row[2:]] for row in rows] == [
        ["30", "1.5 kB", "0.25", "", "complete"],
        ["20", "1.5 kB", "", "pinned", "complete"],
        ["10", "1.5 kB", "0.5", "", "complete"],
    ]
    assert all(row[1].endswith(" s") for row in rows)
    assert checkpoint("list", run_dir / "checkpoints")[1].count("complete") == 3


def test_list_as_json_says_what_is_missing(checkpoint: Command, run_dir: Path):
    (run_dir / "checkpoints" / "step-000020" / "weights").unlink()
    (run_dir / "checkpoints" / "step-000010" / MANIFEST).unlink()
    code, out, _ = checkpoint("list", run_dir, "--json")
    rows = {row.pop("step"): row for row in json.loads(out)}
    assert code == 0
    assert list(rows) == [10, 30, 20], "one without a manifest comes first"
    assert rows[30] | {"age_s": 0.0} == {
        "path": str(run_dir / "checkpoints" / "step-000030"),
        "age_s": 0.0,
        "bytes": 1500,
        "score": 0.25,
        "pinned": False,
        "complete": True,
        "problem": None,
    }
    assert 0 <= rows[30]["age_s"] < 3600
    assert (rows[20]["complete"], rows[20]["problem"]) == (False, "weights is missing")
    assert rows[10]["bytes"] is None and MANIFEST in rows[10]["problem"]


def test_list_of_a_run_that_has_not_saved_yet(checkpoint: Command, run_dir: Path):
    shutil.rmtree(run_dir / "checkpoints")
    assert checkpoint("list", run_dir)[:2] == (0, "no checkpoint yet\n")
    code, _, err = checkpoint("verify", run_dir)
    assert code == 1 and "there is no checkpoint" in err


def test_verify_reads_every_byte_of_the_newest_or_of_all(checkpoint: Command, run_dir: Path):
    flip(run_dir / "checkpoints" / "step-000010" / "weights")
    code, out, _ = checkpoint("verify", run_dir)
    assert code == 0 and "step-000030: valid, 1.5 kB" in out and "step-000010" not in out
    code, out, _ = checkpoint("verify", run_dir, "--all")
    assert code == 1
    assert "step-000020: valid" in out
    assert "step-000010: broken: the content of weights is not what was written" in out
    code, out, _ = checkpoint("verify", "--all", "--json", run_dir)
    assert code == 1
    assert [(r["step"], r["valid"], r["problem"]) for r in json.loads(out)] == [
        (30, True, None),
        (20, True, None),
        (10, False, "the content of weights is not what was written"),
    ]


def test_pin_and_unpin(checkpoint: Command, run_dir: Path):
    path = run_dir / "checkpoints" / "step-000010"
    assert checkpoint("pin", run_dir, 10)[:2] == (0, f"{path}: pinned\n")
    assert is_pinned(path) and checkpoint("verify", "--all", run_dir)[0] == 0
    CheckpointStore(run_dir / "checkpoints", keep=1).save(40, lambda directory: None)
    assert path.exists()
    assert checkpoint("unpin", run_dir, 10)[0] == 0
    assert not is_pinned(path)
    code, _, err = checkpoint("pin", run_dir, 20)
    assert code == 1 and "no checkpoint of step 20" in err and "There is: 40, 10." in err


@pytest.mark.parametrize(
    ("argv", "code", "hints"),
    [
        ([], 2, ["VERB"]),
        (["lst", "x"], 2, ["'lst'", "verify"]),
        (["list"], 2, ["RUN", "llmscale checkpoint list"]),
        (["list", "no/such/run"], 2, ["no/such/run", "there is no such run"]),
        (["list", "."], 2, ["this is no run directory"]),
        (["pin", ".", "newest"], 2, ["STEP", "newest"]),
        (["export", ".", "out"], 2, ["no config.yaml"]),
    ],
)
def test_a_wrong_command_is_one_error(
    checkpoint: Command, argv: list[str], code: int, hints: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    found, out, err = checkpoint(*argv)
    assert (found, out) == (code, "")
    assert err.startswith("error: ") and "Traceback" not in err
    assert all(hint in err for hint in hints), err


def test_debug_shows_the_traceback_wherever_it_stands(checkpoint: Command, capsys: pytest.CaptureFixture[str]):
    assert "Traceback" in checkpoint("list", "no/such/run", "--debug")[2]
    with pytest.raises(SystemExit) as ended:
        main(["--debug", "checkpoint", "list", "no/such/run"])
    assert ended.value.code == 2 and "Traceback" in capsys.readouterr().err


def test_help_names_the_verb_and_its_own(checkpoint: Command, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "\n  checkpoint list, verify, export or pin" in capsys.readouterr().out
    code, out, _ = checkpoint("--help")
    assert code == 0 and all(f"\n    {verb} " in out for verb in ("list", "verify", "export", "pin", "unpin"))
    assert "--all" in checkpoint("verify", "--help")[1]


@pytest.mark.parametrize("argv", [["--help"], ["list"], ["verify", "--all"]])
def test_looking_needs_no_torch(run_dir: Path, argv: list[str]):
    code = """
import sys
from llmscale.cli import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    print([m for m in ("torch", "transformers", "deepspeed") if m in sys.modules], ended.code)
"""
    path = [str(run_dir)] if argv != ["--help"] else []
    command = [sys.executable, "-c", code, "checkpoint", *argv, *path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.stdout.splitlines()[-1] == "[] 0", done.stderr


# ---------------------------------------------------------------- export


def export(run_dir: Path, out: Path, *argv: str) -> Path:
    succeed(["checkpoint", "export", str(run_dir), str(out), *argv], out.parent / "export.log")
    return out


def assert_same_folder(one: Path, other: Path) -> None:
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in other.iterdir())
    for file in one.iterdir():
        assert file.read_bytes() == (other / file.name).read_bytes(), file.name


def without_hf(run_dir: Path, to: Path) -> Path:
    """The run as it was before it ended."""
    return shutil.copytree(run_dir, to, ignore=shutil.ignore_patterns("hf"), symlinks=True)


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward"])
def test_the_last_checkpoint_is_the_model_that_the_run_wrote(chain: Path, tmp_path: Path, stage: str):
    run_dir = chain / "demo" / stage
    assert_same_folder(export(run_dir, tmp_path / "finished"), run_dir / "hf")
    unfinished = export(without_hf(run_dir, tmp_path / "run"), tmp_path / "unfinished")
    if stage == "reward":  # the scale of its scores is measured at the end
        assert "not standardised" in (tmp_path / "export.log").read_text()
        noted = json.loads((run_dir / "hf" / "config.json").read_text())
        config = json.loads((unfinished / "config.json").read_text())
        assert noted.keys() - config.keys() == {"score_mean", "score_std"}
        (unfinished / "config.json").write_bytes((run_dir / "hf" / "config.json").read_bytes())
    assert_same_folder(unfinished, run_dir / "hf")


def test_an_earlier_checkpoint_is_the_model_of_that_step(tmp_path: Path):
    """It is what a run that ends there writes."""
    for steps in (6, 4):
        run_dir = tmp_path / str(steps)
        succeed(
            arguments("pretrain", run_dir, "optim.schedule=constant", f"training.num_steps={steps}"), tmp_path / "log"
        )
    long, short = (tmp_path / steps / "demo" / "pretrain" for steps in ("6", "4"))
    assert_same_folder(export(long, tmp_path / "earlier", "--step", "4"), short / "hf")
    assert (long / "hf" / "model.safetensors").read_bytes() != (short / "hf" / "model.safetensors").read_bytes()


def test_the_policy_of_rlhf_is_exported(chain: Path, tmp_path: Path):
    paths = [f"model.path={chain}/demo/sft", f"reward.path={chain}/demo/reward"]
    succeed(arguments("rlhf", tmp_path, *paths, "training.num_steps=2"), tmp_path / "log")
    run_dir = tmp_path / "demo" / "rlhf"
    assert_same_folder(export(run_dir, tmp_path / "finished"), run_dir / "hf")
    assert_same_folder(export(without_hf(run_dir, tmp_path / "run"), tmp_path / "unfinished"), run_dir / "hf")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deepspeed_is_exported_from_its_fp32_weights(tmp_path: Path, precision: str):
    import torch

    from llmscale.models.loading import load_language_model

    settings = ["engine=deepspeed", f"engine.precision={precision}", "training.num_steps=2"]
    succeed(arguments("pretrain", tmp_path, *settings), tmp_path / "log")
    run_dir = tmp_path / "demo" / "pretrain"
    out = export(run_dir, tmp_path / "out")
    masters, written = (load_language_model(str(folder)) for folder in (out, run_dir / "hf"))
    for name, weight in masters.named_parameters():
        rounded = weight.to(torch.bfloat16).float() if precision == "bf16" else weight
        assert torch.equal(rounded, written.get_parameter(name)), name
    stored = json.loads((out / "config.json").read_text())["dtype"]
    assert stored == "float32"


def test_a_broken_checkpoint_is_never_exported(chain: Path, tmp_path: Path):
    run_dir = shutil.copytree(chain / "demo" / "sft", tmp_path / "run", symlinks=True)
    (state,) = (run_dir / "checkpoints" / "step-000006").glob("state-*")
    flip(state)
    command = ["checkpoint", "export", str(run_dir), str(tmp_path / "out")]
    assert run([*command, "--step", "6"], tmp_path / "log") == 1
    assert f"the content of {state.name} is not what was written" in (tmp_path / "log").read_text()
    assert not (tmp_path / "out").exists()
    succeed(command, tmp_path / "log")
    said = (tmp_path / "log").read_text()
    assert "passing over" in said and "the model of step 4" in said


def test_an_export_replaces_nothing(checkpoint: Command, run_dir: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    code, _, err = checkpoint("export", run_dir, tmp_path / "out")
    assert code == 2 and "there is something already" in err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious"]
