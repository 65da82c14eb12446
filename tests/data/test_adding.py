"""The task of adding step by step: its labels, its errors, and what is held out."""

from __future__ import annotations

import pytest

from llmscale.data.adding import right_steps, steps_of, terms_of
from llmscale.data.tasks import ADDING, read_task


def records(split: str, size: int, seed: int = 0) -> list[dict]:
    return list(read_task(f"task:adding/{split}?seed={seed}&size={size}"))


def subject_of(record: dict) -> str:
    return record.get("prompt", record.get("text", "").split("\n")[0]).removeprefix("add ")


def value(side: str) -> int:
    a, b = side.split("+")
    return int(a) + int(b)


def test_a_right_solution_ends_in_the_sum():
    for record in records("prompts", 300):
        steps = steps_of(subject_of(record))
        assert steps[-1].endswith(f"={record['answer']}") and int(record["answer"]) == sum(terms_of(subject_of(record)))
        assert right_steps(subject_of(record), steps) == [True] * len(steps)


def test_a_step_is_judged_by_itself():
    assert right_steps("2+3+4", ["2+3=5", "5+4=8"]) == [True, False]
    assert right_steps("2+3+4", ["2+3=6", "6+4=10"]) == [False, True]  # goes on rightly from what was wrong
    assert right_steps("2+3+4", ["2+3=5"]) == [False]  # stops too early
    assert right_steps("2+3+4", ["2+3=5", "5+4=9", "9+1=10"]) == [True, False, False]  # does not stop
    assert right_steps("2+3+4", ["3+2=5", "x"]) == [False, False]


def test_labels_are_true():
    """All steps right if and only if the last line ends in the sum without an error on the way."""
    seen = set()
    for record in records("solutions", 500):
        wrong = [line for line in record["steps"] if value(line.split("=")[0]) != int(line.split("=")[1])]
        right = record["steps"] == steps_of(subject_of(record))
        assert all(record["labels"]) == right and (not wrong or not all(record["labels"]))
        assert len(record["labels"]) == len(record["steps"])
        seen.add(tuple(record["labels"]))
    assert len(seen) > 6


def test_demonstrations_err():
    right = [r["completion"].split("\n") == steps_of(subject_of(r)) for r in records("sft", 2000)]
    assert 0.5 < sum(right) / len(right) < 0.75


@pytest.mark.parametrize("test", [split for split in ADDING if split.startswith("test")])
def test_no_training_split_has_a_sum_of_a_test_split(test):
    held_out = {subject_of(r) for r in records(test, 500)}
    for split in ADDING:
        if not split.startswith("test"):
            assert not held_out & {subject_of(r) for r in records(split, 3000)}


@pytest.mark.parametrize("split", ADDING)
def test_a_seed_says_everything(split):
    assert records(split, 30, seed=3) == records(split, 30, seed=3) != records(split, 30, seed=4)
    assert len(list(read_task(f"task:adding/{split}"))) == ADDING[split].size
