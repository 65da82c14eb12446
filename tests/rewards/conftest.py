from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from llmscale.rewards.sandbox import KINDS, Sandbox
from tests.rewards.programs import LIMITS, descendants, python_for_nobody
from tests.rewards.service import Service


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service()
    yield made
    made.close()


@pytest.fixture(scope="module", params=KINDS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """Behind either kind of walls; after each test it has to be as before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECRET", "swordfish")
        if request.param == "landlock":
            patch.setattr(sys, "executable", python_for_nobody())
        made = Sandbox(LIMITS, 1, kinds=[request.param])
    with made:
        yield made


@pytest.fixture
def launchers(sandbox: Sandbox) -> Iterator[list[int]]:
    """Its processes; there must be the same ones afterwards, and no other."""
    before = descendants(os.getpid(), "rewards.inside")
    assert len(before) == {"namespaces": 2, "landlock": 1}[sandbox.kind]
    yield before
    assert descendants(os.getpid(), "rewards.inside") == before
