"""The HTTP reward against a real server on this machine: what is asked, what is read, and every way not to answer."""

from __future__ import annotations

import datetime
import math
import socket
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from llmscale.batch import Trajectory
from llmscale.config import check
from llmscale.errors import ConfigError
from llmscale.protocols import Score
from llmscale.rewards.config import HttpConfig
from llmscale.rewards.http import HttpReward
from tests.rewards.service import Service, answer, by_length
from tests.tiny import tokenizer, trajectory

QUICK = {"backoff_s": 0.01, "timeout_s": 0.5}


def samples(*completions: str, **fields: Any) -> list[Trajectory]:
    return [
        trajectory([1, 2], [0, 1], draw_id=7, sample_index=i, completion=c, **fields) for i, c in enumerate(completions)
    ]


def ask(url: str, trajectories: Sequence[Trajectory], **settings: Any) -> list[Score]:
    config = HttpConfig(url=url, **(QUICK | settings))
    check(config)
    return HttpReward(config, tokenizer())(trajectories)


def status(code: int, **headers: str):
    return lambda handler, body: answer(handler, {"no": "thing"}, code, **headers)


def test_what_is_asked_and_in_what_batches(service: Service):
    found = ask(service.url, samples("a", "bb", "ccc", when=datetime.date(2024, 1, 31), answer=1), batch_size=2)
    assert [s.value for s in found] == [1.0, 2.0, 3.0]
    headers, body = service.requests[0]
    assert [len(b["samples"]) for _, b in service.requests] == [2, 1]
    assert headers["Content-Type"] == "application/json" and "Authorization" not in headers
    assert body["samples"][1] == {
        "id": "7/1", "prompt": "a prompt", "completion": "bb", "finished": True, "fields": {"when": "2024-01-31", "answer": 1}
    }  # fmt: skip


def test_the_token_comes_from_the_environment_alone(service: Service, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MY_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="MY_TOKEN is not set") as caught:
        ask(service.url, [], token_env="MY_TOKEN")
    assert caught.value.where == "reward.token_env"
    monkeypatch.setenv("MY_TOKEN", "secret\n")
    ask(service.url, samples("a"), token_env="MY_TOKEN")
    assert service.requests[0][0]["Authorization"] == "Bearer secret"


def test_each_sample_has_its_own_fate(service: Service):
    entries = [
        1,
        None,
        {"error": "too long"},
        {"value": 2.5, "parts": {"tone": 1, "x": "y"}},
        "high",
        True,
        {"value": None},
        [1],
    ]
    service.behaviour = lambda handler, body: answer(handler, {"scores": entries})
    found = ask(service.url, samples(*"abcdefgh"))
    assert [s.value for s in found] == [1.0, None, None, 2.5, None, None, None, None]
    assert found[3].parts == {"tone": 1.0}
    assert found[2].why == "too long" and "'high'" in found[4].why
    assert all(s.why for s in found if s.value is None)


def test_nan_and_infinity_are_passed_on(service: Service):
    """The run's on_nonfinite decides about them."""
    service.behaviour = lambda handler, body: answer(handler, b'{"scores": [NaN, Infinity, -1e999]}')
    found = [s.value for s in ask(service.url, samples("a", "b", "c"))]
    assert math.isnan(found[0] or 0) and found[1:] == [math.inf, -math.inf]


@pytest.mark.parametrize("code", [408, 425, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(service: Service, code: int):
    service.script = [status(code), status(code)]
    assert [s.value for s in ask(service.url, samples("abc"), retries=2)] == [3.0]
    assert len(service.requests) == 3


def test_the_wait_doubles_and_a_retry_after_is_kept(service: Service):
    service.script = [status(503), status(503), status(503)]
    started = time.monotonic()
    ask(service.url, samples("abc"), retries=3, backoff_s=0.2)
    assert time.monotonic() - started > 0.4 + 0.8  # urllib3 retries once at once
    service.script = [status(429, Retry_After="1")]
    started = time.monotonic()
    ask(service.url, samples("abc"))
    assert time.monotonic() - started > 0.9


@pytest.mark.parametrize("code", [400, 401, 403, 404, 413, 422])
def test_what_will_not_pass_is_not_tried_again(service: Service, code: int):
    service.behaviour = status(code)
    (found,) = ask(service.url, samples("a"))
    assert found.value is None and f"status {code}" in found.why and service.url in found.why
    assert len(service.requests) == 1


def test_one_batch_that_is_given_up_does_not_take_the_others_along(service: Service):
    service.script = [by_length, status(500), status(500), by_length]
    found = ask(service.url, samples("a", "bb", "ccc", "dddd", "e"), batch_size=2, retries=1)
    assert [s.value for s in found] == [1.0, 2.0, None, None, 1.0]
    assert "given up" in found[2].why and "500" in found[2].why


def hang(service: Service):
    return lambda handler, body: service.released.wait(30)


def test_a_service_that_hangs_is_given_up_in_time(service: Service):
    service.script = [hang(service), hang(service)]
    started = time.monotonic()
    found = ask(service.url, samples("a"), retries=1, timeout_s=0.2)
    assert time.monotonic() - started < 3
    assert found[0].value is None and "timed out" in found[0].why
    assert len(service.requests) == 2
    service.script = [hang(service)]
    assert ask(service.url, samples("abc"), retries=1, timeout_s=0.2)[0].value == 3.0


def test_an_answer_that_drips_is_given_up_in_time(service: Service):
    def drip(handler: BaseHTTPRequestHandler, body: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            if service.released.wait(0.1):
                return

    service.behaviour = drip
    started = time.monotonic()
    (found,) = ask(service.url, samples("a"), timeout_s=0.5)
    assert found.value is None and "too slow" in found.why
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"<html>oops</html>", "not JSON"),
        (b"", "not JSON"),
        (b"\xff{}", "can't decode"),
        (b"[1.0]", "scores"),
        (b'{"score": [1.0]}', "scores"),
        (b'{"scores": 1.0}', "with 1 entries"),
        (b'{"scores": [1.0, 2.0]}', "with 1 entries"),
        (b'{"scores": []}', "with 1 entries"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_garbage_is_no_score(service: Service, body: bytes, why: str):
    service.behaviour = lambda handler, _: answer(handler, body)
    (found,) = ask(service.url, samples("a"))
    assert found.value is None and why in found.why


def test_a_redirect_is_not_followed(service: Service):
    """The token would go where nobody sent it."""
    service.behaviour = status(307, Location="http://127.0.0.1:9/else")
    (found,) = ask(service.url, samples("a"))
    assert found.value is None and "307" in found.why and len(service.requests) == 1


def test_nobody_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/score"
    (found,) = ask(url, samples("a"), retries=1)
    assert found.value is None and "refused" in found.why


def test_a_connection_that_breaks_off_is_tried_again(service: Service):
    service.script = [lambda handler, body: handler.connection.close()]
    assert [s.value for s in ask(service.url, samples("abc"))] == [3.0]


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"url": "ftp://h/score"}, "url"),
        ({"url": "http://"}, "url"),
        ({"url": "h/score"}, "url"),
        ({"url": "http://[::1/score"}, "url"),
        ({"url": "http://h:port/score"}, "url"),
        ({"url": "http://me:secret@h/score"}, "url"),
        ({"url": "http://h", "timeout_s": 0.0}, "timeout_s"),
        ({"url": "http://h", "batch_size": 0}, "batch_size"),
        ({"url": "http://h", "retries": -1}, "retries"),
    ],
)
def test_what_cannot_be_asked_is_refused(settings: dict[str, Any], where: str):
    with pytest.raises(ConfigError) as caught:
        check(HttpConfig(**settings))
    assert caught.value.where == where and caught.value.fix
