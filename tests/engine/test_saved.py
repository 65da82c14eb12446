"""The weights of a checkpoint without the engine that wrote it: of every engine, at one and two ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llmscale.engine.config import SingleConfig
from llmscale.engine.saved import saved_buckets
from llmscale.engine.single import SingleEngine
from llmscale.errors import CheckpointError
from llmscale.optim.config import OptimConfig
from tests.engine.conftest import Results
from tests.engine.scenarios import BUCKET_BYTES
from tests.tiny import language_model, scalar_model

ROOT = Path(__file__).parents[2]


def saved(checkpoint: Path, new_model: Callable[[], nn.Module]) -> dict[str, Tensor]:
    with torch.device("meta"):
        model = new_model()
    weights: dict[str, Tensor] = {}
    for bucket in saved_buckets(checkpoint, model, BUCKET_BYTES):
        assert len(bucket) == 1 or sum(value.nbytes for value in bucket.values()) <= BUCKET_BYTES
        weights |= bucket
    return weights


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_engine_saves_the_weights_of_the_reference(results: Results, single: Results, precision: str):
    if results.folder.name == "tensor":
        with pytest.raises(CheckpointError, match="its ranks shared matrices"):
            saved(results.folder / f"checkpoint_{precision}", language_model)
        return
    expected = saved(single.folder / f"checkpoint_{precision}", language_model)
    weights = saved(results.folder / f"checkpoint_{precision}", language_model)
    assert list(weights) == [name for name, _ in language_model().named_parameters()]
    for name, value in weights.items():
        assert value.dtype == torch.float32
        difference = (value - expected[name]).norm() / expected[name].norm()
        assert difference < (1e-4 if precision == "fp32" else 0.1), name


@pytest.mark.parametrize("kind", [lambda: language_model(tie=False), scalar_model])
def test_they_are_the_engines_own(tmp_path: Path, kind):
    model = kind()
    SingleEngine(SingleConfig(), model, OptimConfig(), 1).snapshot()(tmp_path)
    weights = saved(tmp_path, kind)
    assert weights.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(weights[name], parameter), name


@pytest.mark.parametrize("key", ["weight", "average"])
def test_pieces_of_several_ranks_are_joined_and_the_average_goes_first(tmp_path: Path, key: str):
    """Each rank's file holds ranges of flattened parameters, and what the optimizer keeps beside them."""
    model = language_model(tie=False)
    for rank in (1, 0):
        held, said = {}, {}
        for name, parameter in model.named_parameters():
            flat, middle = parameter.detach().flatten(), parameter.numel() // 3
            start, part = (0, flat[:middle]) if rank == 0 else (middle, flat[middle:])
            held |= {f"{name}|weight": part.clone(), f"{name}|exp_avg": part + 7}
            if key == "average":
                held |= {f"{name}|weight": part + 9, f"{name}|average": part.clone()}
            said[name] = {"shape": list(parameter.shape), "start": start, "numbers": {"step": 8}}
        metadata = {"num_steps": "8", "parameters": json.dumps(said)}
        save_file(held, tmp_path / f"state-{rank:05d}-of-00002.safetensors", metadata)
    weights = saved(tmp_path, lambda: language_model(tie=False))
    for name, parameter in model.named_parameters():
        assert torch.equal(weights[name], parameter), name


PEAK = """
import re, sys
from pathlib import Path
import torch
from llmscale.engine.saved import saved_buckets

with torch.device("meta"):
    model = torch.nn.Sequential(*(torch.nn.Linear(1 << 10, 1 << 10, bias=False) for _ in range(32)))
# Of this program alone: ru_maxrss starts as that of the one that started it.
peak_mb = lambda: int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) >> 10
before = peak_mb()
for bucket in saved_buckets(Path(sys.argv[1]), model, 8 << 20):
    assert len(bucket) == 2 and all(value.sum() == value.numel() for value in bucket.values())
    del bucket
print(peak_mb() - before)
"""


def test_a_bucket_is_all_that_is_read_at_a_time(tmp_path: Path):
    held = {f"{i}.weight|weight": torch.ones(1 << 20) for i in range(32)}
    said = {f"{i}.weight": {"shape": [1 << 10, 1 << 10], "start": 0, "numbers": {}} for i in range(32)}
    metadata = {"num_steps": "1", "parameters": json.dumps(said)}
    save_file(held, tmp_path / "state-00000-of-00001.safetensors", metadata)
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert int(done.stdout) < 64, done.stderr  # MiB, of 128


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (
            lambda: language_model(vocab_size=48),
            r"embed_tokens\.weight is \[64, 32\] in this checkpoint and \[48, 32\] in",
        ),
        (lambda: language_model(tie=False), r"hf\.lm_head\.weight is not in this checkpoint"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, other, what: str):
    SingleEngine(SingleConfig(), language_model(), OptimConfig(), 1).snapshot()(tmp_path)
    with pytest.raises(CheckpointError, match=what) as caught:
        saved(tmp_path, other)
    assert caught.value.where == str(tmp_path)


def test_a_checkpoint_of_an_earlier_version_is_refused(tmp_path: Path):
    save_file({"hf.lm_head.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no files state-"):
        saved(tmp_path, language_model)
