"""Two ranks with gloo, as torchrun starts them: one of them is told to stop, and all of them do, at the same step."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

from tests.stages.ranks import Ranks, ranks_arguments
from tests.stages.runs import DEADLINE_S, num_lines, records, weights, without_times


def test_all_ranks_stop_at_the_step_that_one_was_told(chain: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Rank 1 alone gets the signal; then the stopped run equals an undisturbed one, bit for bit."""
    argv = ranks_arguments(chain, tmp_path, "training.save_every_steps=1000")
    run_dir = tmp_path / "demo" / "sft"
    ranks = Ranks(argv, tmp_path)
    deadline = time.monotonic() + DEADLINE_S
    while num_lines(run_dir / "metrics.jsonl") < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    ranks.processes[1].send_signal(signal.SIGTERM)
    assert ranks.wait() == [75, 75], ranks.said()
    steps = [re.search(r"^stopped and saved at step (\d+);", log.read_text(), re.MULTILINE) for log in ranks.logs]
    assert all(steps) and len({step[1] for step in steps if step}) == 1
    assert (run_dir / "checkpoints" / f"step-{int(steps[0][1]):06d}").exists()  # type: ignore[index]

    resumed = Ranks(argv, tmp_path)
    assert resumed.wait() == [0, 0], resumed.said()
    assert weights(run_dir) == weights(undisturbed)
    own, other = (without_times(records(d / "metrics.jsonl")) for d in (run_dir, undisturbed))
    assert own == other


def test_a_rank_that_is_gone_during_a_save_is_not_waited_for(chain: Path, tmp_path: Path) -> None:
    """Rank 0 writes in the background, and waits there for the other's part, when its own collective has no answer."""
    rarely = ["training.num_steps=2000", "training.save_every_steps=200"]  # the next save would wait for this one
    argv = ranks_arguments(chain, tmp_path, "cluster.collective_timeout_s=20", *rarely)
    ranks = Ranks([*argv, "--plugin", "tests.stages.slow_disk"], tmp_path)
    try:
        checkpoints = tmp_path / "demo" / "sft" / "checkpoints"
        ranks.until(lambda: any(checkpoints.glob("*/.written-00000")))
        ranks.processes[1].send_signal(signal.SIGSTOP)
        assert ranks.processes[0].wait(120) == 1, ranks.said()
        assert "error: trainer 0: lost contact with the other ranks" in ranks.logs[0].read_text()
    finally:
        ranks.kill()
