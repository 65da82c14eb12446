"""What ZeRO costs on CPUs: DeepSpeed's engine against a bare PyTorch loop at one rank, and against gloo DDP at two.

    python tests/bench/zero_speed.py [--blocks 12] [--stages 2] [--override zero_optimization.overlap_comm=true]

Each rank is a process of one thread. It holds all the contestants at once and gives each a block of steps in turn, so
that whatever else the machine does meets them alike. A contestant's number is the median over blocks of (the baseline's
time / its own), 1 being as fast as the baseline: of the time on the clock, and of the processor time of rank 0, which a
busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from llmscale import distributed
from llmscale.batch import Batch
from llmscale.engine.config import DeepSpeedConfig, SingleConfig
from llmscale.functional import token_logprobs
from llmscale.models.loading import LanguageModel
from llmscale.objectives.causal_lm import CausalLM
from llmscale.objectives.config import CausalLMConfig
from llmscale.optim.build import parameter_groups
from llmscale.optim.config import OptimConfig
from tests.engine.conftest import start_ranks
from tests.tiny import token_examples

VOCAB_SIZE, SEQ_LEN, ROWS = 4096, 256, 4
OBJECTIVE = CausalLM(CausalLMConfig())
OPTIM = OptimConfig()
Step = Callable[[Batch], object]


def model() -> LanguageModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=SEQ_LEN,
        tie_word_embeddings=True,
    )
    return LanguageModel(LlamaForCausalLM(config))


def bare() -> Step:
    """A loop as one writes it by hand; gradients averaged by DDP where there are several ranks."""
    own = model()
    groups = parameter_groups(own, OPTIM.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=OPTIM.lr, betas=(0.9, 0.95), eps=OPTIM.eps, fused=True)
    wrapped = DistributedDataParallel(own) if distributed.world_size() > 1 else own

    def step(batch: Batch) -> float:
        logits = wrapped(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
        logprobs = token_logprobs(logits, batch["input_ids"])
        loss = -logprobs[batch["loss_mask"]].mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(own.parameters(), OPTIM.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss) + float(norm)

    return step


def engine(config: Any) -> Step:
    from llmscale.config import build

    own = build(config, model(), OPTIM, 1000)
    return lambda batch: own.step([batch], OBJECTIVE)


def contest(contestants: dict[str, Step], blocks: int, steps: int) -> dict[str, list[tuple[float, float]]]:
    """(wall, processor) seconds a step of each, block by block; every rank runs the same order."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    names = list(contestants)
    batch = OBJECTIVE.prepare(token_examples([SEQ_LEN] * ROWS, seed=distributed.rank(), vocab_size=VOCAB_SIZE))
    for block in range(blocks + 1):
        for name in names[block % len(names) :] + names[: block % len(names)]:
            distributed.barrier()
            wall, processor = time.perf_counter(), time.process_time()
            for _ in range(steps):
                contestants[name](batch)
            distributed.barrier()
            if block:  # the first warms up
                spent = (time.perf_counter() - wall) / steps, (time.process_time() - processor) / steps
                seconds[name].append(spent)
    return seconds


def report(title: str, seconds: dict[str, list[tuple[float, float]]]) -> None:
    baseline = next(iter(seconds.values()))
    for name, own in seconds.items():
        numbers = []
        for clock in (0, 1):
            numbers.append(statistics.median(b[clock] / o[clock] for b, o in zip(baseline, own, strict=True)))
            numbers.append(statistics.median(o[clock] for o in own) * 1e3)
        print("{:>8} {:>14}  wall {:5.3f} {:7.1f} ms/step  cpu {:5.3f} {:7.1f} ms/step".format(title, name, *numbers))


def rank_main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    distributed.join(timeout_s=300)
    ranks = distributed.world_size()
    contestants = {"ddp" if ranks > 1 else "bare": bare()}
    if ranks == 1:
        contestants["single"] = engine(SingleConfig())
    for stage in arguments.stages:
        contestants[f"zero{stage}"] = engine(
            DeepSpeedConfig(zero_stage=stage, overrides=json.loads(arguments.override))
        )
    seconds = contest(contestants, arguments.blocks, arguments.steps)
    if distributed.rank() == 0:
        report(f"{ranks} rank{'s' * (ranks > 1)}", seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--steps", type=int, default=3, help="of a block")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--override", default="{}", help="DeepSpeed's own JSON, as engine.overrides")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        rank_main(arguments)
        return
    for ranks in arguments.ranks:
        started = start_ranks([sys.executable, *sys.argv], ranks)
        if any(rank.wait() for rank in started):
            sys.exit(f"a rank of {ranks} failed")


if __name__ == "__main__":
    main()
