"""The command line: what it answers, and with which exit code. Nothing here loads torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llmscale.cli import SUMMARY, _named, main
from llmscale.compose import choices, compose
from llmscale.config import STAGE, from_dict, options

ROOT = Path(__file__).parent.parent


@pytest.fixture
def llmscale(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """llmscale(*argv) -> (exit code, standard output, standard error)"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(*argv: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(argv)
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_shows_stages_groups_overrides_and_an_example(llmscale, flag: str):
    code, out, err = llmscale(flag)
    assert (code, err) == (0, "")
    assert all(f"\n  {stage} " in out for stage in SUMMARY)
    for group in ("engine", "algorithm", "experiment", "model", "reward"):
        assert all(choice in out for choice in choices(group))
    assert all(
        part in out for part in ("run.name=", "data.train=", "tracking.wandb=disabled", "--plugin", "--config-dir")
    )
    assert "llmscale pipeline experiment=demo" in out
    assert max(map(len, out.splitlines())) <= 120


def test_every_stage_has_a_line_in_help():
    assert {*SUMMARY, "submit"} == set(options(STAGE)), "submit is a verb that takes a stage, with a config of its own"


@pytest.mark.parametrize("stage", sorted(SUMMARY))
def test_help_of_a_stage_lists_its_keys_with_value_and_meaning(llmscale, stage: str):
    code, out, _ = llmscale(stage, "--help")
    assert code == 0
    assert out.startswith(f"usage: llmscale {stage} ")
    assert SUMMARY[stage] in out
    if stage != "pipeline":
        assert "model.path=" in out
        assert "temperature=" in out or "optim.lr=" in out
    assert "???" not in out and "<factory>" not in out


def test_help_of_a_stage_shows_its_own_defaults_and_choices(llmscale):
    _, out, _ = llmscale("rlhf", "-h")
    assert "optim.lr=0.0001 " in out, "of conf/rlhf.yaml, not of the dataclass"
    assert "reward.path=${run.dir}/${run.name}/reward" in out
    assert "fp32 | bf16" in out
    assert (
        "[learned],\n" in out and "\n                        length, logic," in out
    )  # a long list goes on below itself
    assert "Peak learning rate" in out
    assert "model.path=(needed)" in llmscale("generate", "-h")[1]


def test_the_place_of_an_error_gets_the_key_that_named_it():
    values = [("model.path", "runs/a"), ("algorithm.kl_place", "reward"), ("reward.path", "r"), ("run.seed", 0)]
    assert _named("runs/a", values) == "model.path=runs/a"
    assert _named("reward", values) == "reward" and _named("run.seed", values) == "run.seed"
    assert _named("draw 3, sample 1", values) == "draw 3, sample 1" and _named(None, values) is None


def test_help_can_be_cut_off():
    code = "import sys; from llmscale.cli import main; main(sys.argv[1:])"
    command = f"{sys.executable} -c '{code}' rlhf --help | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# ---------------------------------------------------------------- printing the config


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "rlhf"])
def test_cfg_prints_what_can_be_read_back(llmscale, stage: str):
    code, out, _ = llmscale(stage, "experiment=demo", "--cfg", "job")
    config = compose(stage, ["experiment=demo"])
    assert code == 0
    assert from_dict(type(config), yaml.safe_load(out)) == config


def test_cfg_of_a_pipeline_prints_each_stage(llmscale):
    code, out, _ = llmscale("pipeline", "experiment=demo", "stages=[sft,rlhf]", "sft.optim.lr=0.5", "--cfg", "job")
    assert code == 0
    sft, rlhf = [yaml.safe_load(part) for part in out.split("# rlhf\n")]
    assert (sft["stage"], sft["optim"]["lr"]) == ("sft", 0.5)
    assert (rlhf["stage"], rlhf["optim"]["lr"]) == ("rlhf", compose("rlhf", ["experiment=demo"]).optim.lr)


def test_printing_writes_nothing(llmscale, tmp_path: Path):
    llmscale("pretrain", "experiment=demo", "--cfg", "job")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- usage


@pytest.mark.parametrize(
    ("argv", "hints"),
    [
        ([], ["no stage", "llmscale --help"]),
        (["pretran"], ["'pretran'", "Did you mean pretrain?", "chat"]),
        (["training"], ["'training'", "pretrain, sft, reward"]),
        (["pretran", "--help"], ["Did you mean pretrain?"]),
        (["pretrain", "--optim.lr=3"], ["--optim.lr=3", "no dashes"]),
        (["pretrain", "--steps", "3"], ["--steps", "llmscale STAGE"]),
        (["pretrain", "--plug", "x"], ["--plug"]),
        (["pretrain", "--cfg"], ["--cfg"]),
        (["pretrain", "--cfg", "yaml"], ["'yaml'", "job"]),
        (["pretrain", "--config-dir"], ["--config-dir"]),
        (["pretrain", "data.train=x", "--config-dir", "no/such"], ["--config-dir", "no/such"]),
        (["pretrain", "data.train=x", "optim.lr", "3"], ["optim.lr", "path=value"]),
        (["pretrain", "data.train=x", "--plugin", "no_such_module"], ["no_such_module", "PYTHONPATH"]),
        (["pipeline", "experiment=demo", "stages=[foo]"], ["stages", "'foo'", "pretrain, sft"]),
        (["pipeline", "experiment=demo", "stages=foo"], ["stages", "a list"]),
        (["pipeline", "experiment=demo", "sft.optim.lrr=1"], ["optim.lrr", "sft", "optim.lr?"]),
        (["pipeline", "experiment=demo", "training.num_epochs=3"], ["rlhf has no such key", "pretrain.training."]),
    ],
)
def test_a_wrong_command_is_one_error(llmscale, argv: list[str], hints: list[str], tmp_path: Path):
    code, out, err = llmscale(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert all(hint in err for hint in hints), err
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback_too(llmscale):
    code, _, err = llmscale("pretrain", "--debug", "data.train=x", "nonsense=1")
    assert code == 2
    assert "Traceback" in err
    assert "\nerror: nonsense: " in err


def test_options_may_stand_anywhere(llmscale):
    outputs = {
        llmscale("--cfg", "job", "pretrain", "data.train=x", "optim.lr=0.5"),
        llmscale("pretrain", "data.train=x", "--cfg", "job", "optim.lr=0.5"),
        llmscale("pretrain", "data.train=x", "optim.lr=0.5", "--cfg=job"),
    }
    assert len(outputs) == 1
    assert next(iter(outputs))[0] == 0


# ---------------------------------------------------------------- a user's own parts

PLUGIN = """
from dataclasses import dataclass

from llmscale.config import option
from llmscale.rl.config import PolicyGradientConfig


@option("algorithm", "{name}", builds="{module}:Mine")
@dataclass
class MineConfig(PolicyGradientConfig):
    name: str = "{name}"
    sharpness: float = 2.0  # how sharp


class Mine:
    def __init__(self, config):
        self.config = config
"""
RLHF = ["rlhf", "experiment=demo", "--config-dir", "conf"]


def test_a_plugin_brings_its_own_algorithm(llmscale, tmp_path: Path):
    (tmp_path / "mine_a.py").write_text(PLUGIN.format(name="mine_a", module="mine_a"))
    (tmp_path / "conf" / "algorithm").mkdir(parents=True)
    (tmp_path / "conf" / "algorithm" / "mine_a.yaml").write_text("defaults: [mine_a_schema]\nsharpness: 3.0\n")
    code, out, err = llmscale(*RLHF, "--plugin", "mine_a", "algorithm=mine_a", "algorithm.lam=0.5", "--cfg", "job")
    assert (code, err) == (0, "")
    config = yaml.safe_load(out)
    assert config["plugins"] == ["mine_a"]
    assert config["algorithm"] | {"name": "mine_a", "sharpness": 3.0, "lam": 0.5} == config["algorithm"]
    code, _, err = llmscale(*RLHF, "--plugin", "mine_a", "algorithm=mine_a", "algorithm.sharpnes=3", "--cfg", "job")
    assert code == 2
    assert "Did you mean algorithm.sharpness?" in err
    code, out, _ = llmscale("rlhf", "--help", "--plugin", "mine_a", "--config-dir", "conf")
    assert "mine_a, [ppo], reinforce_pp" in out


@pytest.mark.parametrize(
    ("source", "hint"),
    [("import no_such_thing", "no_such_thing"), ("def f(:", "SyntaxError"), ("1 / 0", "ZeroDivisionError")],
)
def test_a_plugin_that_does_not_import(llmscale, tmp_path: Path, source: str, hint: str):
    module = f"broken_{hint.lower()}"
    (tmp_path / f"{module}.py").write_text(source)
    code, _, err = llmscale("pretrain", "data.train=x", "--plugin", module, "--cfg", "job")
    assert code == 2
    assert err.startswith("error: plugins: ")
    assert module in err and hint in err
    assert "Traceback" not in err


def test_secrets_of_the_environment_stay_there(llmscale, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", "s" * 40)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code, out, _ = llmscale("pretrain", "experiment=demo", "--cfg", "job")
    assert code == 0
    assert "s" * 40 not in out and "hf_secret" not in out


def test_an_interrupt_has_its_own_exit_code(llmscale, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llmscale.cli.compose", interrupted)
    code, _, err = llmscale("pretrain", "data.train=x")
    assert code == 130
    assert "resumes" in err


def test_as_a_program(tmp_path: Path):
    command = [sys.executable, "-m", "llmscale.cli", "pretrain", "nonsense=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 2, done.stderr
