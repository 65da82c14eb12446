"""The tables that a run and a sweep end with: what each stage, or each job, took and reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

# What a stage reached: (metric, how it is called), in the order shown. The validation figure stands before the training one.
REACHED = {
    "pretrain": [("eval/loss", "validation loss"), ("train/loss", "training loss")],
    "sft": [("eval/loss", "validation loss"), ("train/loss", "training loss")],
    "reward": [("eval/accuracy", "held-out pairwise accuracy"), ("train/accuracy", "training pairwise accuracy")],
    "process": [("eval/accuracy", "held-out accuracy of steps"), ("train/accuracy", "training accuracy of steps")],
    "rlhf": [("reward/mean", "reward"), ("kl/ref", "KL to the SFT model")],
    "rollout": [("rollout/completion_len", "tokens of a completion"), ("reward/mean", "reward")],
    "collect": [("rankings/records", "rankings"), ("sft/records", "conversations for SFT")],
}

# What tells the jobs of a sweep apart, in the order shown, and which of several values is the best.
COMPARED: dict[str, Callable[..., Any]] = {
    "train/loss": min,
    "eval/loss": min,
    "eval/accuracy": max,
    "eval/reward/true": max,
    "eval/reward/mean": max,
    "reward/mean": max,
    "reward/best": max,
    "reward/true_of_best": max,
}
Key = tuple[str, str]  # stage and metric


def print_summary(results: Mapping[str, Mapping[str, Any]]) -> None:
    """`results`: what each stage's run returned, by stage."""
    table = Table(title=None)
    for name in ("stage", "steps", "time", "reached"):
        table.add_column(name, justify="right" if name in ("steps", "time") else "left")
    for stage, result in results.items():
        took = f"{result['seconds']:.0f} s"
        table.add_row(stage, str(result["steps"]), took, "\n".join(reached(stage, results)))
    console = Console()
    console.print(table)
    for stage, result in results.items():
        console.print(f"  {stage}: {result['run_dir']}", soft_wrap=True, highlight=False)
    for command in next_commands(results):
        console.print(f"  {command}", soft_wrap=True, highlight=False, markup=False)


def next_commands(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What to try with the last model of a pipeline."""
    if not {"sft", "reward", "rlhf"} <= results.keys():
        return []
    run_dir, example = results["rlhf"]["run_dir"], results["rlhf"]["example"].splitlines()[0]
    sft, reward = results["sft"]["run_dir"], results["reward"]["run_dir"]
    experiment = "steps" if results["reward"].get("objective") == "process" else "demo"
    return [
        "Try next:",
        f'llmscale generate model.path={run_dir} prompt="{example}"',
        f"llmscale chat model.path={run_dir}",
        f"llmscale rlhf experiment={experiment} run.name=strict algorithm.kl_coef=0.2 model.path={sft} reward.path={reward}",
    ]


def reached(stage: str, results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines such as `held-out pairwise accuracy 0.941`."""
    metrics = results[stage]["metrics"]
    kind = "process" if results[stage].get("objective") == "process" else stage
    shown = [(label, metrics[name]) for name, label in REACHED.get(kind, []) if metrics.get(name) is not None]
    if stage == "collect":
        scores = {"reward": ("reward/mean", "reward/best"), "true score": ("reward/true", "reward/true_of_best")}
        return [
            *(
                f"{name} {metrics[a]:.3f}, of the best {metrics[b]:.3f}"
                for name, (a, b) in scores.items()
                if a in metrics
            ),
            *(f"{label} {value}" for label, value in shown),
        ]
    if stage == "rollout":
        counts = f"{metrics['rollout/samples']:,} completions, {metrics['rollout/tokens']:,} tokens"
        cut_off = f"{metrics['rollout/cut_off']:.1%} cut off"
        failed = [f"{metrics['rollout/failed']:.1%} failed"] if metrics["rollout/failed"] else []
        return [counts, cut_off, *failed, *(f"{label} {value:.3f}" for label, value in shown)]
    lines = [f"{label} {value:.3f}" for label, value in (shown if stage == "rlhf" else shown[:1])]
    if metrics.get("eval/ece") is not None:
        lines.append(f"held-out calibration error {metrics['eval/ece']:.3f}")
    if verdict := results[stage].get("overoptimisation"):
        lines.append(verdict)
    before, after = (results.get("rlhf", {}).get(when, {}) for when in ("before", "metrics"))
    for name, label in (("eval/reward/true", "held-out true score"), ("eval/reward/mean", "held-out reward")):
        if stage == "sft" and name in before and label.endswith("score"):
            lines.append(f"{label} {before[name]:.3f}")
        if stage == "rlhf" and name in before and name in after:
            lines.insert(0, f"{label} {before[name]:.3f} -> {after[name]:.3f}")
    return lines


def compared(metrics: Mapping[str, Mapping[str, Any]]) -> dict[Key, float]:
    """Of the metrics by stage, those that tell jobs apart; null stands where one was not finite."""
    return {(s, name): m[name] for s, m in metrics.items() for name in COMPARED if m.get(name) is not None}


def print_sweep(report: Mapping[str, Any], file: Path) -> None:
    """`report`: the content of `file`, as `stages/sweep.py` makes it."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=1000)  # whoever reads a file can scroll; rich would fold the table to 80 characters
    names = report["keys"]
    jobs = [
        _Row(
            [*job["values"].values()], {k: (v, f"{v:#.4g}") for k, v in compared(job["metrics"]).items()}, _status(job)
        )
        for job in report["jobs"]
    ]
    console.print(_comparison([*names.values()], jobs, "status"))
    seeds = [
        _Row(
            [*row["values"].values()],
            {(stage, name): _spread(s) for stage, spreads in row["metrics"].items() for name, s in spreads.items()},
            str(max((s["n"] for spreads in row["metrics"].values() for s in spreads.values()), default=0)),
        )
        for row in report["over_seeds"]
    ]
    if seeds:
        over = [short for path, short in names.items() if path in report["over_seeds"][0]["values"]]
        console.print(_comparison(over, seeds, "n"))
    console.print(f"  {file}", soft_wrap=True, highlight=False, markup=False)


@dataclass
class _Row:
    values: list[Any]  # of the swept keys
    cells: dict[Key, tuple[float, str]]  # what it reached, and as it is shown
    end: str


def _comparison(swept: Sequence[str], rows: Sequence[_Row], last: str) -> Table:
    """A column for each swept key, for each metric with its best marked, and one more."""
    metrics = list(dict.fromkeys(key for row in rows for key in row.cells))
    several = len({stage for stage, _ in metrics}) > 1
    marks = len(rows) > 1 and bool(metrics)
    table = Table(caption="* best of its column" if marks else None)
    for name in (*swept, *(f"{stage}\n{metric}" if several else metric for stage, metric in metrics), last):
        table.add_column(name, justify="right")
    best = {key: COMPARED[key[1]](row.cells[key][0] for row in rows if key in row.cells) for key in metrics}
    for row in rows:
        cells = [Text(str(value)) for value in row.values]  # not as markup: a list has brackets
        for key in metrics:
            value, text = row.cells.get(key, (None, ""))
            cells.append(Text(f"{text} *" if marks and value == best[key] else f"{text}  "))
        table.add_row(*cells, row.end)
    return table


def _status(job: Mapping[str, Any]) -> str:
    return f"{job['status']} ({job['exit_code']})" if job["exit_code"] else job["status"]


def _spread(spread: Mapping[str, Any]) -> tuple[float, str]:
    std = "" if spread["std"] is None else f" ± {spread['std']:.2g}"
    return spread["mean"], f"{spread['mean']:#.4g}{std}"
