"""Whether a worker lives, and what it is about, asked from outside. A thread of the worker answers while its role works; only a
process that is stopped or cut off keeps silent, or one that holds the interpreter's lock for too long.

It listens where Ray does, on the address of its node. Whoever knocks is told what the worker is doing. Who knows the word that
the worker has made up, and that Ray has brought to its driver, can also have a method of the role called meanwhile.
"""

from __future__ import annotations

import json
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from llmscale import phases

Address = tuple[str, int]
LISTENS_S = 1.0  # to whoever knocks
LONGEST = 4096  # bytes of what is said


@dataclass(frozen=True)
class Sign:
    """Of life."""

    idle_s: float  # since a phase of the worker last ended
    doing: str  # the phases that it is in


class Pulse:
    """In the worker."""

    def __init__(self, host: str, aside: Callable[..., Any]):
        """`aside` is called with what who knows `word` has said, in the thread that answers: it has to return at once."""
        self.word, self._aside = secrets.token_hex(16), aside
        self._socket = socket.create_server((host, 0))
        self.address: Address = self._socket.getsockname()[:2]
        threading.Thread(target=self._answer, name="pulse", daemon=True).start()

    def _answer(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            with connection, suppress(OSError):  # whoever asked has gone
                connection.settimeout(LISTENS_S)
                word, _, said = connection.makefile("rb").readline(LONGEST).partition(b" ")
                if secrets.compare_digest(word, self.word.encode()):
                    self._aside(*json.loads(said))
                sign = Sign(time.monotonic() - phases.last_end_s(), phases.describe())
                connection.sendall(json.dumps(asdict(sign)).encode())


def ask(address: Address, timeout_s: float, word: str = "", say: Any = None) -> Sign:
    """A worker that hears its own `word` does what is said.

    Raises: ConnectionError when there is no such process any more, another OSError when it does not answer in time."""
    with socket.create_connection(address, timeout_s) as connection:
        connection.sendall(f"{word} {json.dumps(say)}\n".encode())
        answer = connection.makefile("rb").read()
    if not answer:
        raise ConnectionResetError("it ended while it was asked")
    return Sign(**json.loads(answer))
