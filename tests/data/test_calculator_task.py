"""The task of products that need a calculator: its answers, its errors, and what is held out."""

from __future__ import annotations

import pytest

from llmscale.data.tasks import CALCULATOR, read_task


def records(split: str, size: int, seed: int = 0) -> list[dict]:
    return list(read_task(f"task:calculator/{split}?seed={seed}&size={size}"))


def subject_of(record: dict) -> str:
    if "text" in record:
        return record["text"].partition(":")[0]
    return record["messages"][0]["content"] if "messages" in record else record["prompt"]


def test_answers_are_right():
    found = records("prompts", 300)
    assert all(int(r["answer"]) == eval(subject_of(r)) for r in found)  # a product that we made
    assert all(len(r["answer"]) == 4 for r in found)


def test_demonstrations_ask_or_guess_and_what_they_are_told_is_what_they_asked():
    asked = mistyped = guessed_right = 0
    found = records("sft", 2000)
    for record in found:
        _, first, *rest = record["messages"]
        assert [m["role"] for m in record["messages"]] == ["user", "assistant", "user", "assistant"][: 2 + len(rest)]
        if rest:
            expression = first["content"].removeprefix("calc ")
            told, said = rest
            assert told["content"] == said["content"] == str(eval(expression))
            asked, mistyped = asked + 1, mistyped + (expression != subject_of(record))
        else:
            guessed_right += int(first["content"]) == eval(subject_of(record))
    assert 0.45 < asked / len(found) < 0.55 and 0.1 < mistyped / asked < 0.2
    assert guessed_right == 0


@pytest.mark.parametrize("test", [split for split in CALCULATOR if split.startswith("test")])
def test_no_training_split_has_a_product_of_a_test_split(test):
    held_out = {subject_of(r) for r in records(test, 500)}
    assert all("*" in subject for subject in held_out)
    for split in CALCULATOR:
        if not split.startswith("test"):
            assert not held_out & {subject_of(r) for r in records(split, 3000)}


@pytest.mark.parametrize("split", CALCULATOR)
def test_a_seed_says_everything(split):
    assert records(split, 30, seed=3) == records(split, 30, seed=3) != records(split, 30, seed=4)
    assert len(list(read_task(f"task:calculator/{split}"))) == CALCULATOR[split].size
