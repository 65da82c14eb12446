"""`llmscale reward objective=<each>` and what RLHF does with its model, on the command line."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stages.runs import SAVE_OFTEN, TINY, arguments, records, run, succeed

MINE = """
from dataclasses import dataclass

from llmscale.config import option
from llmscale.objectives.config import ObjectiveConfig


@option("objective", "mine", builds="mine:Mine")
@dataclass
class MineConfig(ObjectiveConfig):
    name: str = "mine"
    reads = "rankings"


class Mine:
    def __init__(self, config):
        pass

    def scores(self, output, batch):
        return output
"""
HELD_OUT = "data.validation='task:sorting/test-rankings?size=24'"


def reward(chain: Path, run_dir: Path, *overrides: str) -> list[str]:
    argv = [a for a in arguments("reward", run_dir) if not a.startswith("data.validation")]
    return [*argv, f"model.path={chain}/demo/sft", *overrides]


def calibration_event(run_dir: Path) -> dict:
    (event,) = [e for e in records(run_dir / "events.jsonl") if e["kind"] == "calibration"]
    return event


@pytest.mark.parametrize("objective", ["ranking", "plackett_luce", "margin"])
def test_rankings_of_the_projects_own_task(objective: str, chain: Path, tmp_path: Path) -> None:
    printed = succeed(reward(chain, tmp_path, HELD_OUT, f"objective={objective}"), tmp_path / "log")
    run_dir = tmp_path / "demo" / "reward"
    last = records(run_dir / "metrics.jsonl")[-1]
    assert last["step"] == 6 and 0 <= last["eval/ece"] <= 0.5
    event = calibration_event(run_dir)
    assert event["eval/ece"] == last["eval/ece"]
    assert sum(b["count"] for b in event["bins"]) == event["num"] > 24
    report = (run_dir / "calibration.md").read_text()
    assert f"{event['num']} held-out pairs" in report and "| confidence | pairs |" in report
    assert "held-out pairwise accuracy" in printed and "held-out calibration error" in printed
    assert json.loads((run_dir / "hf" / "config.json").read_text())["judges"] == "completions"


def test_log_loss_is_the_validation_loss_of_pairs(chain: Path, tmp_path: Path) -> None:
    """Where every ranking is one pair, both are the mean of -log sigmoid(r_w - r_l): the report is about the trained model."""
    pairs = [{"prompt": f"sort {w}", "chosen": "".join(sorted(w)), "rejected": w} for w in ("cab", "dab", "fed", "gca")]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    argv = reward(chain, tmp_path, f"data.validation={tmp_path}/pairs.jsonl", "objective=ranking")
    succeed(argv, tmp_path / "log")
    *_, trained, appraised = records(tmp_path / "demo" / "reward" / "metrics.jsonl")
    assert appraised["eval/log_loss"] == pytest.approx(trained["eval/loss"], rel=1e-4)


def test_margins_without_ratings_are_refused_before_training(chain: Path, tmp_path: Path) -> None:
    pairs = [
        {"prompt": "Q", "chosen": "a", "rejected": "b", "margin": 1},
        {"prompt": "Q", "chosen": "a", "rejected": "c"},
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    argv = reward(chain, tmp_path, "objective=margin", f"data.train={tmp_path}/pairs.jsonl", "data.validation=null")
    assert run(argv, tmp_path / "log") == 2
    printed = (tmp_path / "log").read_text()
    assert "there is a ranking without ratings" in printed and "objective.margin=0" in printed
    assert "Traceback" not in printed and not (tmp_path / "demo" / "reward" / "metrics.jsonl").exists()


def test_an_objective_of_ones_own_must_say_what_its_output_means(chain: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "conf" / "objective").mkdir(parents=True)
    (tmp_path / "conf" / "objective" / "mine.yaml").write_text("defaults: [mine_schema]\n")
    argv = [*reward(chain, tmp_path, "objective=mine"), "--plugin", "mine", "--config-dir", f"{tmp_path}/conf"]
    code = f"import os, sys; os.chdir({str(tmp_path)!r}); from llmscale.cli import main; main({argv!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "error: objective: Mine has no evidence" in done.stderr
    assert not (tmp_path / "demo" / "reward" / "metrics.jsonl").exists()


def test_margins_of_a_whole_order_are_refused(chain: Path, tmp_path: Path) -> None:
    assert run(reward(chain, tmp_path, "objective=plackett_luce", "objective.margin=1"), tmp_path / "log") == 2
    assert "objective.margin: is a margin between the two of a pair" in (tmp_path / "log").read_text()


@pytest.mark.realdata
@pytest.mark.parametrize("objective", ["ranking", "plackett_luce"])
def test_pairs_of_real_data(objective: str, chain: Path, shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "preference" / "dpo_en_demo.json"
    own = ["data.max_seq_len=128", "training.num_steps=4", "tracking.wandb=disabled", f"objective={objective}"]
    argv = ["reward", "experiment=real", f"run.dir={tmp_path}", f"model.path={chain}/demo/sft", f"data.train={source}"]
    succeed([*argv, *own], tmp_path / "log")
    last = records(tmp_path / "real" / "reward" / "metrics.jsonl")[-1]
    assert 0 <= last["eval/ece"] <= 0.5 and math.isfinite(last["eval/log_loss"])


# ---------------------------------------------------------------- process


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory in which the pipeline of the experiment `steps` is finished, made tiny."""
    run_dir = tmp_path_factory.mktemp("steps")
    tiny = {stage: [o for o in own if not o.startswith("data.validation=")] for stage, own in TINY.items()}
    tiny["rlhf"] += ["data.validation='task:adding/test?size=16'", "training.num_steps=8"]
    overrides = [f"{stage}.{o}" for stage, own in tiny.items() for o in [*own, *SAVE_OFTEN]]
    argv = ["pipeline", "experiment=steps", f"run.dir={run_dir}", "tracking.wandb=disabled", *overrides]
    (run_dir / "printed").write_text(succeed(argv, run_dir / "log"))
    return run_dir


def test_a_process_reward_model_is_trained_and_appraised(steps: Path) -> None:
    run_dir = steps / "steps" / "reward"
    *_, trained, appraised = records(run_dir / "metrics.jsonl")
    assert {"eval/accuracy", "eval/accuracy_wrong", "eval/loss"} <= trained.keys()
    assert appraised["eval/log_loss"] == pytest.approx(trained["eval/loss"], rel=1e-4)  # every label is sure
    assert "held-out steps" in (run_dir / "calibration.md").read_text()
    config = json.loads((run_dir / "hf" / "config.json").read_text())
    assert config["judges"] == "steps" and "score_mean" not in config  # the log-odds stay what they are
    assert "held-out accuracy of steps" in (steps / "printed").read_text()


def test_rlhf_is_rewarded_by_the_steps(steps: Path) -> None:
    samples = records(steps / "steps" / "rlhf" / "samples.jsonl")
    assert all(0 <= s["reward"] < 1 for s in samples)
    assert len({s["reward"] for s in samples}) > 1
    assert all((s["reward"] == 0) == (not s["completion"].strip()) for s in samples)


@pytest.mark.parametrize("aggregation", ["minimum", "last"])
def test_another_aggregation_is_one_key(aggregation: str, steps: Path, tmp_path: Path) -> None:
    own = [o for o in TINY["rlhf"] if not o.startswith("data.validation=")]
    argv = ["rlhf", "experiment=steps", f"run.dir={tmp_path}", "tracking.wandb=disabled", *own, "training.num_steps=1"]
    paths = [f"model.path={steps}/steps/sft", f"reward.path={steps}/steps/reward", "data.validation=null"]
    succeed([*argv, *paths, f"reward.aggregation={aggregation}"], tmp_path / "log")
    samples = records(tmp_path / "steps" / "rlhf" / "samples.jsonl")
    same = [s for s in records(steps / "steps" / "rlhf" / "samples.jsonl") if s["step"] == 1]
    assert [s["token_ids"] for s in samples] == [s["token_ids"] for s in same]  # of the same policy
    assert all(
        s["reward"] >= p["reward"] - 1e-6 for s, p in zip(samples, same, strict=True)
    )  # no less than the product


def test_the_judge_of_steps_and_that_of_completions_are_told_apart(steps: Path, chain: Path, tmp_path: Path) -> None:
    argv = arguments("rlhf", tmp_path, f"model.path={chain}/demo/sft", f"reward.path={steps}/steps/reward")
    assert run(argv, tmp_path / "log") == 2
    assert "this reward model judges steps, not completions" in (tmp_path / "log").read_text()


def test_a_checkpoint_of_a_judge_of_steps_is_exported_as_one(steps: Path, tmp_path: Path) -> None:
    """Of a run that is not finished: without its hf/."""
    unfinished = tmp_path / "unfinished"
    shutil.copytree(steps / "steps" / "reward", unfinished, ignore=lambda _, names: {"hf"} & set(names))
    printed = succeed(["checkpoint", "export", str(unfinished), str(tmp_path / "out")], tmp_path / "log")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["judges"] == "steps"
    assert "not standardised" not in printed  # steps never are


# ---------------------------------------------------------------- ensembles


@pytest.mark.slow
def test_rlhf_with_an_ensemble(chain: Path, tmp_path: Path) -> None:
    """The shipped experiment: three runs of a sweep, and the policy that they reward."""
    (tmp_path / "demo").symlink_to(chain / "demo")

    def tiny(stage: str, *overrides: str) -> list[str]:
        return [a.replace("experiment=demo", "experiment=ensemble") for a in arguments(stage, tmp_path, *overrides)]

    succeed([*tiny("reward", "run.seed=0,1,2", "training.num_steps=2"), "-m"], tmp_path / "sweep.log")
    runs = {
        "shipped": [],
        "two_deviations": ["reward.std_coef=2.0"],
        "mean": ["reward.combine=mean"],
        "minimum": ["reward.combine=minimum"],
        "first": ["reward.combine=mean", "reward.ensemble=[]"],
    }
    rewards = {}
    for name, overrides in runs.items():
        succeed(tiny("rlhf", "training.num_steps=1", f"run.name={name}", *overrides), tmp_path / f"{name}.log")
        rewards[name] = [s["reward"] for s in records(tmp_path / name / "rlhf" / "samples.jsonl")]
    for shipped, two, mean, minimum, first in zip(*(rewards[n] for n in runs), strict=True):
        assert shipped < mean and minimum < mean and minimum <= first + 1e-4
        assert mean - two == pytest.approx(2 * (mean - shipped), rel=1e-4)
    assert rewards["shipped"] != rewards["mean"] != rewards["minimum"] != rewards["first"]


def test_an_impossible_ensemble_is_refused(chain: Path, tmp_path: Path) -> None:
    argv = arguments("rlhf", tmp_path, f"model.path={chain}/demo/sft", f"reward.path={chain}/demo/reward")
    assert run([*argv, "reward.combine=minimum"], tmp_path / "log") == 2
    assert "reward.combine: minimum of a single model is its own score" in (tmp_path / "log").read_text()
