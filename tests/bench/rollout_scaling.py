"""How rollouts grow with their workers: a pool in Ray on one machine, driven as RLHF drives it.

    python -m tests.bench.rollout_scaling fixed          1, 2, 4 and 8 workers of a fixed token rate
    python -m tests.bench.rollout_scaling real           1 and 2 workers of rollout=hf, a thread each

An engine of fixed rate sleeps where others compute, so that what is lost is lost by the driver, by Ray, or by workers that wait
for the last one. Efficiency is the time of one worker / (N x the time of N), medians over rounds in turns. The driver's cost is
the processor time of all threads of its process.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np

from llmscale.batch import Prompt, Trajectory
from llmscale.cluster.config import Backend, ClusterConfig, PoolConfig
from llmscale.cluster.pool import WorkerPool, opened_pools
from llmscale.protocols import SamplingRequest
from llmscale.randomness import random_words

PROMPT_LEN, MAX_NEW_TOKENS = 64, 256
UNIT_SIZE = 16
TOKENS_PER_S = 8000.0  # of one worker: a unit takes a quarter of a second


def completion_len(request: SamplingRequest) -> int:
    """Ragged, and the same wherever it is sampled."""
    (word,) = random_words(0, "length", request.draw_id, request.sample_index, size=1)
    return 1 + int(word % MAX_NEW_TOKENS)


class FixedRate:
    def __init__(self, tokens_per_s: float = TOKENS_PER_S):
        self.tokens_per_s = tokens_per_s

    def generate(self, requests: Sequence[SamplingRequest]) -> list[Trajectory]:
        lengths = [completion_len(request) for request in requests]
        time.sleep(sum(lengths) / self.tokens_per_s)
        return [self._sample(*pair) for pair in zip(requests, lengths, strict=True)]

    def _sample(self, request: SamplingRequest, length: int) -> Trajectory:
        produced = np.arange(PROMPT_LEN + length) >= PROMPT_LEN
        return Trajectory(
            request.draw_id,
            request.sample_index,
            token_ids=np.arange(len(produced)),
            loss_mask=produced,
            rollout_logprobs=np.where(produced, -1, 0).astype(np.float32),
            weight_versions=np.where(produced, 1, -1).astype(np.int32),
            finished=length < MAX_NEW_TOKENS,
            prompt=request.prompt,
            completion="word " * (length // 2),
        )


class Real:
    """rollout=hf with a random model of 6M; only its longest completions end early."""

    def __init__(self) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from llmscale.data.tokenizer import MIN_VOCAB_SIZE, train_tokenizer
        from llmscale.models.loading import LanguageModel
        from llmscale.rollout.config import HFRolloutConfig
        from llmscale.rollout.hf import HFRollout

        torch.manual_seed(0)
        sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 8}
        model = LanguageModel(LlamaForCausalLM(LlamaConfig(vocab_size=4000, max_position_embeddings=512, **sizes)))
        tokenizer = train_tokenizer(iter(["the cat sat on the mat"]), MIN_VOCAB_SIZE, model_max_length=512)
        self.engine = HFRollout(HFRolloutConfig(max_new_tokens=64), model, tokenizer, 0, stop_ids=range(40))

    def generate(self, requests: Sequence[SamplingRequest]) -> list[Trajectory]:
        return self.engine.generate(requests)


def units(num_prompts: int, group_size: int = 8) -> list[list[SamplingRequest]]:
    prompts = [Prompt(np.arange(PROMPT_LEN), "a prompt") for _ in range(num_prompts)]
    requests = [SamplingRequest(p, draw, k) for draw, p in enumerate(prompts) for k in range(group_size)]
    return [requests[i : i + UNIT_SIZE] for i in range(0, len(requests), UNIT_SIZE)]


def one_pass(pool: WorkerPool, work: Sequence[list[SamplingRequest]]) -> tuple[float, float, int]:
    """Seconds, the driver's processor seconds, trajectories."""
    processor, started = time.process_time(), time.perf_counter()
    made = [t for unit in pool.units(FixedRate.generate, work).wait() for t in unit]
    return time.perf_counter() - started, time.process_time() - processor, len(made)


def scaling(role: type, sizes: Sequence[int], num_prompts: int, rounds: int) -> None:
    work = units(num_prompts)
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    costs: dict[int, list[float]] = {size: [] for size in sizes}
    with tempfile.TemporaryDirectory() as logs:
        for number in range(rounds):
            for size in sizes:
                rollout = PoolConfig(num_workers=size, num_cpus=0.1)
                cluster = ClusterConfig(backend=Backend.ray, rollout=rollout)
                with opened_pools(cluster, {"rollout": role}, Path(logs)) as pools:
                    pools["rollout"].units(role.generate, work[: 2 * size]).wait()
                    took, cost, num = one_pass(pools["rollout"], work)
                seconds[size].append(took)
                costs[size].append(1000 * cost / num)
                print(f"round {number}: {size} workers, {num} trajectories in {took:.2f} s", flush=True)
    base = median(seconds[sizes[0]]) * sizes[0]
    print("| workers | seconds | of one worker's rate | efficiency | driver, ms a trajectory |\n|---|---|---|---|---|")
    for size in sizes:
        took = median(seconds[size])
        speedup = base / took
        cost = median(costs[size])
        print(f"| {size} | {took:.2f} | {speedup:.2f} | {100 * speedup / size:.1f}% | {cost:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how rollouts grow with their workers.")
    parser.add_argument("what", choices=["fixed", "real"])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.what == "fixed":
        scaling(FixedRate, (1, 2, 4, 8), num_prompts=256, rounds=arguments.rounds)
    else:
        scaling(Real, (1, 2), num_prompts=64, rounds=arguments.rounds)


if __name__ == "__main__":
    main()
