"""The table that a run ends with: what each stage took and reached."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

# What a stage reached: (metric, how it is called), in the order shown. The validation figure stands before the training one.
REACHED = {
    "pretrain": [("eval/loss", "validation loss"), ("train/loss", "training loss")],
    "sft": [("eval/loss", "validation loss"), ("train/loss", "training loss")],
    "reward": [("eval/accuracy", "held-out pairwise accuracy"), ("train/accuracy", "training pairwise accuracy")],
    "rlhf": [("reward/mean", "learned reward"), ("kl/ref", "KL to the SFT model")],
}


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
    return [
        "Try next:",
        f'llmscale generate model.path={run_dir} prompt="{example}"',
        f"llmscale chat model.path={run_dir}",
        f"llmscale rlhf experiment=demo run.name=strict algorithm.kl_coef=0.2 model.path={sft} reward.path={reward}",
    ]


def reached(stage: str, results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines such as `held-out pairwise accuracy 0.941`."""
    metrics = results[stage]["metrics"]
    shown = [(label, metrics[name]) for name, label in REACHED.get(stage, []) if name in metrics]
    lines = [f"{label} {value:.3f}" for label, value in (shown if stage == "rlhf" else shown[:1])]
    before, after = (results.get("rlhf", {}).get(when, {}) for when in ("before", "metrics"))
    for name, label in (("eval/reward/true", "held-out true score"), ("eval/reward/mean", "held-out learned reward")):
        if stage == "sft" and name in before and label.endswith("score"):
            lines.append(f"{label} {before[name]:.3f}")
        if stage == "rlhf" and name in before and name in after:
            lines.insert(0, f"{label} {before[name]:.3f} -> {after[name]:.3f}")
    return lines
