"""A real HTTP server on 127.0.0.1 that scores, and misbehaves as it is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Behaviour = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


def answer(handler: BaseHTTPRequestHandler, body: Any, status: int = 200, **headers: str) -> None:
    """Send a JSON value, or bytes as they are."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(raw)))
    handler.end_headers()
    handler.wfile.write(raw)


def by_length(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """The number of characters of each completion."""
    answer(handler, {"scores": [float(len(s["completion"])) for s in body["samples"]]})


class Service:
    """Each request is answered by the next of `script`, and by `behaviour` when that is used up."""

    def __init__(self) -> None:
        self.behaviour: Behaviour = by_length
        self.script: list[Behaviour] = []
        self.requests: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.released = threading.Event()  # what hangs, hangs until this is set
        lock = threading.Lock()
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    service.requests.append((dict(self.headers), body))
                    behave = service.script.pop(0) if service.script else service.behaviour
                behave(self, body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/score"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
