"""Whether a worker lives, and what it is about, asked from outside. A thread of the worker answers while its role works; only a
process that is stopped or cut off keeps silent, or one that holds the interpreter's lock for too long.

It listens where Ray does, on the address of its node. Whoever knocks is told what the worker is doing; nothing is read.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass

from llmscale import phases

Address = tuple[str, int]


@dataclass(frozen=True)
class Sign:
    """Of life."""

    idle_s: float  # since a phase of the worker last ended
    doing: str  # the phases that it is in


class Pulse:
    """In the worker."""

    def __init__(self, host: str):
        self._socket = socket.create_server((host, 0))
        self.address: Address = self._socket.getsockname()[:2]
        threading.Thread(target=self._answer, name="pulse", daemon=True).start()

    def _answer(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            sign = Sign(time.monotonic() - phases.last_end_s(), phases.describe())
            with connection, suppress(OSError):  # whoever asked has gone
                connection.sendall(json.dumps(asdict(sign)).encode())


def ask(address: Address, timeout_s: float) -> Sign:
    """Raises: ConnectionError when there is no such process any more, another OSError when it does not answer in time."""
    with socket.create_connection(address, timeout_s) as connection:
        parts = []
        while part := connection.recv(4096):
            parts.append(part)
    if not parts:
        raise ConnectionResetError("it ended while it was asked")
    return Sign(**json.loads(b"".join(parts)))
