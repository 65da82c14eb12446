"""Errors: one message, an exit code by class, and the way between processes."""

from __future__ import annotations

import pickle

import pytest

from llmscale import errors
from llmscale.errors import ClusterError, ConfigError, LlmscaleError, NumericsError, UsageError

CLASSES = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, LlmscaleError)]
USER_MISTAKES = ["UsageError", "ConfigError", "DataError", "ModelError", "RunError"]


def test_exit_codes_are_those_of_the_design():
    expected = {c.__name__: 1 for c in CLASSES} | dict.fromkeys(USER_MISTAKES, 2) | {"ClusterError": 3, "Requeue": 75}
    assert {c.__name__: c.exit_code for c in CLASSES} == expected


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ConfigError("what"), "what"),
        (ConfigError("what", where="a.b"), "a.b: what"),
        (ConfigError("what", fix="Do this."), "what\n  Do this."),
        (ConfigError("what", where="a.b", fix="Do this."), "a.b: what\n  Do this."),
    ],
)
def test_says_where_what_and_the_way_out(error: LlmscaleError, text: str):
    assert str(error) == text


@pytest.mark.parametrize("kind", CLASSES)
def test_survives_the_way_between_processes(kind: type[LlmscaleError]):
    sent = kind("what", where="policy 3", fix="Do this.")
    received = pickle.loads(pickle.dumps(sent))
    assert type(received) is kind
    assert (received.what, received.where, received.fix) == ("what", "policy 3", "Do this.")
    assert str(received) == str(sent)


def test_one_can_be_caught_as_all():
    for error in (UsageError("a"), ClusterError("b"), NumericsError("c")):
        with pytest.raises(LlmscaleError):
            raise error
