"""Code out of a completion, tests out of a record, and the reward for passing them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from llmscale.config import check
from llmscale.errors import ConfigError, DataError
from llmscale.rewards.code import CodeReward, extract_code, split_tests
from llmscale.rewards.config import CodeConfig
from llmscale.rewards.inside.limits import Reason
from llmscale.rl.admission import means_of_parts
from tests.tiny import tokenizer, trajectory

TESTS = ["assert f(1) == 2", "assert f(2) == 3", "assert f(5) == 6", "assert f(-1) == 0"]
NETWORK = "import socket\ndef f(x):\n    if x == 5: socket.socket()\n    return x + 1"
COMPLETIONS = {  # completion -> reward for all of the tests, and for each
    "def f(x): return x + 1": (1.0, 1.0),
    "Sure:\n```python\ndef f(x):\n    return x + 1\n```\nThat is it.": (1.0, 1.0),
    "def f(x): return 2": (0.0, 0.25),
    "def f(x): return abs(x) + 1": (0.0, 0.75),
    "I do not know": (0.0, 0.0),
    "import os; os._exit(0)": (0.0, 0.0),
    "def f(x):\n    while x == 5: pass\n    return x + 1": (0.0, 0.5),  # those before it ran out of time
    NETWORK: (0.0, 0.0),  # what it passed before does not count
}


def samples(tests: Any = TESTS) -> list[Any]:
    return [trajectory([1, 2], [0, 1], draw_id=i, completion=c, tests=tests) for i, c in enumerate(COMPLETIONS)]


def reward(**options: Any) -> CodeReward:
    config = CodeConfig(**{"timeout_s": 3.0, "num_workers": 2, **options})
    check(config)
    return CodeReward(config, tokenizer())


@pytest.fixture(params=[False, True], ids=["all", "partial"])
def scored(request: pytest.FixtureRequest) -> Iterator[tuple[bool, CodeReward]]:
    made = reward(partial=request.param)
    yield request.param, made
    made.sandbox.close()


def test_reward_and_reasons(scored: tuple[bool, CodeReward], caplog: pytest.LogCaptureFixture):
    partial, function = scored
    with caplog.at_level(logging.INFO):
        scores = function(samples())
    assert [s.value for s in scores] == [pair[partial] for pair in COMPLETIONS.values()]
    expected = {Reason.passed: 2, Reason.failed: 3, Reason.syntax: 1, Reason.timeout: 1, Reason.network: 1}
    shares = {f"reward/code_{reason.name}": expected.get(reason, 0) / 8 for reason in Reason}
    assert means_of_parts(scores) == shares
    assert [r.reason.name for r in function.results][-2:] == ["timeout", "network"]
    assert [r.getMessage() for r in caplog.records] == [
        "draw 6, sample 0: timeout: after 3 s",
        "draw 7, sample 0: network: socket of family 2",
    ]
    assert function([]) == []


def test_tests_as_one_text():
    function = reward(column="check", partial=True)
    given = "value = 1\nassert f(value) == 2\nvalue = f(value)\nassert value == 3"
    sample = trajectory([1, 2], [0, 1], completion="def f(x): return x + 1", check=given)
    assert [s.value for s in function([sample])] == [0.5]
    function.sandbox.close()


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ("assert f(1 ==", "cannot be run"),
        ([], "there are none"),
        ("", "there are none"),
        (["  "], "there are none"),
        ("# nothing\n", "there are none"),
        ([1], "they are list"),
        (None, "they are NoneType"),
        (["assert f(1) == 2", "x ="], "cannot be run"),
        ("return 1", "cannot be run"),
    ],
)
def test_a_record_without_tests_that_can_run_is_an_error(tests: Any, message: str):
    """Never a silent zero, and above all never a one."""
    function = reward()
    with pytest.raises(DataError, match=message) as caught:
        function(samples(tests))
    assert caught.value.where == "draw 0, column 'tests'"
    function.sandbox.close()


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("x = 1", "x = 1"),
        ("```python\nx = 1\n```", "x = 1\n"),
        ("```py\nx = 1\n```", "x = 1\n"),
        ("``` python\nx = 1\n```", "x = 1\n"),
        ("First\n```\na\n```\nthen\n```\nb\n```\n", "b\n"),
        ("```python\na\n```\n```python\nb\n```", "b\n"),
        ("```python\na\n```\nwhich prints\n```\n1\n```", "a\n"),
        ("```python\na\n```\nrun it:\n```sh\npython a.py\n```", "a\n"),
        ("```python\nx = '''\n``` not a fence'''", "x = '''\n"),
        ("Here:\n```python\nx = 1\ny =", "x = 1\ny ="),  # cut off at the length limit
        ("```python title=a.py\nx = 1\n```", "x = 1\n"),
        ("1. So:\n   ```python\n   x\n   ```\n", "   x\n"),
        ("", ""),
    ],
)
def test_code_of_a_completion(completion: str, code: str):
    assert extract_code(completion) == code


@pytest.mark.parametrize(
    ("given", "tests"),
    [
        ("assert f(1) == 2", ["assert f(1) == 2"]),
        ("assert a\nassert b", ["assert a", "assert b"]),
        ("import math\nx = 2\nassert f(x)\nassert g", ["import math\nx = 2\nassert f(x)", "assert g"]),
        ("def check(f):\n    assert f(1)\ncheck(f)", ["def check(f):\n    assert f(1)\ncheck(f)"]),
        ("assert a\ncleanup()", ["assert a", "cleanup()"]),
        (["import math", "assert f(1)", ""], ["import math", "assert f(1)"]),
        (("assert a",), ["assert a"]),
    ],
)  # fmt: skip
def test_tests_of_a_record(given: Any, tests: list[str]):
    assert list(split_tests(given)) == tests


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("timeout_s", 0.0),
        ("timeout_s", float("inf")),
        ("memory_bytes", 2**20),
        ("max_processes", -1),
        ("output_bytes", 0),
        ("files_bytes", 0),  # to tmpfs: without limit
        ("num_workers", 0),
    ],
)
def test_limits_that_are_none_are_refused(field: str, value: float):
    check(CodeConfig())
    with pytest.raises(ConfigError) as caught:
        check(CodeConfig(**{field: value}))
    assert caught.value.where == field


def test_the_least_memory_that_is_allowed_is_enough():
    function = reward(memory_bytes=64 * 2**20, max_processes=0, files_bytes=2**16, output_bytes=1)
    assert [s.value for s in function(samples()[:2])] == [1.0, 1.0]
    function.sandbox.close()
