"""RLHF over several turns, as a run: what it records, how failures are counted, and its exact resume."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

import llmscale.stages  # noqa: F401  registers every option
from llmscale.compose import compose
from llmscale.errors import ConfigError
from tests.stages.runs import arguments, kill_when, records, run, succeed, weights, without_times

GAME = """
class Game:
    def reset(self, prompt, fields):
        self.turns = 0
        if len(prompt) % 2 and FAILS:
            raise ValueError("I do not like odd words")

    def step(self, said):
        self.turns += 1
        return f"{len(said)} letters", self.turns == 3, len(said) / 10
"""
RULE = ["algorithm=grpo", "reward=answer", "true_reward=null", "rollout.group_size=4", "training.prompts_per_step=8"]
RULE += ["training.num_steps=3"]
LIMITS = ["environment.max_turns=4", "environment.max_observation_tokens=12", "data.max_seq_len=128"]


def playing(run_dir: Path, talker: Path, *overrides: str, fails: bool = False) -> list[str]:
    file = run_dir.parent / f"{'bad_' if fails else ''}games.py"
    file.write_text(f"FAILS = {fails}\n{GAME}")
    game = ["environment=class", f"environment.path={file}:Game", *LIMITS]
    return arguments("rlhf", run_dir, f"model.path={talker}", *RULE, *game, *overrides)


@pytest.fixture(scope="module")
def talker(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that has learned to end its turns, and little more."""
    tmp_path = tmp_path_factory.mktemp("talker")
    own = ["training.num_steps=25", "training.global_batch_size=16", "optim.lr=1e-2", "training.save_every_steps=25"]
    argv = arguments("sft", tmp_path, f"model.path={chain}/demo/pretrain", *own, "training.eval_every_steps=25")
    succeed(argv, tmp_path / "log")
    return tmp_path / "demo" / "sft"


@pytest.fixture(scope="module")
def played(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("environments")
    succeed(playing(tmp_path / "runs", talker), tmp_path / "log")
    return tmp_path / "runs" / "demo" / "rlhf"


def test_the_trainer_sees_the_tokens_that_were_sampled(played: Path) -> None:
    first, *steps = records(played / "metrics.jsonl")
    assert first["eval/rollout/turns"] >= 1
    for step in steps:
        assert step["rollout/logprob_diff"] < 1e-4 and 1 < step["rollout/turns"] <= 3
    (plan,) = (e for e in records(played / "events.jsonl") if e["kind"] == "plan")
    assert plan["max_turns"] == 4


def test_samples_show_their_turns(played: Path) -> None:
    samples = records(played / "samples.jsonl")
    assert any(len(s["messages"]) == 5 for s in samples)
    for s in samples:
        own = [m["content"] for m in s["messages"] if m["role"] == "assistant"]
        told = [m["content"] for m in s["messages"] if m["role"] == "user"]
        assert told == [f"{len(text)} letters" for text in own[: len(told)]]
        assert not s["finished"] or len(own) == 3
        for mask, logprob, version in zip(s["loss_mask"], s["rollout_logprobs"], s["weight_versions"], strict=True):
            assert (logprob <= 0 and version == s["step"] - 1) if mask else (logprob == 0 and version == -1)


def test_a_killed_run_continues_as_if_nothing_had_happened(played: Path, talker: Path, tmp_path: Path) -> None:
    argv = playing(tmp_path / "runs", talker, "training.save_every_steps=1")
    run_dir = tmp_path / "runs" / "demo" / "rlhf"
    assert kill_when((run_dir / "checkpoints" / "step-000001").exists, argv, tmp_path / "log") == -signal.SIGKILL
    succeed(argv, tmp_path / "log")
    assert any(e["kind"] == "resumed" for e in records(run_dir / "events.jsonl"))
    assert without_times(records(run_dir / "metrics.jsonl")) == without_times(records(played / "metrics.jsonl"))
    same = ("draw_id", "sample_index", "token_ids", "loss_mask", "rollout_logprobs", "reward", "messages", "finished")
    one, other = ([{k: r[k] for k in same} for r in records(d / "samples.jsonl")] for d in (run_dir, played))
    assert one == other
    assert weights(run_dir) == weights(played)


def test_an_environment_that_fails_is_counted_and_named(talker: Path, tmp_path: Path) -> None:
    """Before it has said anything, so that the policy says nothing either. With PPO, and what the environment gives."""
    own = [
        "algorithm=ppo",
        "reward=environment",
        f"critic.path={talker}",
        "rollout.group_size=2",
        "training.num_steps=1",
    ]
    argv = playing(tmp_path / "runs", talker, *own, fails=True)
    succeed(argv, tmp_path / "log")
    run_dir = tmp_path / "runs" / "demo" / "rlhf"
    steps = records(run_dir / "metrics.jsonl")[1:]
    excluded = [e for e in records(run_dir / "events.jsonl") if e["kind"] == "sample_excluded"]
    assert {e["why"] for e in excluded} == {"environment class: ValueError: I do not like odd words"}
    assert all(0 < step["reward/excluded"] < 16 for step in steps)
    for s in records(run_dir / "samples.jsonl"):
        assert len(s["prompt"]) % 2 == 0
        own = [len(m["content"]) / 10 for m in s["messages"] if m["role"] == "assistant"]
        whole = own if s["finished"] else own[:-1]  # nobody answers a turn that was cut off
        assert s["reward"] == pytest.approx(sum(whole))


NEEDED = ["data.train=x", "model.path=m", "reward=answer"]


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["environment=calculator", "environment.max_turns=0"], "environment.max_turns"),
        (["environment=calculator", "data.max_seq_len=256"], "environment.max_turns"),  # four turns of 64
        (["environment=calculater"], "environment"),
        (["true_reward=environment"], "true_reward"),
        (["reward=sum", "reward.parts.game=environment"], "reward.parts.game"),
        (["environment=class"], "environment.path"),
        (["environment.max_turns=3"], "environment.max_turns"),
        (["environment=calculator", "environment.role=system"], "environment.role"),
    ],
)
def test_what_cannot_work_is_said_before_it_starts(overrides: list[str], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose("rlhf", [*NEEDED, *overrides])
    assert caught.value.where == where and caught.value.fix


def test_without_an_environment_there_is_one_turn() -> None:
    assert compose("rlhf", NEEDED) == compose("rlhf", [*NEEDED, "environment=null"])
    calculator = compose("rlhf", ["experiment=calculator"])
    assert calculator.environment.name == "calculator" and calculator.max_completion_tokens == 3 * 14


def test_collect_has_one_turn() -> None:
    with pytest.raises(ConfigError, match="collect has no such key; it is one of rlhf"):
        compose("collect", [*NEEDED, "environment=calculator"])


def test_prompts_that_leave_no_room_for_every_turn_are_refused(talker: Path, tmp_path: Path) -> None:
    argv = playing(tmp_path / "runs", talker, "data.max_seq_len=100")  # 40 of the policy's, 63 between its turns
    assert run(argv, tmp_path / "log") == 2
    assert "data.max_seq_len: 100 tokens leave no room for a prompt beside 103" in (tmp_path / "log").read_text()
