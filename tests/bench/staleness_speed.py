"""What it brings to sample the next step while this one is trained on: steps of GRPO on the demo's model with bound 0 and with
bound 1, in turns, over the same workers. One process trains and one samples, a thread each.

    python tests/bench/staleness_speed.py [--rounds 5] [--steps 8] [--tokens 24]

`--tokens` is the longest completion, by which sampling can be made to take as long as the rest: the most that can be gained is
where both are equal. The model says nothing sensible, so every completion is of that length. Each turn begins with nothing
under way, so that bound 1 pays for its first samples.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import median

from llmscale.checkpoint.run_directory import open_run
from llmscale.cluster.publish import Publisher
from llmscale.compose import compose
from llmscale.data.splits import load_prompts
from llmscale.models.loading import load_tokenizer
from llmscale.rl.ledger import Ledger
from llmscale.stages.rlhf import Rlhf
from llmscale.stages.roles import opened_roles
from llmscale.tracking.composite import NullTracker


def untrained(folder: Path) -> Path:
    """The demo's model after one step."""
    once = ["training.num_steps=1", "data.max_records=300", "cluster=local", "engine=single", "tracking.wandb=disabled"]
    argv = ["pipeline", "experiment=demo", "stages=[pretrain,sft]", f"run.dir={folder}", *once]
    subprocess.run([sys.executable, "-m", "llmscale.cli", *argv], check=True, stdout=subprocess.DEVNULL)
    return folder / "demo" / "sft"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what one step of staleness brings.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), arguments.rounds, arguments.steps, arguments.tokens)


def measure(folder: Path, rounds: int, steps: int, tokens: int) -> None:
    sizes = [f"rollout.max_new_tokens={tokens}", f"data.max_seq_len={tokens + 38}", f"training.num_steps={steps}"]
    where = [f"run.dir={folder}", f"model.path={untrained(folder)}", "cluster.rollout.num_workers=1"]
    config = compose("rlhf", ["experiment=async", "algorithm.global_batch_size=64", *sizes, *where])
    prompts = load_prompts(config.data, load_tokenizer(str(config.model.path)), tokens)
    with (
        closing(open_run(config.run_dir, config)) as directory,
        opened_roles(config, directory, config.roles, NullTracker()) as pools,
    ):
        publisher = Publisher(config.cluster, directory.path)

        def seconds(bound: int) -> tuple[float, dict[str, float]]:
            """Of a step, and what the driver waited for in it."""
            own = replace(config, training=replace(config.training, max_staleness=bound))
            rlhf = Rlhf(
                own, prompts, pools, publisher, lambda *a, **k: None, lambda *a: None, Ledger(lambda ends: None)
            )
            rlhf.publish()
            parts: dict[str, float] = {}
            started = time.perf_counter()
            for _ in range(steps):
                for name, value in rlhf.iterate()[0].items():
                    if name.startswith("timing_s/"):
                        parts[name] = parts.get(name, 0.0) + value / steps
            took = (time.perf_counter() - started) / steps
            publisher.wait()
            return took, parts

        found = []
        for number in range(rounds + 1):
            order = [0, 1] if number % 2 else [1, 0]
            took = {bound: seconds(bound) for bound in order}
            found.append((took[0][0], took[1][0]))
            shown = " ".join(f"{name.removeprefix('timing_s/')} {value:.2f}" for name, value in took[0][1].items())
            print(
                f"round {number}: bound 0 {took[0][0]:.2f} s a step ({shown}), bound 1 {took[1][0]:.2f} s", flush=True
            )
    counted = found[1:]  # in the first everything is touched for the first time
    synchronous, ahead = (median(column) for column in zip(*counted, strict=True))
    ratio = median(a / b for a, b in counted)
    print(f"bound 0 {synchronous:.2f} s, bound 1 {ahead:.2f} s a step; ratio {ratio:.2f} (1.3 wanted)")


if __name__ == "__main__":
    main()
