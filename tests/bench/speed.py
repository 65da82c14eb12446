"""Our trainer against a bare PyTorch loop, transformers' Trainer and TRL's trainers: the tables of `make bench`.

    python -m tests.bench.speed [--only pretrain sft] [--data ../shared/data]

The same model, samples, precision and a single thread for all. The contenders take turns of a few steps, round after round
(`turns.py`), so that whatever else the machine does meets them all alike. A ratio is the median over rounds of (own
tokens/s / the reference's tokens/s in the same round); the range beside it holds the middle half of the rounds. The same
ratio by processor time, of all threads, says how much of that the rest of the machine had its hand in. Tokens are real
ones, not padding. Memory is what is resident of the whole process.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.samples import DATA, prepare
from tests.bench.turns import QUIET, ROOT, Contender, Turn, measure

MOST_MEMORY = 1.05  # of a bare loop's


@dataclass(frozen=True)
class Group:
    title: str
    rounds: int
    steps: int  # of a turn
    contenders: tuple[Contender, ...]  # the first is the reference of the table's ratios


BARE, DDP, TRL = "bare loop", "bare loop, DDP", "TRL as it comes"
GENERATE = "transformers' generate"
SINGLE, ZERO = "ours, single", "ours, ZeRO-2"
TRL_PLAIN, BEST_TRL = "TRL without activation checkpointing", "the best of TRL"
TRL_WITH_PPO = ROOT / ".venv" / "trl-1.12"  # the last release that has a PPOTrainer; `make bench` puts it there
FP32, BF16 = "engine.precision=fp32", "engine.precision=bf16"
RULE = ("reward=function", f"reward.path={ROOT}/tests/bench/rlhf_contenders.py:vowels")
BIGGER = "model.path={folder}/lm30"  # `turns` knows the folder
# Rounds, steps: to be 0.97 of something takes more of them than to be 3 times it; a step of pairs is ten thousand tokens.
PRECISE, ROUGH, LONG, SLOW = (16, 4), (8, 2), (8, 1), (5, 1)

GROUPS = {
    "pretrain": Group(
        "Packed pretraining: c4_demo, 4 blocks of 256 tokens a step, fp32",
        *PRECISE,
        (
            Contender(BARE, ("bare_pretrain",)),
            Contender("transformers' Trainer", ("transformers_pretrain",)),
            Contender(SINGLE, ("ours", "pretrain", "engine=single", FP32), {BARE: 0.97}),
            Contender(ZERO, ("ours", "pretrain", "engine=deepspeed", FP32), {BARE: 0.92}),
        ),
    ),
    "pretrain2": Group(
        "The same on 2 ranks, 4 blocks each",
        *PRECISE,
        (
            Contender(DDP, ("bare_pretrain_ddp",), ranks=2),
            Contender(ZERO, ("ours", "pretrain", "engine=deepspeed", FP32), {DDP: 0.92}, ranks=2),
        ),
    ),
    "sft": Group(
        "SFT: alpaca_en_demo, 8 conversations a step, bf16",
        *ROUGH,
        (
            Contender(TRL, ("trl_sft_defaults",)),
            Contender(TRL_PLAIN, ("trl_sft",)),
            Contender("TRL, the same, batches of like length", ("trl_sft_by_length",)),
            Contender("TRL, the same, padding-free", ("trl_sft_padding_free",)),
            Contender("TRL, the same, packing, one row a step", ("trl_sft_packing",)),
            Contender("bare loop on packed rows", ("bare_sft_rows",)),
            Contender(SINGLE, ("ours", "sft", "engine=single", BF16), {TRL: 3.0, BEST_TRL: 1.5}),
            Contender(ZERO, ("ours", "sft", "engine=deepspeed", BF16)),
        ),
    ),
    "reward": Group(
        "Reward modelling: dpo_en_demo, 8 pairs a step, bf16",
        *LONG,
        (
            Contender(TRL, ("trl_reward_defaults",)),
            Contender(TRL_PLAIN, ("trl_reward",)),
            Contender(SINGLE, ("ours", "reward", "engine=single", BF16), {TRL: 1.8}),
            Contender(ZERO, ("ours", "reward", "engine=deepspeed", BF16)),
        ),
    ),
    "generate": Group(
        "Sampling alone: 8 prompts x 8 completions of 1 to 128 tokens, bf16",
        *ROUGH,
        (
            Contender(GENERATE, ("generate",)),
            Contender("ours, rollout=hf", ("ours_generate", "hf"), {GENERATE: 1.3}),
        ),
    ),
    "generate100": Group(
        "The same with a model of 102M",
        *LONG,
        (
            Contender(GENERATE, ("generate", "lm100")),
            Contender("ours, rollout=hf", ("ours_generate", "hf", "lm100"), {GENERATE: 1.3}),
            Contender("ours, rollout=vllm", ("ours_generate", "vllm", "lm100"), {GENERATE: 2.0}),
        ),
    ),
    "grpo": Group(
        "GRPO: alpaca_en_demo, 8 prompts x 8 completions x 64 tokens, KL to a reference, bf16",
        *SLOW,
        (
            Contender(TRL, ("trl_grpo_defaults",)),
            Contender(TRL_PLAIN, ("trl_grpo",)),
            Contender("TRL, the same, all sequences at once", ("trl_grpo_at_once",)),
            Contender(SINGLE, ("ours", "rlhf", "algorithm=grpo", *RULE, BF16), {TRL: 1 / 0.65, BEST_TRL: 1 / 0.65}),
        ),
    ),
    "grpo30": Group(
        "The same with a model of 31M",
        *SLOW,
        (
            Contender(TRL, ("trl_grpo_defaults", "lm30")),
            Contender(TRL_PLAIN, ("trl_grpo", "lm30")),
            Contender("TRL, the same, all sequences at once", ("trl_grpo_at_once", "lm30")),
            Contender(
                SINGLE,
                ("ours", "rlhf", "algorithm=grpo", *RULE, BF16, BIGGER),
                {TRL: 1 / 0.55, BEST_TRL: 1 / 0.55},
            ),
        ),
    ),
    "ppo": Group(
        "PPO: the same prompts and number of samples, a learned reward, one epoch, fp32; TRL 1.12",
        *SLOW,
        (
            Contender(TRL, ("trl_ppo_defaults",), packages=TRL_WITH_PPO),
            Contender(TRL_PLAIN, ("trl_ppo",), packages=TRL_WITH_PPO),
            Contender(
                SINGLE,
                ("ours", "rlhf", "algorithm=ppo", "reward.path={folder}/rm", FP32),
                {TRL: 1 / 0.6, BEST_TRL: 1 / 0.6},
            ),
        ),
    ),
}


def table(group: Group, turns: Mapping[Contender, Sequence[Turn]]) -> list[str]:
    reference, *_ = turns.values()
    head = ["", "tokens/s", "ratio", "middle half", "by processor time", "peak memory", "ratio", "first losses"]
    lines = [f"### {group.title}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for contender, own in turns.items():
        clock = ratios(own, reference)
        low, _, high = statistics.quantiles(clock, n=4)
        processor = ratios(own, reference, lambda turn: turn.tokens / turn.cpu_seconds)
        last, least = own[-1], reference[-1].peak_bytes
        row = [
            contender.title,
            f"{statistics.median(turn.tokens_per_s for turn in own[1:]):,.0f}",
            f"{statistics.median(clock):.2f}",
            f"{low:.2f}-{high:.2f}",
            f"{statistics.median(processor):.2f}",
            f"{last.peak_bytes >> 20} MiB ({last.start_bytes >> 20} at start)",
            f"{last.peak_bytes / least:.2f}",
            " ".join(f"{loss:.4f}" for loss in own[0].losses[:2]),
        ]
        lines.append(f"| {' | '.join(row)} |")
    return [*lines, "", *verdicts(turns), *splits(turns, group.steps), ""]


def splits(turns: Mapping[Contender, Sequence[Turn]], steps: int) -> list[str]:
    """Where the time of a step went, of those that tell."""
    lines = []
    for contender, own in turns.items():
        medians = {name: statistics.median(t.parts.get(name, 0.0) for t in own[1:]) / steps for name in own[-1].parts}
        if medians:
            step = statistics.median(turn.seconds for turn in own[1:]) / steps
            parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in medians.items())
            lines.append(f"- {contender.title}: {step:.2f} s a step, of it {parts}")
    return lines


def ratios(
    turns: Sequence[Turn], reference: Sequence[Turn], speed: Callable[[Turn], float] = lambda turn: turn.tokens_per_s
) -> list[float]:
    """Own speed by the reference's, round by round, without the warm-up."""
    return [speed(own) / speed(other) for own, other in zip(turns[1:], reference[1:], strict=True)]


def verdicts(turns: Mapping[Contender, Sequence[Turn]]) -> list[str]:
    """What was to be reached, and whether it was."""
    by_title = {contender.title: own for contender, own in turns.items()}
    of_trl = {title: own for title, own in by_title.items() if title.startswith("TRL")}
    best = max(of_trl, key=lambda title: statistics.median(t.tokens_per_s for t in of_trl[title][1:]), default=None)
    lines = []
    for contender, own in turns.items():
        for reference, least in contender.targets.items():
            title = best if reference == BEST_TRL else reference
            if title not in by_title:
                continue  # not measured this time
            reached = statistics.median(ratios(own, by_title[title]))
            lines.append(
                f"- {contender.title}: {reached:.2f} of {title}, at least {least:.3g} wanted: {_word(reached >= least)}"
            )
            if title in (BARE, DDP):
                memory = own[-1].peak_bytes / by_title[title][-1].peak_bytes
                word = _word(memory <= MOST_MEMORY)
                lines.append(f"- {contender.title}: {memory:.2f} of its memory, at most {MOST_MEMORY} wanted: {word}")
    return lines


def _word(reached: bool) -> str:
    return "reached" if reached else "missed"


def machine() -> str:
    models = {
        line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    }
    load = " ".join(f"{x:.1f}" for x in os.getloadavg())
    return f"{os.cpu_count()} cores ({', '.join(models) or platform.machine()}), load {load}, {datetime.date.today()}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure our trainer against others and print the ratios.")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups of contenders")
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data", help=f"holds {', '.join(DATA.values())}"
    )
    arguments = parser.parse_args()
    missing = [str(arguments.data / file) for file in DATA.values() if not (arguments.data / file).is_file()]
    if missing:
        sys.exit(f"there is no {missing[0]}: name the folder that holds it with --data")
    groups = [GROUPS[name] for name in arguments.only]
    os.environ.update(QUIET)
    with tempfile.TemporaryDirectory(prefix="llmscale-speed-") as name:
        folder = Path(name)
        prepare(folder, arguments.data, max(2 * group.steps * (group.rounds + 1) for group in groups))
        for group in groups:
            lacking = {str(c.packages) for c in group.contenders if c.packages and not c.packages.is_dir()}
            if lacking:
                print(f"### {group.title}\n\nLeft out: `make bench` puts TRL 1.12 into {lacking.pop()}.\n", flush=True)
                continue
            before = machine()
            turns = measure(group.contenders, group.rounds, group.steps, folder, arguments.data)
            print("\n".join(table(group, turns)), f"On {before}.", "", sep="\n", flush=True)


if __name__ == "__main__":
    main()
