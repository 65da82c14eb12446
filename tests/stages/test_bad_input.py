"""A user who gets everything wrong: each mistake ends in one error that says where and what to do, with the exit code
of its kind, no traceback, and nothing in the run directory that looks finished.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmscale.checkpoint.run_directory import open_run
from llmscale.cli import main
from llmscale.compose import compose

MODEL = [
    "model.hidden_size=32",
    "model.intermediate_size=32",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.vocab_size=261",
    "model.max_position=64",
]
COMMON = ["data.max_seq_len=48", "tracking.wandb=disabled", "engine.micro_batch_size=4", "training.num_steps=1"]
PRETRAIN = ["pretrain", "data.train=text.jsonl", *MODEL, *COMMON, "training.global_batch_size=4"]
SFT = ["sft", "data.train=sft.jsonl", "model.path=runs/ok/pretrain", *COMMON, "training.global_batch_size=4"]
REWARD = ["reward", "data.train=rankings.jsonl", "model.path=runs/ok/sft", *COMMON, "training.global_batch_size=4"]
RLHF = [
    "rlhf",
    "data.train=prompts.jsonl",
    "model.path=runs/ok/sft",
    *COMMON,
    "training.prompts_per_step=2",
    "algorithm.global_batch_size=2",
    "rollout.max_new_tokens=4",
]
LEARNED = [*RLHF, "reward.path=runs/ok/reward"]
FUNCTION = [*RLHF, "reward=function"]
FILES = {
    "text.jsonl": [{"text": f"the cat sat on mat {i}"} for i in range(12)],
    "sft.jsonl": [{"prompt": f"q {i}", "completion": f"a {i}"} for i in range(8)],
    "rankings.jsonl": [{"prompt": f"q {i}", "completions": [f"a {i}", "b"], "ranks": [1, 2]} for i in range(8)],
    "prompts.jsonl": [{"prompt": f"q {i}", "answer": "a"} for i in range(8)],
    "empty.jsonl": [],
    "column.jsonl": [{"body": "x"}],
    "half.jsonl": [{"prompt": "q", "completion": "a"}, {"prompt": "q"}],
    "one.jsonl": [
        {"prompt": "q", "completions": ["a", "b"], "ranks": [1, 2]},
        {"prompt": "q", "completions": ["a"], "ranks": [1]},
    ],
    "long.jsonl": [{"prompt": "q", "answer": "a"}, {"prompt": "q " * 50, "answer": "a"}],
}
REWARDS = """
calls = 0

def boom(prompt, completion, fields):
    return {}["no such key"]

def nan(prompt, completion, fields):
    global calls
    calls += 1
    return 1.0 if calls < 2 else float("nan")

def text(prompt, completion, fields):
    return "very good"
"""  # fmt: skip


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of every kind and tiny finished runs, in runs/ok."""
    folder = tmp_path_factory.mktemp("ground")
    for name, records in FILES.items():
        (folder / name).write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "malformed.jsonl").write_text('{"text": "a"}\n{"text": oops\n')
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "syntax.py").write_text("def boom(:\n")
    (folder / "a_file").write_text("")
    (folder / "no_model").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", [*sys.path])
        for argv in (PRETRAIN, SFT, REWARD):
            with pytest.raises(SystemExit) as ended:
                main([*argv, "run.name=ok"])
            assert ended.value.code == 0
    cut = folder / "cut_model"
    shutil.copytree(folder / "runs/ok/sft/hf", cut)
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    return folder


Answer = Callable[..., tuple[int, str]]


@pytest.fixture
def llmscale(
    ground: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Answer:
    """llmscale(*argv) -> (exit code, the error message), in the folder `ground` and a run of its own."""
    monkeypatch.chdir(ground)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(*argv: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main(argv)
        error = capfd.readouterr().err
        assert "Traceback" not in error
        assert error.count("error: ") <= 1
        return int(ended.value.code or 0), error.partition("error: ")[2]

    return run


def looks_finished(run: Path) -> list[str]:
    """What a later command could take for a result of this run."""
    return [p.name for p in run.glob("*/*") if p.name in ("result.json", "hf", "checkpoints")]


def mistake(argv: list[str], *hints: str) -> object:
    named = "-".join(a for a in argv if a not in {*PRETRAIN, *SFT, *REWARD, *LEARNED, *FUNCTION})
    return pytest.param(argv, hints, id=f"{argv[0]}-{named}".replace("/", "_"))


@pytest.mark.parametrize(
    ("argv", "hints"),
    [
        # data
        mistake([*PRETRAIN, "data.train=text.json"], "data.train=text.json: no such file", "text.jsonl"),
        mistake([*PRETRAIN, "data.validation=nope.txt"], "data.validation=nope.txt: no such file"),
        mistake([*PRETRAIN, "data.train=empty.jsonl"], "data.train=empty.jsonl: ", "no record"),
        mistake([*PRETRAIN, "data.train=malformed.jsonl"], "malformed.jsonl:2: ", "not JSON"),
        mistake([*PRETRAIN, "data.train=column.jsonl"], "column.jsonl:1: ", "data.columns.text=NAME", "body"),
        mistake([*PRETRAIN, "data.train=task:sorting/nope"], "data.train=task:sorting/nope: ", "task:sorting/pretrain"),
        mistake([*SFT, "data.train=half.jsonl"], "half.jsonl:2: ", "prompt+completion"),
        mistake([*SFT, "data.max_seq_len=3"], "data.train=sft.jsonl: ", "data.max_seq_len"),
        mistake([*REWARD, "data.train=one.jsonl"], "one.jsonl:2: ", "2 to 9 completions"),
        mistake([*REWARD, "data.train=sft.jsonl"], "sft.jsonl:1: ", "data.columns.chosen=NAME"),
        mistake([*LEARNED, "data.train=long.jsonl"], "long.jsonl:2: ", "data.max_seq_len 48", "data.too_long=drop"),
        mistake([*LEARNED, "data.too_long=truncate"], "data.too_long: ", "drop"),
        # models
        mistake([*SFT, "model.path=./nope"], "model.path=./nope: no such model folder", "run directory"),
        mistake([*SFT, "model.path=no_model"], "model.path=no_model: ", "holds no model"),
        mistake([*SFT, "model.path=no_such_name"], "model.path=no_such_name: cannot load"),
        mistake([*SFT, "model.path=cut_model"], "model.path=cut_model: cannot load a model", "incomplete"),
        mistake([*PRETRAIN, "model.architecture=nope"], "model.architecture: ", "llama"),
        mistake([*PRETRAIN, "model.tokenizer=./nope"], "model.tokenizer=./nope: "),
        mistake([*LEARNED, "critic.path=./nope"], "critic.path=./nope: "),
        mistake([*LEARNED, "reward.path=runs/ok/sft"], "reward.path: this is not a reward model", "llmscale reward"),
        # reward functions
        mistake([*FUNCTION, "reward.path=nope.py:f"], "reward.path: no such file: nope.py", "FILE.py:NAME"),
        mistake([*FUNCTION, "reward.path=rewards.py:nope"], "reward.path: rewards.py defines no 'nope'"),
        mistake([*FUNCTION, "reward.path=syntax.py:boom"], "reward.path: cannot run syntax.py", "SyntaxError"),
        mistake([*RLHF, "reward=safety", "reward.path=nope.txt"], "reward.path: cannot read nope.txt", "one word a line"),
        mistake([*RLHF, "reward=safety", "reward.path=a_file"], "reward.path: a_file holds no word"),
        mistake([*RLHF, "reward=regex", "reward.pattern=("], "reward.pattern: ", "no regular expression"),
        mistake([*RLHF, "reward=http", "reward.url=http://h", "reward.token_env=NO_SUCH"], "reward.token_env: ", "NO_SUCH"),
        mistake(
            [*RLHF, "reward=sum", "reward.parts.clean=safety", "reward.parts.clean.path=nope.txt"],
            "reward.parts.clean.path: cannot read nope.txt",
        ),
        mistake([*RLHF, "reward=answer", "reward.column=nope"], "reward.column: ", "'nope'", "answer"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_error_and_leaves_nothing(llmscale: Answer, ground: Path, argv: list[str], hints: tuple):
    run = ground / "runs" / "wrong"
    shutil.rmtree(run, ignore_errors=True)
    code, error = llmscale(*argv, "run.name=wrong")
    assert code == 2, error
    assert error.startswith(hints[0]), error
    assert all(hint in error for hint in hints), error
    assert looks_finished(run) == []


@pytest.mark.parametrize(
    ("function", "hints"),
    [
        ("boom", ["rewards.py:boom", "KeyError", "no such key"]),
        ("text", ["rewards.py:text", "ValueError", "very good"]),
        ("nan", ["draw 1, sample 0", "is nan"]),
    ],
)
def test_a_reward_that_is_none_stops_the_run(llmscale: Answer, ground: Path, function: str, hints: list[str]):
    run = ground / "runs" / f"reward-{function}"
    code, error = llmscale(*FUNCTION, f"reward.path=rewards.py:{function}", f"run.name={run.name}")
    assert code == 1
    assert all(hint in error for hint in hints), error
    assert looks_finished(run) == []
    assert not (run / "rlhf" / "samples.jsonl").read_text(), "nothing of the step counts"


@pytest.mark.parametrize("argv", [PRETRAIN, LEARNED], ids=["pretrain", "rlhf"])
def test_numbers_that_blow_up_stop_the_run_unsaved(llmscale: Answer, ground: Path, argv: list[str]):
    run = ground / "runs" / f"hot-{argv[0]}"
    code, error = llmscale(*argv, "optim.lr=1e9", "training.num_steps=20", f"run.name={run.name}")
    assert code == 1
    assert "nan" in error and "optim.lr" in error
    assert looks_finished(run) == []


# ---------------------------------------------------------------- run directories


@pytest.mark.parametrize("folder", ["a_file", "a_file/below", "/proc/nowhere"])
def test_a_run_directory_that_cannot_be_written(llmscale: Answer, folder: str):
    code, error = llmscale(*PRETRAIN, f"run.dir={folder}")
    assert code == 2
    assert error.startswith(f"{folder}/default/pretrain: ")


def test_a_run_of_another_config_is_refused_with_the_difference(llmscale: Answer, ground: Path):
    before = (ground / "runs/ok/pretrain/config.yaml").read_bytes()
    code, error = llmscale(*PRETRAIN, "run.name=ok", "optim.lr=0.5", "run.seed=1")
    assert code == 2
    assert error.startswith("runs/ok/pretrain: ")
    assert "optim.lr: 0.001 -> 0.5" in error and "run.seed: 0 -> 1" in error
    assert "run.name=" in error
    assert (ground / "runs/ok/pretrain/config.yaml").read_bytes() == before


def test_a_second_driver_on_a_run_is_refused(llmscale: Answer, ground: Path):
    run = open_run(ground / "runs/busy/pretrain", compose("pretrain", [*PRETRAIN[1:], "run.name=busy"]))
    try:
        code, error = llmscale(*PRETRAIN, "run.name=busy")
    finally:
        run.close()
    assert code == 2
    assert error.startswith("runs/busy/pretrain: another process (pid ")
    assert llmscale(*PRETRAIN, "run.name=busy")[0] == 0


# ---------------------------------------------------------------- using a model


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["generate", "model.path=./nope", "prompt=hi"], "model.path=./nope: "),
        (["chat", "model.path=no_model"], "model.path=no_model: "),
        (["generate", "model.path=runs/ok/sft", f"prompt={'x' * 100}"], "prompt: "),
        (["generate", "model.path=runs/ok/sft", "prompt=hi", "rollout.temperature=-1"], "rollout.temperature: "),
    ],
)
def test_generate_and_chat(llmscale: Answer, argv: list[str], hint: str):
    code, error = llmscale(*argv)
    assert code == 2
    assert error.startswith(hint)


# ---------------------------------------------------------------- clusters


def test_a_cluster_without_gpus_refuses_a_pool_that_wants_one(llmscale: Answer, ground: Path):
    run = ground / "runs" / "greedy"
    code, error = llmscale(*LEARNED, "cluster=ray", "cluster.rollout.num_gpus=1000", f"run.name={run.name}")
    assert code == 3
    assert error.startswith("cluster.rollout: ")
    assert "1000 GPU" in error
    assert looks_finished(run) == []
