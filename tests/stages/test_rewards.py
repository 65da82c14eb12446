"""Rewards in a run: parts of a sum, samples that cannot be scored, diversity."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.rewards.service import Service, answer
from tests.stages.runs import arguments, records, run, succeed

DIVERSITY = ["diversity/distinct_1", "diversity/distinct_2"]


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service()
    yield made
    made.close()


def rlhf(chain: Path, tmp_path: Path, *overrides: str) -> list[str]:
    """The demo's task, tiny, one step, with a reward of one's own choice."""
    task = ["data.train=task:sorting/prompts", "data.validation=task:sorting/test?size=16", "data.max_seq_len=48"]
    size = ["rollout.max_new_tokens=10", "rollout.unit_size=8", "training.prompts_per_step=16"]
    size += ["algorithm.global_batch_size=16", "training.num_steps=1"]
    run = [f"run.dir={tmp_path}", "run.name=demo", "tracking.wandb=disabled", f"model.path={chain}/demo/sft"]
    return ["rlhf", *run, *task, *size, *overrides]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in records(folder / "events.jsonl") if e["kind"] == kind]


def test_a_sum_of_a_learned_reward_and_rules(chain: Path, tmp_path: Path) -> None:
    argv = arguments(
        "rlhf", tmp_path, f"model.path={chain}/demo/sft", "experiment=blend", "run.name=demo", "training.num_steps=2"
    )
    argv += [
        f"reward.parts.helpful.path={chain}/demo/reward",
        "data.train=task:sorting/prompts",
        "data.validation_fraction=0",
    ]
    argv += ["reward.parts.right.match=exact", "data.max_seq_len=48", "rollout.max_new_tokens=10"]
    succeed(argv, tmp_path / "log")
    folder = tmp_path / "demo" / "rlhf"
    weights = {"helpful": 1.0, "right": 2.0, "brief": 0.5, "shape": 0.5}
    samples = records(folder / "samples.jsonl")
    for sample in samples:
        assert set(sample["reward_parts"]) == set(weights)
        assert sample["reward"] == pytest.approx(
            sum(w * sample["reward_parts"][n] for n, w in weights.items()), abs=1e-9
        )
    start, *steps = records(folder / "metrics.jsonl")
    assert len(steps) == 2
    for step in steps:
        own = [s for s in samples if s["step"] == step["step"]]
        for name in weights:
            mean = sum(s["reward_parts"][name] for s in own) / len(own)
            assert step[f"reward/{name}"] == pytest.approx(mean, abs=1e-9)
        assert step["reward/mean"] == pytest.approx(sum(w * step[f"reward/{n}"] for n, w in weights.items()), abs=1e-5)
        assert step["reward/excluded"] == 0
        assert all(0 < step[name] <= 1 for name in DIVERSITY)
    for evaluation in (start, steps[-1]):
        assert all(math.isfinite(evaluation[f"eval/reward/{name}"]) for name in weights)
        assert all(0 < evaluation[f"eval/{name}"] <= 1 for name in DIVERSITY)


def test_distinct_n_is_that_of_the_samples(chain: Path, tmp_path: Path) -> None:
    succeed(rlhf(chain, tmp_path, "reward=length", "reward.longest=4"), tmp_path / "log")
    folder = tmp_path / "demo" / "rlhf"
    grams: list[tuple[int, int]] = []
    for sample in records(folder / "samples.jsonl"):
        own = [t for t, m in zip(sample["token_ids"], sample["loss_mask"], strict=True) if m]
        grams += list(pairwise(own))
    step = records(folder / "metrics.jsonl")[-1]
    assert step["diversity/distinct_2"] == pytest.approx(len(set(grams)) / len(grams), abs=1e-9)


def test_what_a_service_cannot_score_is_left_out_with_its_draw(chain: Path, tmp_path: Path, service: Service) -> None:
    def some_fail(handler: Any, body: dict[str, Any]) -> None:
        failing = [s["id"].startswith(("2/", "5/1")) for s in body["samples"]]
        answer(handler, {"scores": [{"error": "the judge is ill"} if f else 1.5 for f in failing]})

    service.behaviour = some_fail
    overrides = [
        "reward=http",
        f"reward.url={service.url}",
        "algorithm=rloo",
        "rollout.group_size=2",
        "training.prompts_per_step=8",
    ]
    succeed(rlhf(chain, tmp_path, *overrides), tmp_path / "log")
    folder = tmp_path / "demo" / "rlhf"
    left_out = events(folder, "sample_excluded")
    assert sorted((e["draw_id"], e["sample_index"]) for e in left_out) == [(2, 0), (2, 1), (5, 1)]
    assert all(e["why"] == "the judge is ill" for e in left_out)
    ids = {(s["draw_id"], s["sample_index"]) for s in records(folder / "samples.jsonl")}
    assert ids == {(d, k) for d in range(8) for k in range(2) if d not in (2, 5)}
    step = records(folder / "metrics.jsonl")[-1]
    assert (step["reward/excluded"], step["reward/excluded_with_group"]) == (3, 1)
    assert step["reward/mean"] == 1.5, "nothing passed for a zero"


ODD = """
def mine(prompt, completion, fields):
    if not fields["answer"].startswith("a"):
        return 1.0
    {body}
"""


@pytest.mark.parametrize(
    ("body", "override", "why"),
    [
        ("return float('nan')", "on_nonfinite=drop", "its reward is nan"),
        ("raise RuntimeError('no idea')", "reward.on_error=exclude", "RuntimeError: no idea"),
    ],
)
def test_a_function_may_fail_for_some(chain: Path, tmp_path: Path, body: str, override: str, why: str) -> None:
    (tmp_path / "odd.py").write_text(ODD.format(body=body))
    overrides = ["reward=function", f"reward.path={tmp_path}/odd.py:mine", override]
    succeed(rlhf(chain, tmp_path, *overrides), tmp_path / "log")
    folder = tmp_path / "demo" / "rlhf"
    left_out = events(folder, "sample_excluded")
    step = records(folder / "metrics.jsonl")[-1]
    kept = records(folder / "samples.jsonl")
    of_the_step = [e for e in left_out if e["draw_id"] >= 0]
    assert 0 < len(of_the_step) < 16 and all(why in e["why"] for e in left_out)
    assert len(kept) == 16 - len(of_the_step) and step["reward/excluded"] == len(of_the_step)
    assert {s["draw_id"] for s in kept}.isdisjoint(e["draw_id"] for e in of_the_step)


def test_a_step_of_which_nothing_is_left_stops_the_run(chain: Path, tmp_path: Path, service: Service) -> None:
    service.behaviour = lambda handler, body: answer(handler, {}, 403)
    overrides = ["reward=http", f"reward.url={service.url}", "data.validation=null"]
    assert run(rlhf(chain, tmp_path, *overrides), tmp_path / "log") == 1
    printed = (tmp_path / "log").read_text()
    assert "16 of 16 samples could not be scored" in printed and "status 403" in printed
    assert "Traceback" not in printed
    folder = tmp_path / "demo" / "rlhf"
    assert len(events(folder, "sample_excluded")) == 16
    assert not (folder / "hf").exists() and not (folder / "samples.jsonl").read_text()


UNSURE = """
import zlib

def mine(prompt, completion, fields):
    if fields["answer"][0] in "{no_idea}":
        raise LookupError(f"nobody knows about {{prompt}}")
    return float(zlib.crc32(completion.encode()))  # as good as never the same for two
"""


def dynamic_sampling(chain: Path, tmp_path: Path, *, no_idea: str) -> list[str]:
    (tmp_path / "unsure.py").write_text(UNSURE.format(no_idea=no_idea))
    overrides = ["algorithm=dapo", "algorithm.max_draws=4", "rollout.group_size=4", "training.prompts_per_step=2"]
    overrides += ["algorithm.global_batch_size=8"]
    overrides += ["reward=function", f"reward.path={tmp_path}/unsure.py:mine", "reward.on_error=exclude"]
    return rlhf(chain, tmp_path, *overrides, "data.validation=null", "training.num_steps=8")


def test_dynamic_sampling_draws_again_for_prompts_that_nobody_can_score(chain: Path, tmp_path: Path) -> None:
    """Also where a whole draw is of such prompts: then the step learns from the next one that is not."""
    succeed(dynamic_sampling(chain, tmp_path, no_idea="ab"), tmp_path / "log")
    folder = tmp_path / "demo" / "rlhf"
    samples, left_out = records(folder / "samples.jsonl"), events(folder, "sample_excluded")
    lost = {e["draw_id"] for e in left_out}
    draws, empty = 0, 0
    for step in records(folder / "metrics.jsonl"):
        kept: list[int] = []
        first = draws
        for _ in range(4):
            drawn = range(draws, draws + 2 - len(kept))
            draws += len(drawn)
            scored = [i for i in drawn if i not in lost]
            empty += not scored
            kept += scored
            if len(kept) == 2:
                break
        own = [s for s in samples if s["step"] == step["step"]]
        assert [(s["draw_id"], s["sample_index"]) for s in own] == [(i, k) for i in kept for k in range(4)]
        named = [(e["draw_id"], e["sample_index"]) for e in left_out if e["step"] == step["step"]]
        assert named == [(i, k) for i in range(first, draws) if i not in kept for k in range(4)]
        assert (step["reward/excluded"], step["reward/excluded_with_group"]) == (len(named), 0)
        assert step["reward/mean"] == pytest.approx(sum(s["reward"] for s in own) / len(own), rel=1e-6)
        assert step["reward/equal_groups"] == 0 and step["policy/grad_norm"] > 0
    assert empty >= 1, "in every draw something could be scored"
    assert len(lost) * 4 == len(left_out) and all("LookupError: nobody knows about" in e["why"] for e in left_out)
    assert (folder / "hf").exists()


def test_dynamic_sampling_gives_up_when_no_draw_of_a_step_can_be_scored(chain: Path, tmp_path: Path) -> None:
    assert run(dynamic_sampling(chain, tmp_path, no_idea="abcdefghijklmnopqrstuvwxyz"), tmp_path / "log") == 1
    printed = (tmp_path / "log").read_text()
    assert "32 of 32 samples could not be scored" in printed and "Traceback" not in printed
    assert len(events(tmp_path / "demo" / "rlhf", "sample_excluded")) == 4 * 2 * 4  # draws, prompts, samples


def test_a_part_that_needs_a_column_is_refused_by_its_path(chain: Path, tmp_path: Path) -> None:
    overrides = ["reward=sum", "reward.parts.right=answer", "reward.parts.right.column=solution"]
    assert run(rlhf(chain, tmp_path, *overrides), tmp_path / "log") == 2
    assert (
        "reward.parts.right.column: reward.parts.right=answer needs the column 'solution'"
        in (tmp_path / "log").read_text()
    )


def test_the_experiment_of_rules_alone(chain: Path, tmp_path: Path) -> None:
    argv = arguments(
        "rlhf", tmp_path, "experiment=rules", "run.name=demo", f"model.path={chain}/demo/sft", "training.num_steps=2"
    )
    succeed(argv, tmp_path / "log")
    for sample in records(tmp_path / "demo" / "rlhf" / "samples.jsonl"):
        text, parts = sample["completion"], sample["reward_parts"]
        assert parts["right"] == sample["true_reward"] == float("".join(sorted(sample["prompt"].split()[1])) == text)
        assert parts["letters"] == float(text.strip() != "" and set(text.strip()) <= set("abcdefghijkl"))
        assert parts["brief"] == pytest.approx(max(0.0, 1 - max(4 - len(text), len(text) - 5, 0) / 3), abs=1e-9)


@pytest.mark.realdata
def test_the_blend_on_real_problems(chain: Path, shared_data: Path, tmp_path: Path) -> None:
    """Grade-school mathematics whose reference answers are read out of whole solutions."""
    argv = [
        "rlhf",
        "experiment=blend",
        f"run.dir={tmp_path}",
        "tracking.wandb=disabled",
        f"model.path={chain}/demo/sft",
    ]
    argv += [f"reward.parts.helpful.path={chain}/demo/reward", f"data.train={shared_data}/math/gsm8k_train.jsonl"]
    argv += ["data.max_seq_len=128", "rollout.max_new_tokens=16", "training.num_steps=2"]
    succeed(argv, tmp_path / "log")
    samples = records(tmp_path / "blend" / "rlhf" / "samples.jsonl")
    assert len(samples) == 2 * 8
    assert all(s["reward_why"].startswith("right: ") and "right is " in s["reward_why"] for s in samples)
