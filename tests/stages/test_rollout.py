"""Batch inference on the command line: what is written, and that an interruption changes nothing."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmscale.compose import compose
from llmscale.data.tasks import read_task
from llmscale.errors import ConfigError, RunError
from llmscale.models.loading import load_language_model, weights_digest
from llmscale.stages.pipeline import compose_stages
from llmscale.stages.rollout import run as run_in_process
from tests.stages.runs import kill_when, num_lines, records, start, succeed, without_times

PROMPTS, SAMPLES = 24, 3


def rollout(run_dir: Path, chain: Path, *overrides: str) -> list[str]:
    """The demo's, made small."""
    common = ["experiment=demo", "cluster=local", "tracking.wandb=disabled", f"run.dir={run_dir}"]
    size = [f"data.max_records={PROMPTS}", f"num_samples={SAMPLES}", "rollout.unit_size=7"]
    return ["rollout", *common, f"model.path={chain}/demo/sft", *size, *overrides]


def found(run_dir: Path) -> Path:
    return run_dir / "demo" / "rollout"


@pytest.fixture(scope="module")
def finished(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("rollout")
    printed = succeed(rollout(run_dir, chain, "record_logprobs=true"), run_dir / "log")
    assert "rollout: step 11/11" in printed and "72 completions" in printed
    return run_dir


# ---------------------------------------------------------------- what is written


def test_every_sample_of_every_prompt_stands_once_and_in_order(chain: Path, finished: Path) -> None:
    samples = records(found(finished) / "completions.jsonl")
    assert [(s["draw_id"], s["sample_index"]) for s in samples] == [
        (d, k) for d in range(PROMPTS) for k in range(SAMPLES)
    ]
    given = [r for r in read_task("task:sorting/prompts?seed=0") for _ in range(SAMPLES)]
    for sample, record in zip(samples, given, strict=False):
        assert (sample["prompt"], sample["fields"]) == (record["prompt"], {"answer": record["answer"]})
        assert sample["reward"] == float(sample["completion"].strip() == record["answer"])
        assert sample["model"] == weights_digest(f"{chain}/demo/sft")
    assert len({s["completion"] for s in samples}) > PROMPTS


def test_the_log_probabilities_are_those_of_the_model(chain: Path, finished: Path) -> None:
    model = load_language_model(f"{chain}/demo/sft")
    for sample in records(found(finished) / "completions.jsonl")[::9]:
        ids = torch.tensor([sample["token_ids"]])
        with torch.no_grad():
            logits = model(ids, torch.arange(ids.shape[1])[None])
        own = torch.log_softmax(logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0].numpy()
        mask = np.array(sample["loss_mask"][1:], dtype=bool)
        assert np.abs(own[mask] - np.array(sample["rollout_logprobs"][1:])[mask]).max() < 1e-4
        assert mask.sum() <= 10 and (sample["finished"] or mask.sum() == 10)


def test_the_summary_is_that_of_the_file(finished: Path) -> None:
    samples = records(found(finished) / "completions.jsonl")
    metrics = json.loads((found(finished) / "result.json").read_text())["metrics"]
    num_tokens = sum(sum(s["loss_mask"]) for s in samples)
    assert (metrics["rollout/samples"], metrics["rollout/tokens"]) == (len(samples), num_tokens)
    assert metrics["rollout/completion_len"] == pytest.approx(num_tokens / len(samples))
    assert metrics["rollout/cut_off"] == pytest.approx(np.mean([not s["finished"] for s in samples]))
    assert metrics["reward/mean"] == pytest.approx(np.mean([s["reward"] for s in samples]))


def test_a_table_of_prompts_in_several_turns(chain: Path, tmp_path: Path) -> None:
    """No reward, no log-probabilities, an environment, a file of another format."""
    (tmp_path / "prompts.csv").write_text("id,question\na7,calc 6 times 7\nb9,calc 2 times 3\n")
    game = ["environment=calculator", "environment.max_turns=2", "data.max_seq_len=128", "reward=null"]
    argv = rollout(tmp_path, chain, f"data.train={tmp_path}/prompts.csv", *game)
    run_in_process(compose("rollout", argv[1:]))
    samples = records(found(tmp_path) / "completions.jsonl")
    assert [s["fields"] for s in samples] == [{"id": "a7"}] * SAMPLES + [{"id": "b9"}] * SAMPLES
    for sample in samples:
        assert sample["messages"][0]["role"] == "assistant" and "turn_rewards" in sample
        assert not {"reward", "rollout_logprobs"} & sample.keys()


# ---------------------------------------------------------------- resuming

MANY = ["data.max_records=120", "rollout.unit_size=4", "reward=null"]  # ninety steps: time to be interrupted


@pytest.fixture(scope="module")
def whole(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole")
    run_in_process(compose("rollout", rollout(run_dir, chain, *MANY)[1:]))
    return run_dir


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_interrupted_and_resumed_equals_uninterrupted(chain: Path, whole: Path, tmp_path: Path, how: int) -> None:
    argv, metrics = rollout(tmp_path, chain, *MANY), found(tmp_path) / "metrics.jsonl"
    code = kill_when(lambda: num_lines(metrics) >= 10, argv, tmp_path / "log", how)
    assert code == {signal.SIGKILL: -9, signal.SIGTERM: 75}[how]
    assert not (found(tmp_path) / "result.json").exists()
    run_in_process(compose("rollout", argv[1:]))
    resumed = next(e for e in records(found(tmp_path) / "events.jsonl") if e["kind"] == "resumed")
    assert 10 <= resumed["step"] < 90
    same(tmp_path, whole)


def same(one: Path, other: Path) -> None:
    assert (found(one) / "completions.jsonl").read_bytes() == (found(other) / "completions.jsonl").read_bytes()
    assert without_times(records(found(one) / "metrics.jsonl")) == without_times(
        records(found(other) / "metrics.jsonl")
    )


@pytest.mark.parametrize(("share", "num_metrics"), [(0.0, 3), (0.3, 11), (0.5, 2), (0.99, 11), (1.0, 10), (1.0, 0)])
def test_what_any_crash_leaves_is_taken_up(chain: Path, finished: Path, tmp_path: Path, share: float, num_metrics: int):
    """A share of the bytes reached the disk, which may end in the middle of a character, and so many lines of metrics."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (found(tmp_path) / "result.json").unlink()
    for name, keep in (("completions.jsonl", share), ("metrics.jsonl", None)):
        data = (found(tmp_path) / name).read_bytes()
        lines = data.splitlines(keepends=True)
        (found(tmp_path) / name).write_bytes(
            b"".join(lines[:num_metrics]) if keep is None else data[: int(len(data) * keep)]
        )
    config = (found(tmp_path) / "config.yaml").read_text()
    (found(tmp_path) / "config.yaml").write_text(config.replace(str(finished), str(tmp_path)))
    run_in_process(compose("rollout", rollout(tmp_path, chain, "record_logprobs=true")[1:]))
    same(tmp_path, finished)


def test_a_finished_run_gives_its_result_again(chain: Path, finished: Path) -> None:
    before = (found(finished) / "events.jsonl").read_bytes()
    assert "72 completions" in succeed(rollout(finished, chain, "record_logprobs=true"), finished / "again.log")
    assert (found(finished) / "events.jsonl").read_bytes() == before


@pytest.mark.parametrize("what", ["data", "model"])
def test_what_has_changed_since_is_refused(chain: Path, finished: Path, tmp_path: Path, what: str) -> None:
    shutil.copytree(found(finished), found(tmp_path))
    (found(tmp_path) / "result.json").unlink()
    file = found(tmp_path) / "completions.jsonl"
    own = records(file)
    own[4] |= {"prompt": "sort zz"} if what == "data" else {"model": "0" * 32}
    file.write_text("".join(json.dumps(r) + "\n" for r in own))
    config = (found(tmp_path) / "config.yaml").read_text()
    (found(tmp_path) / "config.yaml").write_text(config.replace(str(finished), str(tmp_path)))
    with pytest.raises(RunError, match=r"prompt 1 was 'sort zz'|are not those that this run began with"):
        run_in_process(compose("rollout", rollout(tmp_path, chain, "record_logprobs=true")[1:]))


@pytest.mark.slow
def test_ray_workers_find_what_one_process_finds(chain: Path, finished: Path, tmp_path: Path) -> None:
    pools = [
        "cluster=ray",
        "cluster.rollout.num_workers=2",
        "cluster.rollout.num_cpus=0.5",
        "cluster.reward.num_cpus=0.5",
    ]
    child = start(rollout(tmp_path, chain, "record_logprobs=true", *pools), tmp_path / "log")
    child.join(400)
    assert child.exitcode == 0, (tmp_path / "log").read_text()
    same(tmp_path, finished)


# ---------------------------------------------------------------- bad configs


@pytest.mark.parametrize(
    ("overrides", "where", "hint"),
    [
        (["model.path=null"], "model.path", "rollout starts from a model"),
        (["num_samples=0"], "num_samples", "at least 1"),
        (["rollout.group_size=4"], "rollout.group_size", "Set num_samples"),
        (["rollout.max_new_tokens=48"], "rollout.max_new_tokens", "no room for a prompt"),
        (["rollout.temperature=0"], "rollout.temperature", "all the same"),
        (["data.validation=x.jsonl"], "data.validation", "data.train alone"),
        (["data.validation_fraction=0.1"], "data.validation_fraction", "every prompt"),
        (["model.adapter=lora"], "model.adapter", "trains nothing"),
        (["reward=environment"], "reward", "environment=calculator"),
        (["environment=calculator", "environment.max_turns=5"], "environment.max_turns", "leave no room"),
        (["prompts_per_step=4"], "prompts_per_step", "one of collect"),
    ],
)
def test_a_config_that_cannot_work_is_refused(overrides: list[str], where: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose("rollout", ["experiment=demo", "cluster=local", *overrides])
    assert caught.value.where == where and hint in str(caught.value)


def test_greedy_answers_are_allowed_where_one_is_asked_for() -> None:
    config: Any = compose("rollout", ["experiment=demo", "num_samples=1", "rollout.temperature=0", "rollout.top_p=0.9"])
    assert config.rollout.temperature == 0


def test_in_a_pipeline_without_it_its_name_is_the_group(chain: Path) -> None:
    (rlhf,) = compose_stages(["experiment=demo", "stages=[rlhf]", "rollout.max_new_tokens=5"], None).values()
    assert rlhf.rollout.max_new_tokens == 5  # type: ignore[attr-defined]
