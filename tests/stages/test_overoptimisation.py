"""A reward model whose raters liked too much of a good thing makes the true score fall while the learned one rises, and the run
says so; one whose raters knew better does not. Real runs: SFT, reward model and PPO on words of four letters.

What counts is a's: the true score is best at three of them. Biased raters prefer the word with more a's, whatever their number,
so that both rise at first.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.stages.runs import arguments, records, succeed

TRUE = "def score(prompt, completion, fields):\n    return 1 - abs(completion.count('a') - 3) / 3\n"
BEST = 3


def word(rng: random.Random, share: float) -> str:
    return "".join("a" if rng.random() < share else rng.choice("bcd") for _ in range(rng.randint(5, 8)))


def true_rating(text: str) -> int:
    return -abs(text.count("a") - BEST)


def biased_rating(text: str) -> int:
    return text.count("a")


def ranking(rng: random.Random, rating) -> dict:
    completions = [word(rng, rng.random()) for _ in range(4)]
    return {"prompt": "write", "completions": completions, "ratings": [rating(c) for c in completions]}


@pytest.fixture(scope="module")
def written(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes words with few a's, and what the runs read."""
    folder, rng = tmp_path_factory.mktemp("words"), random.Random(0)
    files = {
        "words": [{"prompt": "write", "completion": word(rng, 0.1)} for _ in range(1000)],
        "biased": [ranking(rng, biased_rating) for _ in range(1000)],
        "unbiased": [ranking(rng, true_rating) for _ in range(1000)],
        "prompts": [{"prompt": "write"} for _ in range(64)],
    }
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "true.py").write_text(TRUE)
    own = ["training.num_steps=60", "training.global_batch_size=32", "data.max_records=null", "data.validation=null"]
    argv = [*arguments("sft", folder), f"model.path={chain}/demo/pretrain", f"data.train={folder}/words.jsonl", *own]
    succeed([*argv, "optim.lr=5e-3", "training.save_every_steps=60"], folder / "sft.log")
    return folder


def trained(folder: Path, raters: str) -> tuple[str, dict, Path]:
    """A reward model from these raters, and PPO with it: what it printed, the event, the run directory."""
    common = [f"run.name={raters}", f"model.path={folder}/demo/sft", "data.validation=null"]
    own = ["data.max_records=null", "training.num_steps=150", "training.global_batch_size=16", "optim.lr=5e-3"]
    rankings = [f"data.train={folder}/{raters}.jsonl", "training.save_every_steps=150"]
    succeed([*arguments("reward", folder), *common, *own, *rankings], folder / f"{raters}-reward.log")
    own = [
        "training.num_steps=40",
        "training.prompts_per_step=32",
        "algorithm.global_batch_size=32",
        "rollout.unit_size=32",
    ]
    own += ["optim.lr=2e-3", "critic.optim.lr=5e-3", "algorithm.kl_coef=0.01", "training.save_every_steps=40"]
    rewards = [
        f"reward.path={folder}/{raters}/reward",
        "true_reward=function",
        f"true_reward.path={folder}/true.py:score",
    ]
    argv = [*arguments("rlhf", folder), *common, f"data.train={folder}/prompts.jsonl", *own, *rewards]
    printed = succeed(argv, folder / f"{raters}-rlhf.log")
    run_dir = folder / raters / "rlhf"
    (event,) = [e for e in records(run_dir / "events.jsonl") if e["kind"] == "overoptimisation"]
    return printed, event, run_dir


def test_a_biased_reward_model_is_found_out(written: Path) -> None:
    printed, event, run_dir = trained(written, "biased")
    first, best, last = event["parts"][0], event["best"], event["parts"][-1]
    assert best["true"] > first["true"] + 0.1 and best["learned"] > first["learned"]  # for a while they go together
    assert last["true"] < first["true"] and last["learned"] > best["learned"] and last["sqrt_kl"] > best["sqrt_kl"]
    assert event["found"] and event["fall"] > 0.5 and event["rise"] > 0.5
    assert "over-optimised after step" in " ".join(printed.split())
    assert (run_dir / "overoptimisation.md").read_text().startswith("Over-optimised after step")


def test_an_unbiased_one_is_not_accused(written: Path) -> None:
    printed, event, _ = trained(written, "unbiased")
    first, last = event["parts"][0], event["parts"][-1]
    assert last["learned"] > first["learned"] and last["true"] > first["true"] + 0.1  # it was trained, and rightly
    assert not event["found"] and "no over-optimisation seen" in " ".join(printed.split())
