"""RLHF as a run: what it logs, what it records, and what stops it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from tests.stages.runs import arguments, records, run, succeed

NAMES = [
    *("reward/mean", "reward/true", "kl/ref", "policy/entropy", "policy/clipfrac", "policy/approx_kl"),
    *("value/explained_var", "rollout/completion_len", "rollout/logprob_diff", "perf/tokens_per_s"),
    *("timing_s/generate", "timing_s/score", "timing_s/update", "timing_s/publish"),
]


def from_chain(chain: Path) -> list[str]:
    return [f"model.path={chain}/demo/sft", f"reward.path={chain}/demo/reward"]


@pytest.fixture(scope="module")
def finished(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a finished run."""
    tmp_path = tmp_path_factory.mktemp("rlhf")
    succeed(arguments("rlhf", tmp_path, *from_chain(chain)), tmp_path / "log")
    return tmp_path / "demo" / "rlhf"


def test_every_step_has_every_metric(finished: Path) -> None:
    first, *steps = records(finished / "metrics.jsonl")
    assert first["step"] == 0 and "eval/reward/true" in first
    assert [s["step"] for s in steps] == [1, 2, 3, 4, 5]
    for step in steps:
        assert all(math.isfinite(step[name]) for name in NAMES)
    assert "eval/reward/true" in steps[-1]


def test_the_first_step_is_on_policy(finished: Path) -> None:
    """Before the first update policy, reference and what sampled are one model."""
    step = records(finished / "metrics.jsonl")[1]
    assert step["rollout/logprob_diff"] < 1e-4
    assert abs(step["kl/ref"]) < 1e-4


def test_every_step_is_sampled_with_fresh_weights(finished: Path) -> None:
    """The version on the tokens is the number of updates published before."""
    for sample in records(finished / "samples.jsonl"):
        own = [v for v, m in zip(sample["weight_versions"], sample["loss_mask"], strict=True) if m]
        assert set(own) == {sample["step"] - 1}


def test_samples_are_complete_enough_to_train_from(finished: Path) -> None:
    samples = records(finished / "samples.jsonl")
    assert len({(s["draw_id"], s["sample_index"]) for s in samples}) == len(samples) == 5 * 16
    for sample in samples:
        length = len(sample["token_ids"])
        assert len(sample["loss_mask"]) == len(sample["rollout_logprobs"]) == len(sample["weight_versions"]) == length
        own = np.array(sample["loss_mask"], dtype=bool)
        assert own.any() and not own[0]
        assert (np.array(sample["rollout_logprobs"])[own] < 0).all()
        assert math.isfinite(sample["reward"]) and sample["true_reward"] in (0.0, 1.0)
        assert sample["prompt"].startswith("sort ")


def test_what_is_exported_loads_in_plain_transformers_and_generates_the_same(finished: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(finished / "hf")
    model = AutoModelForCausalLM.from_pretrained(finished / "hf")
    chat = [{"role": "user", "content": "sort jabba"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    argv = ["generate", f"model.path={finished}", "prompt=sort jabba", "rollout.max_new_tokens=8"]
    assert succeed(argv, tmp_path / "log") == tokenizer.decode(output, skip_special_tokens=True) + "\n"


def test_two_epochs_move_the_ratio_away_from_one(chain: Path, tmp_path: Path) -> None:
    overrides = ["algorithm.num_epochs=3", "training.num_steps=1", "optim.lr=0.01", "optim.warmup_steps=0"]
    succeed(arguments("rlhf", tmp_path, *from_chain(chain), *overrides), tmp_path / "log")
    step = records(tmp_path / "demo" / "rlhf" / "metrics.jsonl")[-1]
    assert step["policy/approx_kl"] > 1e-4 and step["policy/clipfrac"] > 0


@pytest.mark.parametrize("name", ["ppo", "grpo"])  # known before the update, and in it
def test_a_difference_between_rollout_and_trainer_stops_the_run(chain: Path, tmp_path: Path, name: str) -> None:
    overrides = ["rollout.max_logprob_diff=1e-12", f"algorithm={name}"]
    assert run(arguments("rlhf", tmp_path, *from_chain(chain), *overrides), tmp_path / "log") == 1
    printed = (tmp_path / "log").read_text()
    assert "rollout.max_logprob_diff: rollout and trainer log-probabilities differ by" in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "demo" / "rlhf" / "hf").exists()


def test_a_reward_that_is_not_a_number_stops_the_run_and_names_the_draw(chain: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def reward(prompt, completion, fields):\n    return float('nan')\n")
    overrides = ["reward=function", f"reward.path={tmp_path}/mine.py:reward", f"critic.path={chain}/demo/sft"]
    argv = [a for a in arguments("rlhf", tmp_path, f"model.path={chain}/demo/sft", *overrides) if "data.valid" not in a]
    assert run([*argv, "data.validation=null"], tmp_path / "log") == 1
    assert "draw 0, sample 0: the reward of" in (tmp_path / "log").read_text()


def test_a_function_of_the_users_own_is_a_reward(chain: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def brevity(prompt, completion, fields):\n    return -len(completion)\n")
    overrides = ["reward=function", f"reward.path={tmp_path}/mine.py:brevity", "training.num_steps=1"]
    succeed(arguments("rlhf", tmp_path, f"model.path={chain}/demo/sft", *overrides), tmp_path / "log")
    assert all(s["reward"] == -len(s["completion"]) for s in records(tmp_path / "demo" / "rlhf" / "samples.jsonl"))


def test_the_order_of_dispatch_does_not_change_what_is_sampled(chain: Path, finished: Path, tmp_path: Path) -> None:
    """Other units, another batch for each sample, the same tokens: the randomness is a counter."""
    overrides = ["rollout.unit_size=3", "training.num_steps=1"]
    succeed(arguments("rlhf", tmp_path, *from_chain(chain), *overrides), tmp_path / "log")
    own, other = (records(d / "samples.jsonl")[:16] for d in (tmp_path / "demo" / "rlhf", finished))
    assert [s["token_ids"] for s in own] == [s["token_ids"] for s in other]
