"""A reward from the user's own file: what it is given, and what happens when it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmscale.config import check
from llmscale.errors import ConfigError, LlmscaleError, WorkerError
from llmscale.rewards.config import FunctionConfig, OnError
from llmscale.rewards.function import FunctionReward
from tests.tiny import tokenizer, trajectory

SAMPLES = [trajectory([1, 2], [0, 1], completion=text, weight=2) for text in ("short", "rather long")]


def build(folder: Path, source: str, name: str = "reward") -> FunctionReward:
    file = folder / "mine.py"
    file.write_text(source)
    return FunctionReward(FunctionConfig(path=f"{file}:{name}"), tokenizer())


def test_gets_prompt_completion_and_fields(tmp_path: Path):
    source = "def reward(prompt, completion, fields):\n    return len(prompt) + len(completion) * fields['weight']\n"
    assert [s.value for s in build(tmp_path, source)(SAMPLES)] == [18.0, 30.0]


def test_may_use_what_else_is_in_its_file_and_return_any_number(tmp_path: Path):
    source = (
        "import numpy as np\nTABLE = {'short': 3}\ndef reward(p, c, f):\n    return np.float32(TABLE.get(c, True))\n"
    )
    result = [s.value for s in build(tmp_path, source)(SAMPLES)]
    assert result == [3.0, 1.0] and all(type(x) is float for x in result)


def test_cannot_change_the_sample(tmp_path: Path):
    build(tmp_path, "def reward(p, c, f):\n    f['weight'] = 0\n    return 0\n")(SAMPLES)
    assert SAMPLES[0].prompt.fields["weight"] == 2


FAULTS = [
    ("raise KeyError('nope')", "KeyError: 'nope'"),
    ("return None", "TypeError"),
    ("return 'high'", "ValueError"),
    ("1 / 0", "ZeroDivisionError"),
]


@pytest.mark.parametrize(("body", "message"), FAULTS)
def test_a_sample_that_cannot_be_scored_can_be_left_out(tmp_path: Path, body: str, message: str):
    (tmp_path / "mine.py").write_text(f"def reward(p, c, f):\n    if c != 'short':\n        {body}\n    return 7\n")
    config = FunctionConfig(path=f"{tmp_path}/mine.py:reward", on_error=OnError.exclude)
    good, bad = FunctionReward(config, tokenizer())(SAMPLES)
    assert (good.value, bad.value) == (7.0, None)
    assert message in bad.why and "mine.py:reward" in bad.why


@pytest.mark.parametrize(("body", "message"), FAULTS)
def test_a_sample_that_cannot_be_scored_is_an_error(tmp_path: Path, body: str, message: str):
    with pytest.raises(WorkerError, match=message) as caught:
        build(tmp_path, f"def reward(p, c, f):\n    {body}\n")(SAMPLES)
    assert "mine.py:reward" in str(caught.value.where)
    assert isinstance(caught.value.__cause__, Exception)  # the user's own traceback is in the log


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no such file: .*gone\.py") as caught:
        FunctionReward(FunctionConfig(path=f"{tmp_path}/gone.py:reward"), tokenizer())
    assert caught.value.where == "reward.path"


def test_a_missing_function_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="defines no 'score'"):
        build(tmp_path, "def reward(p, c, f):\n    return 0\n", "score")


@pytest.mark.parametrize("source", ["def reward(:\n", "import no_such_module\n", "1 / 0\n"])
def test_a_file_that_cannot_be_run_is_named(tmp_path: Path, source: str):
    with pytest.raises(LlmscaleError) as caught:
        build(tmp_path, source)
    assert caught.value.where == "reward.path" and "mine.py" in caught.value.what


@pytest.mark.parametrize("path", ["rewards.py", "rewards:f", "f"])
def test_a_path_of_another_form_is_refused(path: str):
    check(FunctionConfig(path="rewards.py:f"))
    with pytest.raises(ConfigError, match=r"FILE\.py:FUNCTION"):
        check(FunctionConfig(path=path))
