"""How fast checkpoints are written, and how long training waits for one: a model of 100M parameters with the AdamW state of
engine=single in fp32, 1.2 GB.

    python tests/bench/checkpoint_speed.py [--dir DIR] [--rounds 7]

Each round writes the checkpoint through CheckpointStore (files, fsync, digests, manifest, rename) and as many bytes by
`dd bs=1M conv=fsync` into the same directory, in turns, so that whatever else the machine does falls on both. Neither is
charged for removing what it wrote before. Then training goes on while a checkpoint is written in the background.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmscale.batch import TokenExample
from llmscale.checkpoint.background import AsyncSaver
from llmscale.checkpoint.commit import CheckpointStore
from llmscale.checkpoint.durable import discard
from llmscale.checkpoint.manifest import Checkpoint, verify
from llmscale.engine.config import SingleConfig
from llmscale.engine.single import SingleEngine
from llmscale.models.loading import LanguageModel
from llmscale.objectives.causal_lm import CausalLM
from llmscale.objectives.config import CausalLMConfig
from llmscale.optim.config import OptimConfig

NUM_TOKENS = 512  # of one training step
OBJECTIVE = CausalLM(CausalLMConfig())


def new_engine() -> SingleEngine:
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    config = LlamaConfig(vocab_size=20_000, max_position_embeddings=NUM_TOKENS, tie_word_embeddings=True, **sizes)
    return SingleEngine(SingleConfig(), LanguageModel(LlamaForCausalLM(config)), OptimConfig(lr=1e-4), 1000)


def timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def dd(directory: Path, num_bytes: int) -> float:
    """Seconds to write about `num_bytes`."""
    file = directory / "dd"
    command = ["dd", "if=/dev/zero", f"of={file}", "bs=1M", f"count={round(num_bytes / 2**20)}", "conv=fsync"]
    try:
        return timed(lambda: subprocess.run(command, check=True, capture_output=True))
    finally:
        file.unlink()


def forget(directory: Path) -> None:
    """Drop the files from the page cache, as after a restart."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how fast checkpoints are written and read.")
    parser.add_argument("--dir", type=Path, help="where to write; default: the temporary directory")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    directory = Path(tempfile.mkdtemp(prefix="checkpoint-speed-", dir=arguments.dir))
    try:
        measure(directory, arguments.rounds)
    finally:
        shutil.rmtree(directory)


def measure(directory: Path, rounds: int) -> None:
    engine = new_engine()
    tokens = np.random.default_rng(0).integers(0, 20_000, NUM_TOKENS)
    batch = OBJECTIVE.prepare([TokenExample(tokens, np.ones(NUM_TOKENS, dtype=bool))])

    def step() -> None:
        engine.step([batch], OBJECTIVE)

    step()
    store = CheckpointStore(directory / "checkpoints", keep=rounds + 2)
    path = store.save(0, engine.snapshot())
    num_bytes = verify(Checkpoint(0, path)).num_bytes
    os.sync()

    copies, saves, dds, colds, warms = [], [], [], [], []
    for round_ in range(1, rounds + 1):
        started = time.perf_counter()
        write = engine.snapshot()
        copies.append(time.perf_counter() - started)
        saves.append(timed(lambda w=write, n=round_: store.save(n, w)))
        del write
        checkpoint = store.checkpoints()[0]
        forget(checkpoint.path)
        colds.append(timed(lambda c=checkpoint: verify(c)))
        warms.append(timed(lambda c=checkpoint: verify(c)))
        dds.append(dd(directory, num_bytes))

    plain = [timed(step) for _ in range(3)]
    with AsyncSaver(store) as saver:
        blocked = timed(lambda: saver.save(1000, engine.snapshot))
        beside = []
        while not (store.directory / "step-001000").exists():
            beside.append(timed(step))

    parameters = sum(p.numel() for p in engine.model.parameters())
    print(f"{parameters / 1e6:.0f}M parameters, {num_bytes / 1e9:.2f} GB, median of {rounds} rounds\n")
    print("| what | s | GB/s |\n|---|---|---|")
    for what, seconds in {
        "CheckpointStore.save": median(saves),
        "dd bs=1M conv=fsync": median(dds),
        "verify, in the page cache": median(warms),
        "verify, from disk": median(colds),
        "snapshot (training waits)": median(copies),
        "removing a checkpoint": timed(lambda: discard(store.checkpoints()[0].path)),
    }.items():
        print(f"| {what} | {seconds:.2f} | {num_bytes / seconds / 1e9:.2f} |")
    print(
        f"\nspeed against dd: {median(dds) / median(saves):.2f}; the best rounds of both: {min(dds) / min(saves):.2f}"
    )
    print(
        f"blocked by an asynchronous save: {blocked:.2f} s; a training step of {NUM_TOKENS} tokens: {median(plain):.2f} s"
    )
    print(f"steps beside the save: {', '.join(f'{seconds:.2f}' for seconds in beside)} s")


if __name__ == "__main__":
    main()
