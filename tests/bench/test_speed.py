"""The harness itself: those that are compared see the same samples, and what they took is what is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmscale.models.loading import load_tokenizer
from tests.bench.rlhf_contenders import prompts_of
from tests.bench.samples import drawn_prompts, prepare
from tests.bench.speed import BARE, GROUPS, SINGLE, table, verdicts
from tests.bench.turns import Contender, Turn, measure

SAMPLED = ("generate", "generate100", "grpo", "grpo30", "ppo")


def turn(seconds: float, tokens: int = 100, peak_bytes: int = 100 << 20) -> Turn:
    return Turn(tokens, seconds, 2 * seconds, (1.5, 1.4), peak_bytes, start_bytes=1 << 20)


def test_a_ratio_is_the_median_of_neighbouring_turns_without_the_first():
    reference, own = Contender(BARE, ()), Contender(SINGLE, (), {BARE: 1.2})
    turns = {
        reference: [turn(9), turn(1), turn(2), turn(4)],  # a machine that grows busier
        own: [turn(1), turn(1), turn(1, peak_bytes=90 << 20), turn(2, peak_bytes=110 << 20)],
    }
    row = next(line for line in table(GROUPS["pretrain"], turns) if line.startswith(f"| {SINGLE}"))
    assert [cell.strip() for cell in row.split("|")[2:6]] == ["100", "2.00", "1.00-2.00", "2.00"]
    assert "110 MiB (1 at start) | 1.10" in row
    assert verdicts(turns) == [
        f"- {SINGLE}: 2.00 of {BARE}, at least 1.2 wanted: reached",
        f"- {SINGLE}: 1.10 of its memory, at most 1.05 wanted: missed",
    ]


def test_the_best_of_trl_is_found():
    slow, fast, bare = (Contender(title, ()) for title in ("TRL as it comes", "TRL, better", BARE))
    own = Contender(SINGLE, (), {"the best of TRL": 1.5})
    turns = {slow: [turn(4)] * 3, fast: [turn(2)] * 3, bare: [turn(0.5)] * 3, own: [turn(1)] * 3}
    assert verdicts(turns) == [f"- {SINGLE}: 2.00 of TRL, better, at least 1.5 wanted: reached"]


@pytest.mark.bench
@pytest.mark.realdata
@pytest.mark.parametrize("group", GROUPS)
def test_all_of_them_train_on_the_same_samples(tmp_path: Path, shared_data: Path, group: str):
    pytest.importorskip("trl")
    prepare(tmp_path, shared_data, num_steps=8)
    if any(c.packages is not None and not c.packages.is_dir() for c in GROUPS[group].contenders):
        pytest.skip("`make bench` installs what this compares with")
    turns = measure(GROUPS[group].contenders, 1, 2, tmp_path, shared_data)
    assert all(own[-1].tokens > 0 for own in turns.values())
    if group in SAMPLED:  # what is learned from is drawn by each itself, from prompts that are the same
        tokenizer = load_tokenizer(f"{tmp_path}/lm")
        theirs = [ids for rows in prompts_of(tmp_path, tokenizer) for ids in rows[::8]]
        assert theirs == [p.token_ids.tolist() for p in drawn_prompts(tmp_path, shared_data, num_steps=8)]
        return
    losses = {contender.title: own[0].losses[0] for contender, own in turns.items()}
    reference = next(iter(losses.values()))
    for title, loss in losses.items():
        in_order = "packing" not in title and "packed" not in title and "like length" not in title
        assert loss == pytest.approx(reference, rel=1e-3 if in_order else 0.05), title
