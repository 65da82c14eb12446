"""What one optimizer step costs: `OMP_NUM_THREADS=1 python -m tests.bench.optimizers [REPEATS]`. Every way of updating the
same weights, in turn within one process; the best of the repeats counts, in CPU time, which waits for no one else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from llmscale.engine.averaging import WeightAverage
from llmscale.models.config import ModelConfig
from llmscale.models.loading import LanguageModel, new_language_model
from llmscale.optim.build import build_optimizer, parameter_groups
from llmscale.optim.config import OptimConfig, Optimizer
from tests.tiny import tokenizer

SIZES = {
    "6M": ModelConfig(hidden_size=256, intermediate_size=704, num_layers=8, num_heads=8),
    "100M": ModelConfig(hidden_size=768, intermediate_size=2048, num_layers=14, num_heads=12),
}


def model_of(size: ModelConfig) -> LanguageModel:
    model = new_language_model(size, tokenizer(), seed=0)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-3)
    return model


def ways(size: ModelConfig) -> dict[str, Callable[[], object]]:
    """One model for each, so that none works on weights that another has in the cache."""

    def torch_adamw(**how: bool) -> Callable[[], object]:
        return torch.optim.AdamW(parameter_groups(model_of(size), 0.1), lr=1e-3, betas=(0.9, 0.95), **how).step

    found = {
        "for-loop AdamW": torch_adamw(foreach=False, fused=False),
        "foreach AdamW": torch_adamw(foreach=True),
        "fused AdamW": torch_adamw(fused=True),
    }
    for kind in (Optimizer.lion, Optimizer.muon):
        found[kind.name] = build_optimizer(OptimConfig(optimizer=kind), model_of(size)).step
    averaged = build_optimizer(OptimConfig(), model_of(size))
    averaged.step()
    average = WeightAverage(0.999, averaged)
    found["average alone"] = lambda: average.update(10)
    return found


def main(repeats: int) -> None:
    for name, size in SIZES.items():
        steps = ways(size)
        best = dict.fromkeys(steps, float("inf"))
        for step in steps.values():
            step()  # the state is made
        for _ in range(repeats):
            for way, step in steps.items():
                started = time.process_time()
                step()
                best[way] = min(best[way], time.process_time() - started)
        numel = sum(p.numel() for p in weights(size))
        for way, seconds in best.items():
            print(f"{name} ({numel / 1e6:.1f}M weights)  {way:15} {seconds * 1e3:8.2f} ms", flush=True)


def weights(size: ModelConfig) -> list[Tensor]:
    return list(new_language_model(size, tokenizer(), seed=0).parameters())


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
