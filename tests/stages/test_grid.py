"""From a command line to the jobs of a sweep. Nothing here starts one."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from llmscale.cli import main
from llmscale.compose import compose
from llmscale.config import to_dict
from llmscale.stages.grid import Sweep, compose_sweep
from llmscale.stages.pipeline import compose_stages

SFT = ["data.train=x", "model.path=y", "run.name=trial"]


def grid(*overrides: str, stage: str = "sft") -> Sweep:
    return compose_sweep(stage, [*SFT, *overrides], None)


def names(sweep: Sweep) -> list[str]:
    return [job.name for job in sweep.jobs]


# ---------------------------------------------------------------- what is swept


def test_the_grid_is_the_product_and_the_first_key_varies_slowest():
    sweep = grid("optim.lr=1e-3,3e-4", "run.seed=0,1,2")
    assert names(sweep) == [f"lr={lr},seed={seed}" for lr in ("0.001", "0.0003") for seed in (0, 1, 2)]
    assert sweep.jobs[1].title == "lr=0.001 seed=1"
    assert sweep.jobs[-1].values == {"optim.lr": 3e-4, "run.seed": 2}
    assert [(job.configs["sft"].optim.lr, job.configs["sft"].run.seed) for job in sweep.jobs][-1] == (3e-4, 2)
    assert sweep.directory == Path("runs/trial")
    assert sweep.jobs[0].configs["sft"].run_dir == Path("runs/trial/lr=0.001,seed=0/sft")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.seed=range(0,3)", ["seed=0", "seed=1", "seed=2"]),
        ("run.seed=choice(7)", ["seed=7"]),
        ("optim.lr=range(0.1,0.4,step=0.1)", ["lr=0.1", "lr=0.2", "lr=0.3"]),
        ("engine=single,deepspeed", ["engine=single", "engine=deepspeed"]),
        ("engine=glob(*)", ["engine=deepspeed", "engine=single"]),
        ("optim.lr=1e-3,0.001", ["lr=0.001"]),
        ("data.max_records=null,5", ["max_records=null", "max_records=5"]),
        ("+run.seed=1,2", ["seed=1", "seed=2"]),
    ],
)
def test_hydras_syntax(override: str, expected: list[str]):
    assert names(grid(override)) == expected


def test_text_keeps_what_it_is():
    overrides = ["data.system_prompt='a, b','c=\"d\"',plain"]
    jobs = grid(*overrides).jobs
    assert [job.configs["sft"].data.system_prompt for job in jobs] == ["a, b", 'c="d"', "plain"]
    assert [job.values["data.system_prompt"] for job in jobs] == ["a, b", 'c="d"', "plain"]
    for job in jobs:
        assert compose("sft", job.overrides) == job.configs["sft"]


def test_a_lone_value_that_is_not_hydras_passes_as_without_a_sweep():
    sweep = grid("data.train=task:sorting/sft?seed=1&size=(3)", "run.seed=0,1")
    assert {job.configs["sft"].data.train for job in sweep.jobs} == {"task:sorting/sft?seed=1&size=(3)"}


# ---------------------------------------------------------------- names


def test_keys_are_as_short_as_they_can_be():
    sweep = grid("optim.lr=1e-3", "run.seed=0,1", "model.dropout=0,0.1")
    assert list(sweep.keys.values()) == ["seed", "dropout"]
    swept = ["sft.optim.lr=1e-3,3e-4", "reward.optim.lr=choice(1e-4)", "sft.run.seed=choice(1)"]
    overrides = ["experiment=demo", "stages=[sft,reward]", *swept]
    keys = compose_sweep("pipeline", overrides, None).keys
    assert list(keys.values()) == ["sft.optim.lr", "reward.optim.lr", "seed"]


def test_names_are_safe_and_stay_apart():
    train = ["a/b.txt", "a-b.txt", "a b.txt", "ä.txt", "x" * 300, "x" * 301, "[a].txt", ".."]
    quoted = ",".join(f"'{text}'" for text in train)
    found = names(grid(f"data.validation={quoted}"))
    assert len(set(found)) == len(train)
    assert all(len(name) < 100 and name.isascii() and not set(name) & set("/ []*?'\"$\\") for name in found)
    assert found[1] == "validation=a-b.txt", "what is safe stays as it is"


def test_many_keys_make_no_name_that_is_too_long():
    keys = ("data.validation", "tracking.wandb_entity", "data.system_prompt", "tracking.wandb_project")
    found = names(
        grid(*(f"{key}={'x' * 38}1,{'x' * 38}2" for key in keys[:2]), *(f"{k}=choice({'y' * 39})" for k in keys[2:]))
    )
    assert len(set(found)) == 4 and max(map(len, found)) < 130


def test_a_grown_sweep_finds_its_old_jobs():
    few, more = grid("optim.lr=1e-3,3e-4", "run.seed=0,1"), grid("optim.lr=1e-4,1e-3,3e-4", "run.seed=1,0")
    assert set(names(few)) < set(names(more))
    by_name = {job.name: job.configs for job in more.jobs}
    assert all(by_name[job.name] == job.configs for job in few.jobs)


# ---------------------------------------------------------------- configs


def test_a_job_alone_is_an_ordinary_run():
    for stage, overrides in (
        ("sft", ["experiment=demo", "cluster=local", "optim.lr=choice(1e-3)", "engine=single,deepspeed"]),
        ("rlhf", ["experiment=demo", "run.name=other", "true_reward=answer,null", "rollout.temperature=0.7"]),
    ):
        for job in compose_sweep(stage, overrides, None).jobs:
            assert compose(stage, job.overrides) == job.configs[stage]


def test_a_stage_starts_from_what_lies_outside_the_sweep():
    sweep = compose_sweep("rlhf", ["experiment=demo", "run.seed=0,1"], None)
    config = sweep.jobs[1].configs["rlhf"]
    assert config.run.name == "demo/seed=1"
    assert (config.model.path, config.reward.path) == ("runs/demo/sft", "runs/demo/reward")


def test_the_stages_of_a_pipeline_find_each_other_in_their_job():
    sweep = compose_sweep("pipeline", ["experiment=demo", "stages=[sft,reward],[sft]", "sft.optim.lr=0.1,0.2"], None)
    assert [[*job.configs] for job in sweep.jobs] == [["sft", "reward"]] * 2 + [["sft"]] * 2
    job = sweep.jobs[1]
    assert job.configs["sft"].optim.lr == 0.2
    assert job.configs["reward"].model.path == f"runs/demo/{job.name}/sft" == str(job.configs["sft"].run_dir)
    assert compose_stages(job.overrides, None) == job.configs


def test_jobs_share_a_group_in_wandb():
    assert {job.configs["sft"].tracking.wandb_group for job in grid("run.seed=0,1").jobs} == {"trial"}
    own = grid("run.seed=0,1", "tracking.wandb_group=mine")
    assert {job.configs["sft"].tracking.wandb_group for job in own.jobs} == {"mine"}
    assert compose("sft", SFT).tracking.wandb_group is None


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("argv", "hints"),
    [
        (["sft", *SFT], ["-m", "one value", "optim.lr=1e-3,3e-4"]),
        (["sft", *SFT, "data.system_prompt='a,b'", "optim.betas=[0.9,0.95]"], ["one value"]),
        (["generate", "model.path=a,b"], ["generate trains nothing", "Leave out -m"]),
        (["chat", "model.path=a,b"], ["chat trains nothing"]),
        (["sft", *SFT, "optim.lr=1e-3,-1"], ["optim.lr: must be at least 0", "(job lr=-1)"]),
        (["sft", *SFT, "run.seed=0,1", "optim.lr=1e-3,abc"], ["optim.lr: must be a number", "job seed=0 lr=abc"]),
        (["sft", *SFT, "optim.lrr=1,2"], ["Did you mean optim.lr?"]),
        (["sft", *SFT, "engine=single,nope"], ["'nope'", "deepspeed, single"]),
        (
            ["sft", *SFT, "engine=deepspeed,single", "cluster.trainer.num_workers=2,1"],
            ["cluster.trainer.num_workers: ", "(job engine=single num_workers=2)"],
        ),
        (["pipeline", "experiment=demo", "sft.optim.lr=1,abc"], ["sft.optim.lr: must be a number"]),
        (["sft", *SFT, "optim.lr=interval(0,1)"], ["optim.lr: interval(0,1)", "range(...)"]),
        (["sft", *SFT, "run.seed=range(0,0)"], ["run.seed: range(0,0) gives no value"]),
        (["sft", *SFT, "engine=glob(x*)"], ["engine: glob(x*) gives no value"]),
        (["sft", *SFT, "optim.lr=1,"], ["optim.lr: these values cannot be read", "quotes"]),
        (["sft", *SFT, "data.train=task:a?b=1,task:a?b=2"], ["data.train: these values cannot be read", "quotes"]),
        (["sft", *SFT, "run.name=a,b"], ["run.name: names the whole sweep"]),
        (["sft", *SFT, "run.dir=a,b"], ["run.dir: names the whole sweep"]),
        (["sft", *SFT, "optim.lr=1,2", "optim.lr=3"], ["optim.lr: is swept and given once more"]),
        (["sft", "experiment=demo,real"], ["run.name: the sweep needs a name"]),
        (["sft", *SFT, "optim.lr=1,2", "run.dir=/proc/nowhere"], ["/proc/nowhere/trial: sweep.json cannot be written"]),
    ],
)
def test_a_wrong_sweep_is_one_error(argv: list[str], hints: list[str], tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([argv[0], "-m", *argv[1:]])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert err.startswith("error: ") and "Traceback" not in err
    assert all(hint in err for hint in hints), err
    assert list(tmp_path.iterdir()) == []


def test_several_values_without_a_sweep_are_told_of_it(capsys):
    with pytest.raises(SystemExit):
        main(["sft", *SFT, "optim.lr=1e-3,3e-4"])
    err = capsys.readouterr().err
    assert "optim.lr: this value cannot be read" in err and "-m " in err


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_ranks_that_others_started_run_no_sweep(variable: str, monkeypatch, capsys):
    monkeypatch.setenv(variable, "2")
    with pytest.raises(SystemExit):
        main(["sft", "-m", *SFT, "run.seed=0,1"])
    err = capsys.readouterr().err
    assert "2 ranks" in err and "cluster.trainer.num_workers" in err


def test_cfg_prints_the_config_of_each_job(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["sft", *SFT, "-m", "optim.lr=0.5,0.25", "--cfg", "job"])
    assert ended.value.code == 0
    first, second = [yaml.safe_load(part) for part in capsys.readouterr().out.split("# lr=0.25/sft\n")]
    assert (first["optim"]["lr"], second["optim"]["lr"]) == (0.5, 0.25)
    assert second == to_dict(grid("optim.lr=0.5,0.25").jobs[1].configs["sft"])
