"""A process that works answers, one that is stopped keeps silent, one that has ended is known to be gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from llmscale.cluster.pulse import ask
from tests.conftest import ROOT

WORKER = """
from llmscale.cluster.pulse import Pulse
from llmscale.phases import phase

with phase("update"):
    pass
pulse = Pulse("127.0.0.1", lambda *said: print(*said, flush=True))
with phase("generate", "unit 3"):
    print(pulse.address[1], pulse.word, flush=True)
    while True:
        sum(range(10**6))
"""


def test_a_worker_answers_unless_it_is_stopped_or_gone() -> None:
    worker = subprocess.Popen([sys.executable, "-c", WORKER], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert worker.stdout is not None
        port, word = worker.stdout.readline().split()
        address = ("127.0.0.1", int(port))
        sign = ask(address, 20.0)
        assert 0 <= sign.idle_s < 20 and sign.doing.startswith("generate (unit 3), for ")
        ask(address, 20.0, "another", ["interrupt", 4])
        ask(address, 20.0, word, ["interrupt", 5])
        assert worker.stdout.readline() == "interrupt 5\n", "who does not know the word is not heard"
        os.kill(worker.pid, signal.SIGSTOP)
        os.waitpid(worker.pid, os.WUNTRACED)  # on a busy machine it runs on for a moment
        with pytest.raises(TimeoutError):
            ask(address, 0.5)
        os.kill(worker.pid, signal.SIGCONT)
        ask(address, 20.0)
        worker.kill()
        worker.wait()
        with pytest.raises(ConnectionError):
            ask(address, 20.0)
    finally:
        worker.kill()
        worker.wait()
