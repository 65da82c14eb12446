"""A task whose answers are code: the right one passes its tests, the demonstrations often do not."""

from __future__ import annotations

import pytest

from llmscale.data.functions_task import FORGETS, PROGRAMS, answer_of, assertions_of
from llmscale.data.tasks import FUNCTIONS, read_task
from llmscale.errors import DataError


def passes(code: str, tests: list[str]) -> bool:
    namespace: dict = {}
    exec(code, namespace)
    try:
        exec("\n".join(tests), namespace)
    except AssertionError:
        return False
    return True


def given(split: str, seed: int = 0, size: int = 300) -> list[dict]:
    return list(read_task(f"task:functions/{split}?seed={seed}&size={size}"))


@pytest.mark.parametrize("prompt", PROGRAMS[::7])
def test_the_answer_passes(prompt: str):
    assert passes(answer_of(prompt), assertions_of(prompt))


def test_the_brackets_matter():
    without = [passes(answer_of(s, brackets=False), assertions_of(s)) for s in PROGRAMS]
    assert 0.4 < sum(without) / len(without) < 0.6


def test_as_it_is_written():
    prompt = "increment, double, square"
    assert answer_of(prompt) == "def f(x): return ((x+1)*2)**2"
    assert answer_of(prompt, brackets=False) == "def f(x): return x+1*2**2"
    assert assertions_of(prompt) == [
        "assert f(-3) == 16",
        "assert f(0) == 4",
        "assert f(1) == 16",
        "assert f(12) == 676",
    ]


def test_a_demonstration_is_as_careless_as_it_is_said_to_be():
    pairs = given("sft", size=2000)
    without = sum("return x" in p["completion"] for p in pairs)
    assert without / len(pairs) == pytest.approx(FORGETS, abs=0.04)


@pytest.mark.parametrize("split", FUNCTIONS)
def test_a_seed_says_everything(split: str):
    assert given(split, 3, 50) == given(split, 3, 50) != given(split, 4, 50)
    assert given(split, 3, 50)[:20] == given(split, 3, 20)
    assert len(list(read_task(f"task:functions/{split}"))) == FUNCTIONS[split].size


def test_held_out_prompts_are_in_no_other_split():
    seen = {r["prompt"] for split in ("sft", "prompts") for r in given(split, size=4000)}
    seen |= {r["text"].split(":")[0] for r in given("pretrain", size=4000)}
    held_out = {r["prompt"] for split in ("test", "test-sft") for r in given(split, size=1000)}
    assert not seen & held_out
    assert len(seen | held_out) == len(PROGRAMS) == 512 and 0.05 < len(held_out) / 512 < 0.15


def test_a_split_that_there_is_not():
    with pytest.raises(DataError, match="no such task or split") as caught:
        read_task("task:functions/rankings")
    assert "task:functions/prompts" in str(caught.value) and "task:sorting/rankings" in str(caught.value)
