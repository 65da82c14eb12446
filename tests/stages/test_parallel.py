"""A whole stage on two ranks that share the matrices of each layer, or each sequence: killed, resumed and exported, with the
numbers of one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stages.ranks import Ranks
from tests.stages.runs import arguments, from_chain, records, succeed
from tests.stages.test_on_ray import weight_difference

SHARED = {
    "sft": "engine.tensor_parallel_size=2",
    "pretrain": "engine.sequence_parallel_size=2",
}


@pytest.mark.slow  # a step of each is in tests/engine/test_conformance.py
@pytest.mark.parametrize("stage", SHARED)
def test_ranks_that_share_a_model_give_the_numbers_of_one_process(stage: str, chain: Path, tmp_path: Path) -> None:
    longer = [*from_chain(stage, chain), "training.num_steps=20", "training.eval_every_steps=10"]
    one = tmp_path / "one"
    succeed(arguments(stage, one, *longer), tmp_path / "one.log")
    reference = one / "demo" / stage

    argv = arguments(stage, tmp_path, *longer, "engine=deepspeed", SHARED[stage])
    argv = [a for a in argv if a != "engine=single"]
    run_dir = tmp_path / "demo" / stage
    killed = Ranks(argv, tmp_path)
    killed.until((run_dir / "checkpoints" / "step-000004").exists)
    killed.kill()
    assert not (run_dir / "result.json").exists()
    resumed = Ranks(argv, tmp_path)
    assert resumed.wait() == [0, 0], resumed.said()
    assert next(e["step"] for e in records(run_dir / "events.jsonl") if e["kind"] == "resumed") >= 4

    for own, other in zip(records(run_dir / "metrics.jsonl"), records(reference / "metrics.jsonl"), strict=True):
        for name in {"train/loss", "eval/loss", "train/grad_norm"} & other.keys():
            assert own[name] == pytest.approx(other[name], rel=1e-4), name
    assert weight_difference(run_dir, reference) < 1e-4
    if stage == "pretrain":  # shared matrices are joined by their engine alone
        succeed(["checkpoint", "export", str(run_dir), str(tmp_path / "exported" / "hf")], tmp_path / "export.log")
        assert weight_difference(run_dir, tmp_path / "exported") == 0
