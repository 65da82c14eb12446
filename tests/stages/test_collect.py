"""Collecting data from a policy on the command line: what is written, that it is read back, and that an interruption changes
nothing.
"""

from __future__ import annotations

import json
import signal
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmscale.compose import choices, compose
from llmscale.data.splits import load_conversations, load_prompts, load_rankings
from llmscale.data.tokenizer import SPECIAL_TOKENS
from llmscale.errors import ConfigError
from llmscale.models.loading import load_tokenizer
from llmscale.stages.collect import steps_on_disk
from tests.stages.runs import arguments, kill_when, num_lines, records, run, start, succeed, without_times

MATCHES = """
def matches(prompt, completion, fields):
    return sum(a == b for a, b in zip(completion, fields["answer"])) / len(fields["answer"])

def never(prompt, completion, fields):
    return float("nan")
"""
FILES = ("rankings.jsonl", "sft.jsonl")


@pytest.fixture(scope="module")
def policy(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SFT run that writes letters, ends its turns, and answers one prompt with the same text now and then."""
    tmp_path = tmp_path_factory.mktemp("policy")
    longer = ["training.num_steps=150", "training.save_every_steps=1000", "training.eval_every_steps=1000"]
    succeed(arguments("sft", tmp_path, f"model.path={chain}/demo/pretrain", *longer), tmp_path / "log")
    (tmp_path / "rewards.py").write_text(MATCHES)
    return tmp_path


def collect(run_dir: Path, policy: Path, *overrides: str) -> list[str]:
    """The demo's collection, made small, with a rule for its reward."""
    common = ["experiment=demo", "cluster=local", "tracking.wandb=disabled", f"run.dir={run_dir}"]
    paths = [f"model.path={policy}/demo/sft", "reward=function", f"reward.path={policy}/rewards.py:matches"]
    return ["collect", *common, *paths, "data.max_records=40", "prompts_per_step=8", *overrides]


def collected(run_dir: Path) -> Path:
    return run_dir / "demo" / "collect"


def by_prompt(run_dir: Path) -> list[list[dict[str, Any]]]:
    samples = records(collected(run_dir) / "samples.jsonl")
    return [list(group) for _, group in groupby(samples, key=lambda s: s["draw_id"])]


def result(run_dir: Path) -> dict[str, Any]:
    return json.loads((collected(run_dir) / "result.json").read_text())


@pytest.fixture(scope="module")
def finished(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Best of eight."""
    run_dir = tmp_path_factory.mktemp("finished")
    printed = succeed(collect(run_dir, policy), run_dir / "log")
    assert "collect: step 5/5" in printed and "of the best" in printed
    return run_dir


# ---------------------------------------------------------------- what is written


def test_every_prompt_is_sampled_scored_and_recorded_once(finished: Path) -> None:
    groups = by_prompt(finished)
    assert [group[0]["draw_id"] for group in groups] == list(range(40))
    for group in groups:
        assert [s["sample_index"] for s in group] == list(range(8))
        assert len({s["prompt"] for s in group}) == 1
        assert all(0 <= s["reward"] <= 1 and s["true_reward"] in (0.0, 1.0) for s in group)
        assert len({tuple(s["token_ids"]) for s in group}) > 1


def test_rankings_hold_the_distinct_completions_by_reward(finished: Path) -> None:
    rankings = records(collected(finished) / "rankings.jsonl")
    assert len(rankings) == 40
    tied = duplicates = 0
    for ranking, group in zip(rankings, by_prompt(finished), strict=True):
        assert ranking["messages"] == [{"role": "user", "content": group[0]["prompt"]}]
        first = {s["completion"].strip(): s for s in reversed(group)}
        assert {c.strip() for c in ranking["completions"]} == set(first)
        duplicates += len(group) - len(first)
        assert ranking["ratings"] == [first[c.strip()]["reward"] for c in ranking["completions"]]
        for score, rank in zip(ranking["ratings"], ranking["ranks"], strict=True):
            assert rank == 1 + len({other for other in ranking["ratings"] if other > score})
        tied += len(set(ranking["ranks"])) < len(ranking["ranks"])
        for completion, logprob in zip(ranking["completions"], ranking["logprobs"], strict=True):
            assert logprob == pytest.approx(sum(first[completion.strip()]["rollout_logprobs"]), abs=1e-5)
    assert tied and duplicates, "else this shows nothing of them"


def learnable(group: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [s for s in group if s["finished"] and s["completion"].strip() and "\ufffd" not in s["completion"]]


def test_best_of_n_teaches_the_best_whole_answer_of_each_prompt(finished: Path) -> None:
    expected = []
    for group in by_prompt(finished):
        if whole := learnable(group):
            best = max(whole, key=lambda s: s["reward"])  # the first of several
            turns = [("user", best["prompt"]), ("assistant", best["completion"])]
            expected.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    unique = list({json.dumps(record): record for record in expected}.values())
    assert records(collected(finished) / "sft.jsonl") == unique
    assert len(unique) > 20


def test_the_result_says_what_choosing_is_worth(finished: Path) -> None:
    found, groups = result(finished), by_prompt(finished)
    rewards = np.array([[s["reward"] for s in group] for group in groups])
    true = np.array([[s["true_reward"] for s in group] for group in groups])
    metrics = found["metrics"]
    assert metrics["reward/mean"] == pytest.approx(rewards.mean(), abs=1e-9)
    assert metrics["reward/best"] == pytest.approx(rewards.max(1).mean(), abs=1e-9)
    assert metrics["reward/true"] == pytest.approx(true.mean(), abs=1e-9)
    kept = [max(learnable(group), key=lambda s: s["reward"]) for group in groups if learnable(group)]
    kept = list({(s["prompt"], s["completion"]): s for s in kept}.values())
    assert metrics["sft/reward"] == pytest.approx(np.mean([s["reward"] for s in kept]), abs=1e-9)
    assert metrics["sft/true_reward"] == pytest.approx(np.mean([s["true_reward"] for s in kept]), abs=1e-9)
    assert metrics["sft/kept_fraction"] == num_lines(collected(finished) / "sft.jsonl") / 320
    assert metrics["rankings/records"] == 40 and metrics["collect/samples"] == 320
    curve = found["best_of_k"]
    assert [point["k"] for point in curve] == list(range(1, 9))
    pairs = [np.maximum(rewards[:, i], rewards[:, j]).mean() for i in range(8) for j in range(i)]
    assert curve[1]["reward"] == pytest.approx(np.mean(pairs), abs=1e-9)
    assert curve[7]["kl_bound"] == pytest.approx(np.log(8) - 7 / 8, abs=1e-9)


def test_rejection_keeps_all_that_are_good_enough(policy: Path, finished: Path, tmp_path: Path) -> None:
    """By score, and by fraction with the ties of the last. What is sampled is the same."""
    whole = [s for group in by_prompt(finished) for s in learnable(group)]
    distinct = list({(s["draw_id"], s["completion"].strip()): s for s in reversed(whole)}.values())
    in_order = sorted((s["reward"] for s in distinct), reverse=True)
    for setting, least in (("min_score=0.5", 0.5), ("keep_fraction=0.1", in_order[-(-len(in_order) // 10) - 1])):
        run_dir = tmp_path / setting
        succeed(collect(run_dir, policy, "method=rejection", f"method.{setting}"), tmp_path / "log")
        expected = {(s["prompt"], s["completion"]) for s in distinct if s["reward"] >= least}
        kept = [[turn["content"] for turn in r["messages"]] for r in records(collected(run_dir) / "sft.jsonl")]
        assert {tuple(pair) for pair in kept} == expected and len(kept) == len(expected) > 0
        assert (collected(run_dir) / FILES[0]).read_bytes() == (collected(finished) / FILES[0]).read_bytes()


def test_a_threshold_that_nothing_reaches_leaves_an_empty_file(policy: Path, tmp_path: Path) -> None:
    argv = collect(tmp_path, policy, "method=rejection", "method.min_score=2", "data.max_records=4")
    assert "sft/records=0" in succeed(argv, tmp_path / "log")
    assert (collected(tmp_path) / "sft.jsonl").read_bytes() == b""
    assert result(tmp_path)["metrics"]["sft/kept_fraction"] == 0


def test_a_prompt_that_stands_in_the_data_twice_teaches_no_answer_twice(policy: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"sort {word}", "answer": "abcd"}) for word in ("dbca", "cabd", "dbca", "dbca")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    settings = [f"data.train={tmp_path}/prompts.jsonl", "method=rejection", "method.keep_fraction=1"]
    settings += ["num_samples=40", "rollout.temperature=0.3"]
    succeed(collect(tmp_path, policy, *settings), tmp_path / "log")
    groups = by_prompt(tmp_path)
    answers = [{s["completion"].strip() for s in learnable(group)} for group in groups]
    assert answers[0] & answers[2], "else this shows nothing"
    written = [
        (r["messages"][0]["content"], r["messages"][1]["content"].strip())
        for r in records(collected(tmp_path) / FILES[1])
    ]
    assert len(written) == len(set(written)) == len(answers[1]) + len(answers[0] | answers[2] | answers[3])
    rankings = records(collected(tmp_path) / FILES[0])
    assert all(len(r["completions"]) == 9 for r in rankings), "a reward model takes no more"
    for ranking, group in zip(rankings, groups, strict=True):
        rewards = [s["reward"] for s in group]
        assert max(ranking["ratings"]) == max(rewards) and min(ranking["ratings"]) == min(rewards)


def test_beam_search_gives_the_likeliest_in_order(policy: Path, tmp_path: Path) -> None:
    settings = ["method=beam", "num_samples=4", "method.num_beams=6", "method.length_penalty=1", "rollout.unit_size=24"]
    succeed(collect(tmp_path, policy, *settings), tmp_path / "log")
    for group in by_prompt(tmp_path):
        scores = [sum(s["rollout_logprobs"]) / sum(s["loss_mask"]) for s in group]
        assert len(group) == 4 and scores == sorted(scores, reverse=True)
        assert len({tuple(s["token_ids"]) for s in group}) == 4
    assert "best_of_k" not in result(tmp_path), "they are no independent samples"
    assert num_lines(collected(tmp_path) / FILES[0]) == 40 and num_lines(collected(tmp_path) / FILES[1]) > 0


# ---------------------------------------------------------------- what is written is read


def test_a_reward_model_and_sft_train_on_what_was_collected(policy: Path, finished: Path, tmp_path: Path) -> None:
    data = [f"model.path={policy}/demo/sft", "data.validation=null", "training.num_steps=2", "data.max_records=null"]
    for stage, file in zip(("reward", "sft"), FILES, strict=True):
        source = collected(finished) / file
        succeed(arguments(stage, tmp_path, *data, f"data.train={source}"), tmp_path / "log")
        assert records(tmp_path / "demo" / stage / "metrics.jsonl")[-1]["step"] == 2
        tokenizer = load_tokenizer(f"{policy}/demo/sft")
        config = compose(stage, [f"data.train={source}", "model.path=m"]).data
        load = load_rankings if stage == "reward" else load_conversations
        split: Any = load(config, tokenizer, tmp_path / "cache")
        assert split.report["records"] == len(split.train) == num_lines(source)
        if stage == "reward":
            assert [list(e.ratings) for e in split.train] == [r["ratings"] for r in records(source)]


def test_what_is_read_back_is_what_was_sampled(policy: Path, finished: Path, tmp_path: Path) -> None:
    """Token for token, where the policy ended its turn and wrote text, without special tokens in the midst of it."""
    tokenizer = load_tokenizer(f"{policy}/demo/sft")
    config = compose("reward", [f"data.train={collected(finished)}/rankings.jsonl", "model.path=m"]).data
    checked = 0
    for example, group in zip(load_rankings(config, tokenizer, tmp_path).train, by_prompt(finished), strict=True):
        whole = [
            s for s in learnable(group) if min(s["token_ids"][s["loss_mask"].index(1) : -1]) >= len(SPECIAL_TOKENS)
        ]
        sampled = {tuple(s["token_ids"]) for s in whole}
        read = {tuple(sequence.tolist()) for sequence in example.sequences}
        assert sampled <= read
        checked += len(sampled)
    assert checked > 100


def test_system_messages_and_earlier_turns_are_kept(policy: Path, tmp_path: Path) -> None:
    turns = [("user", "hi"), ("assistant", "a"), ("user", "sort ba")]
    record = {"messages": [{"role": role, "content": text} for role, text in turns], "answer": "ab"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(record))
    settings = [f"data.train={tmp_path}/prompts.jsonl", "data.system_prompt=be brief", "data.max_seq_len=64"]
    succeed(collect(tmp_path, policy, *settings, "method=rejection", "method.keep_fraction=1"), tmp_path / "log")
    expected = [{"role": "system", "content": "be brief"}, *record["messages"]]
    assert records(collected(tmp_path) / FILES[0])[0]["messages"] == expected
    # Read with the same setting, the system message is not put there twice.
    source = f"data.train={collected(tmp_path)}/rankings.jsonl"
    config = compose("reward", [source, "data.system_prompt=be brief", "model.path=m"]).data
    (example,) = load_rankings(config, load_tokenizer(f"{policy}/demo/sft"), tmp_path / "cache").train
    prompt = by_prompt(tmp_path)[0][0]
    own = prompt["loss_mask"].index(1)
    assert all(s[:own].tolist() == prompt["token_ids"][:own] for s in example.sequences)


# ---------------------------------------------------------------- interruption


MANY = ["data.max_records=200", "prompts_per_step=2", "method=rejection", "method.keep_fraction=0.2"]


@pytest.fixture(scope="module")
def whole(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long enough to be interrupted, and was not."""
    run_dir = tmp_path_factory.mktemp("whole")
    succeed(collect(run_dir, policy, *MANY), run_dir / "log")
    return run_dir


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_interrupted_and_resumed_equals_uninterrupted(policy: Path, whole: Path, tmp_path: Path, how: int) -> None:
    stopped = tmp_path / "stopped"
    argv, log = collect(stopped, policy, *MANY), tmp_path / "log"
    metrics = collected(stopped) / "metrics.jsonl"
    code = kill_when(lambda: num_lines(metrics) >= 10, argv, log, how)
    assert code == {signal.SIGKILL: -9, signal.SIGTERM: 75, signal.SIGINT: 130}[how]
    assert not any((collected(stopped) / name).exists() for name in (*FILES, "result.json"))
    if how == signal.SIGTERM:
        assert f"stopped and saved at step {num_lines(metrics)}" in log.read_text()

    succeed(argv, tmp_path / "resumed.log")
    resumed = next(e for e in records(collected(stopped) / "events.jsonl") if e["kind"] == "resumed")
    assert 10 <= resumed["step"] < 100
    for name in FILES:
        assert (collected(stopped) / name).read_bytes() == (collected(whole) / name).read_bytes()
    for name in ("samples.jsonl", "metrics.jsonl"):
        own, other = (without_times(records(collected(d) / name)) for d in (stopped, whole))
        assert own == other
    own, other = (result(d) for d in (stopped, whole))
    assert (own["metrics"], own["best_of_k"]) == (other["metrics"], other["best_of_k"])


def test_a_step_whose_samples_were_lost_is_sampled_again(policy: Path, finished: Path, tmp_path: Path) -> None:
    """As after a power failure: metrics reached the disk, some samples did not."""
    config = compose("collect", collect(tmp_path, policy)[1:])
    prompts = load_prompts(config.data, load_tokenizer(f"{policy}/demo/sft"), config.rollout.max_new_tokens).train
    samples = (collected(finished) / "samples.jsonl").read_text().splitlines(keepends=True)
    metrics = (collected(finished) / "metrics.jsonl").read_text().splitlines(keepends=True)
    for num_samples, num_metrics, steps in ((320, 5, 5), (319, 5, 4), (128, 5, 2), (192, 2, 2), (63, 1, 0), (0, 0, 0)):
        (tmp_path / "samples.jsonl").write_text("".join(samples[:num_samples]))
        (tmp_path / "metrics.jsonl").write_text("".join(metrics[:num_metrics]))
        assert steps_on_disk(tmp_path, prompts) == steps


def test_a_finished_run_gives_its_result_again(policy: Path, finished: Path) -> None:
    before = (collected(finished) / "events.jsonl").read_bytes()
    assert "of the best" in succeed(collect(finished, policy), finished / "again.log")
    assert (collected(finished) / "events.jsonl").read_bytes() == before


def test_data_that_changed_are_refused(policy: Path, tmp_path: Path) -> None:
    def write(word: str) -> None:
        lines = [json.dumps({"prompt": f"sort {word}", "answer": "ab"}) for _ in range(400)]
        (tmp_path / "prompts.jsonl").write_text("\n".join(lines))

    write("ba")
    settings = [f"data.train={tmp_path}/prompts.jsonl", "data.max_records=null", "prompts_per_step=1"]
    argv, log = collect(tmp_path, policy, *settings), tmp_path / "log"
    assert kill_when(lambda: num_lines(collected(tmp_path) / "metrics.jsonl") >= 3, argv, log) == -signal.SIGKILL
    write("cb")
    assert run(argv, tmp_path / "again.log") == 2
    assert "prompt 0 was 'sort ba' when this run began; the data have changed" in (tmp_path / "again.log").read_text()


def test_a_reward_that_is_not_a_number_stops_the_run(policy: Path, tmp_path: Path) -> None:
    argv = collect(tmp_path, policy, f"reward.path={policy}/rewards.py:never")
    assert run(argv, tmp_path / "log") == 1
    assert "draw 0, sample 0: the reward of" in (tmp_path / "log").read_text()
    assert not (collected(tmp_path) / "sft.jsonl").exists()


def test_ray_workers_collect_what_one_process_collects(policy: Path, finished: Path, tmp_path: Path) -> None:
    pools = [
        "cluster=ray",
        "cluster.rollout.num_workers=2",
        "cluster.rollout.num_cpus=0.5",
        "cluster.reward.num_cpus=0.5",
    ]
    child = start(collect(tmp_path, policy, *pools), tmp_path / "log")
    child.join(400)
    assert child.exitcode == 0, (tmp_path / "log").read_text()
    for name in FILES:
        assert (collected(tmp_path) / name).read_bytes() == (collected(finished) / name).read_bytes()


# ---------------------------------------------------------------- bad configs


@pytest.mark.parametrize("override", [f"{group}={n}" for group in ("cluster", "engine") for n in choices(group)])
def test_every_cluster_and_engine_composes(override: str) -> None:
    assert compose("collect", ["experiment=demo", override]).stage == "collect"


@pytest.mark.parametrize(
    ("overrides", "where", "hint"),
    [
        (["model.path=null"], "model.path", "collect starts from a model"),
        (["num_samples=0"], "num_samples", "at least 1"),
        (["prompts_per_step=0"], "prompts_per_step", "at least 1"),
        (["rollout.group_size=4"], "rollout.group_size", "Set num_samples"),
        (["rollout.max_new_tokens=48"], "rollout.max_new_tokens", "no room for a prompt"),
        (["rollout.temperature=0"], "rollout.temperature", "all the same"),
        (["data.validation=x.jsonl"], "data.validation", "data.train alone"),
        (
            ["data.train=null", "data.mixture={a: x, b: y}", "data.mixture_cap=5"],
            "data.mixture_weights",
            "every prompt",
        ),
        (["method=beam", "method.num_beams=4"], "method.num_beams", "num_samples=8"),
        (["method=beam", "method.length_penalty=-1"], "method.length_penalty", "at least 0"),
        (["method=beam", "rollout.temperature=0.7"], "rollout", "samples nothing"),
        (["method=rejection"], "method.min_score", "neither"),
        (["method=rejection", "method.min_score=1", "method.keep_fraction=0.5"], "method.min_score", "both"),
        (["method=rejection", "method.keep_fraction=0"], "method.keep_fraction", "above 0"),
        (["method=best_of_m"], "method", "Did you mean best_of_n?"),
        (["method.min_score=1"], "method.min_score", "method=rejection"),
    ],
)
def test_a_config_that_cannot_work_is_refused(overrides: list[str], where: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose("collect", ["experiment=demo", "cluster=local", *overrides])
    assert caught.value.where == where and hint in str(caught.value)
