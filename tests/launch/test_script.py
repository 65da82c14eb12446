"""Scripts are clean shell, and hold what the launch says."""

from __future__ import annotations

import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from llmscale.compose import compose
from llmscale.launch.plan import plan
from llmscale.launch.script import Job, local_script, slurm_script
from tests.conftest import ROOT

RLHF = ["data.train=x", "model.path=m", "reward=answer", "cluster=ray"]
PRETRAIN = ["data.train=a file's.txt", "engine=deepspeed", "cluster.trainer.num_workers=4"]
IMAGE = ["launch.image=registry/llmscale.sqsh"]


EXAMPLES = {  # of slurm/: what a script looks like
    "sft": ["experiment=demo", "launch.nodes=2"],
    "rlhf": ["experiment=demo", "launch.role_nodes={policy: 1, critic: 1, rollout: 1}"],
}


def job(stage: str, overrides: list[str], *launch: str) -> Job:
    config, launched = compose(stage, overrides), compose("submit", launch).launch
    run_dir = Path("/shared/my runs/trial") / stage
    here = Path("/shared/here")
    return Job(
        stage, overrides, [], here, here / ".venv/bin", run_dir, f"trial-{stage}-1", launched, plan(config, launched)
    )


@pytest.mark.parametrize(
    ("stage", "overrides", "launch"),
    [
        ("pretrain", PRETRAIN, ["launch=local"]),
        ("pretrain", PRETRAIN, ["launch=slurm", "launch.nodes=2"]),
        ("pretrain", PRETRAIN, ["launch=slurm", "launch.secrets_file=keys.env"]),
        ("pretrain", PRETRAIN, ["launch=slurm", "launch.container=pyxis", *IMAGE]),
        ("pretrain", PRETRAIN, ["launch=slurm", "launch.container=apptainer", *IMAGE]),
        ("rlhf", RLHF, ["launch=slurm", "launch.role_nodes={policy: 1, rollout: 1}"]),
        ("rlhf", RLHF, ["launch=slurm", "launch.container=apptainer", *IMAGE]),
    ],
)
def test_it_is_clean_shell_and_gives_the_command(
    stage: str, overrides: list[str], launch: list[str], tmp_path: Path
) -> None:
    made = job(stage, overrides, *launch)
    text = local_script(made) if launch[0] == "launch=local" else slurm_script([made])
    file = tmp_path / "job.sh"
    file.write_text(text)
    checked = subprocess.run(["shellcheck", str(file)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    assert "@{" not in text
    line = next(line for line in text.splitlines() if line.startswith(f"command=(llmscale {stage} "))
    words = shlex.split(line.removeprefix("command=(").removesuffix(")"))
    assert set(overrides) <= set(words)


def directives(*launch: str, stage: str = "pretrain", overrides: list[str] = PRETRAIN) -> list[str]:
    text = slurm_script([job(stage, overrides, "launch=slurm", *launch)])
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def test_slurm_is_told_what_the_launch_says() -> None:
    names = ["partition", "account", "qos", "constraint", "exclude"]
    given = [f"launch.{name}={name}1" for name in names]
    more = [
        "launch.extra=['--reservation=night']",
        "launch.exclusive=true",
        "launch.mem_per_node=64G",
        "launch.time=2:00:00",
    ]
    lines = directives("launch.nodes=2", "launch.signal_lead_s=300", *given, *more)
    assert set(lines) == {
        *(f"--{name}={name}1" for name in names), "--reservation=night", "--exclusive", "--mem=64G", "--time=2:00:00",
        "--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1", "--job-name=trial-pretrain-1",
        "--comment=trial-pretrain-1", "--requeue", "--open-mode=append", "--signal=B:USR1@300", "--output=/dev/null",
    }  # fmt: skip


def test_gpus_are_asked_for_by_number_or_as_the_site_wants_it() -> None:
    gpus = [*PRETRAIN, "cluster=gpus", "cluster.trainer.num_workers=4"]
    assert "--gpus-per-node=4" in directives(overrides=gpus)
    lines = directives("launch.gres=gpu:a100:4", overrides=gpus)
    assert "--gres=gpu:a100:4" in lines and not any("gpus-per-node" in line for line in lines)


@pytest.mark.parametrize(
    ("container", "words"),
    [("pyxis", ["--container-image=", "--container-mounts=/shared/here:"]), ("apptainer", ["apptainer exec --bind"])],
)
def test_every_command_of_a_job_runs_in_its_container(container: str, words: list[str]) -> None:
    text = slurm_script([job("rlhf", RLHF, "launch=slurm", f"launch.container={container}", *IMAGE)])
    lines = text.replace("\\\n", " ").splitlines()
    ours = [line for line in lines if "-m llmscale." in line or '"${command[@]}"' in line]
    assert len(ours) == 5  # begin, health, end, Ray, driver
    assert all(word in line for line in ours for word in words)


@pytest.mark.parametrize("stage", sorted(EXAMPLES))
def test_the_examples_of_slurm_are_what_is_written(stage: str) -> None:
    """To write them again: WRITE=1."""
    words = EXAMPLES[stage]
    launch = [word for word in words if word.startswith("launch")]
    overrides = [word for word in words if word not in launch]
    made = replace(job(stage, overrides, "launch=slurm", *launch), run_dir=Path("/shared/here/runs/demo") / stage)
    text = slurm_script([made])
    file = ROOT / "slurm" / f"{stage}.sbatch"
    if os.environ.get("WRITE"):
        file.write_text(text)
    assert file.read_text() == text


def test_an_array_is_one_script_that_knows_its_runs(tmp_path: Path) -> None:
    jobs = [
        replace(job("pretrain", [*PRETRAIN, f"run.seed={seed}"], "launch=slurm"), run_dir=tmp_path / str(seed))
        for seed in (3, 5)
    ]
    text = slurm_script(jobs)
    assert "#SBATCH --array=0-1\n" in text
    until_paths = text.partition("\nexport PATH")[0]
    for number, seed in enumerate((3, 5)):
        shown = subprocess.run(
            ["bash", "-c", f'{until_paths}\nprintf "%s\\n" "$run" "${{command[@]}}"'],
            env={"SLURM_ARRAY_TASK_ID": str(number), "PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert shown.stdout.splitlines() == [
            str(tmp_path / str(seed)),
            "llmscale",
            "pretrain",
            *PRETRAIN,
            f"run.seed={seed}",
        ]
