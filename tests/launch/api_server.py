"""A stand-in for an API server of Kubernetes, over HTTP on loopback: objects of two kinds, pods and their logs. It can be told
to answer the next requests otherwise, and it keeps what it was asked."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

OBJECT = re.compile(
    r"/apis/(?:ray\.io/v1|jobset\.x-k8s\.io/v1alpha2)/namespaces/([\w-]+)/(rayjobs|jobsets)(?:/([\w-]+))?"
)
POD = re.compile(r"/api/v1/namespaces/([\w-]+)/pods(?:/([\w.-]+)/log)?")
TOKEN = "token-of-a-user"
NAMESPACE = "llmscale"
BREAKS, SLOW = -1, -2  # in place of a status: a connection that breaks off, an answer that does not come in time
SLOW_S = 1.0


@dataclass
class Cluster:
    objects: dict[str, dict[str, Any]] = field(default_factory=dict)  # plural/name
    pods: list[dict[str, Any]] = field(default_factory=list)
    logs: dict[str, list[str]] = field(default_factory=dict)  # of a pod, each line after a second of its own
    next_answers: list[int] = field(default_factory=list)  # statuses, one a request
    retry_after_s: str | None = None
    asked: list[str] = field(default_factory=list)  # METHOD path?query

    def add_pod(self, name: str, role: str, phase: str, *lines: str, **status: Any) -> None:
        labels = {"llmscale/run": name.rpartition(".")[0] or name, "llmscale/role": role}
        self.pods.append({"metadata": {"name": name, "labels": labels}, "status": {"phase": phase, **status}})
        self.logs[name] = list(lines)

    def only(self) -> dict[str, Any]:
        (made,) = self.objects.values()
        return made


@contextmanager
def serving(folder: Path) -> Iterator[Cluster]:
    """Writes folder/kubeconfig, whose contexts are `here` and, with a token that nobody knows, `stranger`."""
    cluster = Cluster()
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: _Handler(cluster, *args))
    thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    users = {"here": TOKEN, "stranger": "another"}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "users": [{"name": name, "user": {"token": token}} for name, token in users.items()],
        "contexts": [{"name": name, "context": {"cluster": "c", "user": name}} for name in users],
    }
    (folder / "kubeconfig").write_text(yaml.safe_dump(config))
    try:
        yield cluster
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, cluster: Cluster, *args: Any):
        self.cluster = cluster
        super().__init__(*args)

    def log_message(self, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.cluster.asked.append(f"{self.command} {self.path}")
        planned = self.cluster.next_answers.pop(0) if self.cluster.next_answers else 0
        if planned == SLOW:
            time.sleep(SLOW_S)
        if planned > 0:
            return self._fail(planned, "as planned")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._fail(401, "Unauthorized")
        url = urlsplit(self.path)
        answer = self._object(url.path, json.loads(body or b"null")) or self._pods(url.path, parse_qs(url.query))
        status, given = answer or (404, "the server could not find the requested resource")
        if status >= 400:
            return self._fail(status, given)
        text = given if isinstance(given, str) else json.dumps(given)
        self._answer(status, text, "text/plain" if isinstance(given, str) else "application/json", planned == BREAKS)

    do_GET = do_POST = do_DELETE = _handle

    def _object(self, path: str, body: Any) -> tuple[int, Any] | None:
        if not (found := OBJECT.fullmatch(path)):
            return None
        namespace, plural, name = found.groups()
        objects = self.cluster.objects
        if namespace != NAMESPACE and self.command == "POST":
            return 404, f'namespaces "{namespace}" not found'
        if self.command == "POST":
            key = f"{plural}/{body['metadata']['name']}"
            if key in objects:
                return 409, f"{key} already exists"
            objects[key] = body
            return 201, body
        key = f"{plural}/{name}"
        if key not in objects:
            return 404, f"{key} not found"
        return 200, objects.pop(key) if self.command == "DELETE" else objects[key]

    def _pods(self, path: str, query: dict[str, list[str]]) -> tuple[int, Any] | None:
        if not (found := POD.fullmatch(path)):
            return None
        if found[2]:
            begun = [f"2026-01-01T00:00:{n:02}Z {line}\n" for n, line in enumerate(self.cluster.logs[found[2]])]
            return 200, "".join(begun)
        key, _, value = query["labelSelector"][0].partition("=")
        chosen = [pod for pod in self.cluster.pods if pod["metadata"]["labels"].get(key) == value]
        if self.command == "DELETE":
            self.cluster.pods = [pod for pod in self.cluster.pods if pod not in chosen]
        return 200, {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": chosen}

    def _fail(self, status: int, message: str) -> None:
        said = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": status}
        self._answer(status, json.dumps(said), "application/json", False)

    def _answer(self, status: int, text: str, kind: str, breaks: bool) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        if self.cluster.retry_after_s is not None and status >= 400:
            self.send_header("Retry-After", self.cluster.retry_after_s)
        with suppress(ConnectionError):  # who asked has not waited
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if breaks else data)
        if breaks:
            self.close_connection = True
