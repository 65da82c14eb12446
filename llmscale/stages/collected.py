"""What a collection leaves: rankings for a reward model, conversations for SFT, and what choosing among samples is worth.
Read from samples.jsonl a prompt at a time, so that its size does not matter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from llmscale.batch import Prompt
from llmscale.checkpoint.durable import atomic_write_lines
from llmscale.data.preferences import MAX_COMPLETIONS, MIN_COMPLETIONS
from llmscale.rl.selection import best_of_k, first_of_each, kl_bound, ranks_of, score_at_fraction, spread_out
from llmscale.stages.answering_config import CollectConfig, MethodConfig, RejectionConfig
from llmscale.tracking.jsonl import SAMPLES, iter_jsonl

Sample = Mapping[str, Any]  # a line of samples.jsonl
RANKINGS, SFT = "rankings.jsonl", "sft.jsonl"


def write_collected(run_dir: Path, config: CollectConfig, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Write both files; returns `metrics` over all prompts, and the curve `best_of_k`, unless a beam search found the
    completions: those are no independent samples."""
    metrics, curve = worth(run_dir, with_true=config.true_reward is not None)
    choose = chooser(config.method, run_dir)
    rankings, conversations = Rankings(prompts), Conversations(prompts, choose)
    atomic_write_lines(run_dir / RANKINGS, rankings.lines(run_dir))
    atomic_write_lines(run_dir / SFT, conversations.lines(run_dir))
    metrics |= rankings.counts | conversations.metrics(metrics["collect/samples"])
    return {"metrics": metrics} | ({} if config.num_beams else {"best_of_k": curve})


def groups(run_dir: Path) -> Iterator[list[Sample]]:
    """The samples of each prompt, in the order of the prompts."""
    for _, group in groupby(iter_jsonl(run_dir / SAMPLES), key=lambda sample: sample["draw_id"]):
        yield list(group)


# ---------------------------------------------------------------- rankings


class Rankings:
    """Distinct completions of each prompt, ranked by reward. A reward model takes 9 at most: of more, those that span the
    rewards from best to worst."""

    def __init__(self, prompts: Sequence[Prompt]):
        self.prompts = prompts
        self.counts = {"rankings/records": 0, "rankings/tied": 0, "rankings/left_out": 0}

    def lines(self, run_dir: Path) -> Iterator[str]:
        for group in groups(run_dir):
            distinct = [group[i] for i in first_of_each([s["completion"] for s in group])]
            if len(distinct) < MIN_COMPLETIONS:
                self.counts["rankings/left_out"] += 1
                continue
            ranked = [distinct[i] for i in spread_out([s["reward"] for s in distinct], MAX_COMPLETIONS)]
            record = ranking(self.prompts[group[0]["draw_id"]], ranked)
            self.counts["rankings/records"] += 1
            self.counts["rankings/tied"] += len(set(record["ranks"])) == 1
            yield _line(record)


def ranking(prompt: Prompt, samples: Sequence[Sample]) -> dict[str, Any]:
    """`ratings`: the rewards, for objectives with a margin. `logprobs`: of each whole completion, in nats, under the
    distribution that was sampled or searched."""
    return {
        "messages": list(prompt.messages),
        "completions": [s["completion"] for s in samples],
        "ranks": ranks_of([s["reward"] for s in samples]),
        "ratings": [s["reward"] for s in samples],
        "logprobs": [round(math.fsum(s["rollout_logprobs"]), 6) for s in samples],
    }


# ---------------------------------------------------------------- conversations


class Conversations:
    """What `choose` takes of each prompt. A prompt may stand in the data twice; the same answer to it is written once."""

    def __init__(self, prompts: Sequence[Prompt], choose: Callable[[Sequence[Sample]], list[Sample]]):
        self.prompts, self.choose = prompts, choose
        self.written: set[bytes] = set()  # digests
        self.kept: dict[str, list[float]] = {"reward": [], "true_reward": []}

    def lines(self, run_dir: Path) -> Iterator[str]:
        for group in groups(run_dir):
            turns = list(self.prompts[group[0]["draw_id"]].messages)
            for sample in self.choose(group):
                line = _line({"messages": [*turns, {"role": "assistant", "content": sample["completion"]}]})
                digest = blake2b(line.encode(), digest_size=16).digest()
                if digest not in self.written:
                    self.written.add(digest)
                    for name, values in self.kept.items():
                        values += [] if sample[name] is None else [sample[name]]
                    yield line

    def metrics(self, num_samples: float) -> dict[str, float]:
        num_kept = len(self.kept["reward"])
        means = {f"sft/{name}": float(np.mean(values)) for name, values in self.kept.items() if values}
        return {"sft/records": num_kept, "sft/kept_fraction": num_kept / num_samples} | means


def learnable(group: Sequence[Sample]) -> list[Sample]:
    """Distinct completions that the policy ended itself, that say anything, and that are text: one that was cut off would
    teach to stop in the middle, and one with broken characters to write U+FFFD."""
    whole = [s for s in group if s["finished"] and s["completion"].strip() and "\ufffd" not in s["completion"]]
    return [whole[i] for i in first_of_each([s["completion"] for s in whole])]


def chooser(method: MethodConfig, run_dir: Path) -> Callable[[Sequence[Sample]], list[Sample]]:
    """Which of a prompt's samples SFT learns: the best one, or all with a reward of at least so much."""
    if not isinstance(method, RejectionConfig):
        return lambda group: sorted(learnable(group), key=lambda s: -s["reward"])[:1]
    least = method.min_score
    if least is None:
        every = (s["reward"] for group in groups(run_dir) for s in learnable(group))
        least = score_at_fraction(every, float(method.keep_fraction or 0))
    return lambda group: [s for s in learnable(group) if s["reward"] >= least]


# ---------------------------------------------------------------- what choosing is worth


def worth(run_dir: Path, with_true: bool) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Means over the prompts: of a random sample and of the best; and, for each k, of the best of k samples, with the most
    that choosing it can cost in KL. The true reward is that of the sample with the best reward."""
    curves: dict[str, list[np.ndarray]] = {name: [] for name in ("reward", *(["true_reward"] if with_true else []))}
    num_samples, num_tokens, num_cut_off = 0, 0, 0
    for group in groups(run_dir):
        rewards = np.array([s["reward"] for s in group])
        for name, curve in curves.items():
            curve.append(best_of_k(rewards, np.array([s[name] for s in group])))
        num_samples += len(group)
        num_tokens += sum(sum(s["loss_mask"]) for s in group)
        num_cut_off += sum(not s["finished"] for s in group)
    metrics: dict[str, float] = {"collect/prompts": len(curves["reward"]), "collect/samples": num_samples}
    for name, of_a_sample, of_the_best in (
        ("reward", "reward/mean", "reward/best"),
        ("true_reward", "reward/true", "reward/true_of_best"),
    ):
        if name in curves:
            metrics[of_a_sample] = float(np.mean([curve[0] for curve in curves[name]]))
            metrics[of_the_best] = float(np.mean([curve[-1] for curve in curves[name]]))
    metrics["rollout/completion_len"] = num_tokens / num_samples
    metrics["rollout/cut_off"] = num_cut_off / num_samples
    points = []
    for k in range(1, min(map(len, curves["reward"])) + 1):
        means = {name: float(np.mean([curve[k - 1] for curve in own])) for name, own in curves.items()}
        points.append({"k": k, "kl_bound": kl_bound(k)} | means)
    return metrics, points


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
