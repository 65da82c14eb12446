"""The real W&B client: offline files read back, and a service on loopback that misbehaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from llmscale.tracking.composite import open_trackers
from llmscale.tracking.config import TrackingConfig, WandbMode
from llmscale.tracking.jsonl import EVENTS, METRICS, read_jsonl
from llmscale.tracking.wandb import wandb_id
from tests.tracking.wandb_file import read_wandb

KEY = "0123456789abcdef" * 2 + "01234567"
TIMEOUT_S = 2.0
MARGIN_S = 8.0  # for starting W&B's service twice on a busy machine


@pytest.fixture(autouse=True)
def clean_environment(tmp_path, monkeypatch):
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # no .netrc
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # Registered so that what a run sets is taken back.
    monkeypatch.setenv("WANDB_DATA_DIR", "")
    monkeypatch.setenv("WANDB_CACHE_DIR", "")
    yield
    assert processes_under(os.getpid()) == []


def processes_under(parent: int) -> list[str]:
    """Names of the living W&B processes that `parent` started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = status.read_text().partition("(")[2].rpartition(")")
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, parent_pid = rest.split()[:2]
        if name.startswith("wandb") and state != "Z" and int(parent_pid) == parent:
            found.append(name)
    return found


def open_run(run_dir, resume_step=-1, **settings):
    settings = {"wandb_init_timeout_s": TIMEOUT_S, "wandb_finish_timeout_s": TIMEOUT_S} | settings
    return open_trackers(
        TrackingConfig(**settings),
        run_dir=run_dir,
        run_id="sft/demo",
        title="sft demo",
        total_steps=4,
        resume_step=resume_step,
        run_config={"optim": {"lr": 0.1}, "token": "<redacted>"},
    )


def offline_files(run_dir):
    return sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))


def events_of(run_dir, kind):
    return [e for e in read_jsonl(run_dir / EVENTS) if e["kind"] == kind]


def metric_rows(found):
    return [(row["step"], row["train/loss"]) for row in found.rows if "train/loss" in row]


def test_an_offline_run_read_back(tmp_path, capfd):
    tracker = open_run(tmp_path)
    for step in (10, 20):
        tracker.log(step, {"train/loss": 1 / step, "reward/mean": float("nan")})
    tracker.samples(20, [{"prompt": "p", "reward": 1.0}, {"prompt": "q", "ids": [1, 2]}])
    tracker.finish("done")
    (path,) = offline_files(tmp_path)
    found = read_wandb(path)
    assert (found.run_id, found.project) == (wandb_id("sft/demo"), "llmscale")
    assert found.config["optim"] == {"lr": 0.1} and found.config["token"] == "<redacted>"
    assert found.axes["*"] == "step"
    assert metric_rows(found) == [(10, 0.1), (20, 0.05)]
    (table,) = (row for row in found.rows if "samples._type" in row)
    assert (table["step"], table["samples.nrows"], table["samples.ncols"]) == (20, 2, 2)
    (media,) = path.parent.glob("files/media/table/*.json")
    assert json.loads(media.read_text())["data"] == [["p", 1.0], ["q", None]]  # token ids stay in samples.jsonl
    assert found.exit_code == 0
    assert not (tmp_path / "home").exists()
    (started,) = events_of(tmp_path, "wandb_started")
    assert started["mode"] == "offline"
    out, err = capfd.readouterr()
    assert out == "" and all(line.startswith("sft demo: ") for line in err.splitlines())


def test_a_failed_run_says_so(tmp_path):
    open_run(tmp_path).finish("failed")
    assert read_wandb(offline_files(tmp_path)[0]).exit_code == 1


def test_runs_of_a_group_are_named_by_their_folder(tmp_path):
    run_dir = tmp_path / "trial" / "lr=0.1,seed=0" / "sft"
    open_run(run_dir, wandb_group="trial").finish("done")
    open_run(tmp_path).finish("done")
    grouped, alone = (read_wandb(offline_files(folder)[0]) for folder in (run_dir, tmp_path))
    assert (grouped.group, grouped.name, grouped.job_type) == ("trial", "lr=0.1,seed=0", "sft")
    assert (alone.group, alone.name) == ("", "sft/demo")
    assert grouped.run_id == alone.run_id


def test_disabled_writes_nothing(tmp_path):
    open_run(tmp_path, wandb=WandbMode.disabled).finish("done")
    assert not (tmp_path / "wandb").exists()


KILLED = """
import os, signal, time
from pathlib import Path
from llmscale.tracking.composite import open_trackers
from llmscale.tracking.config import TrackingConfig
tracker = open_trackers(TrackingConfig(), run_dir=Path("."), run_id="sft/demo", title="t", total_steps=4,
                        resume_step=-1, run_config={})
for step in range(1, 101):
    tracker.log(step, {"train/loss": 1.0} | {f"train/filler_{i}": 0.5 for i in range(10)})
while Path(next(Path("wandb").glob("offline-run-*/*.wandb"))).stat().st_size <= 32768:
    time.sleep(0.02)
print("ready", flush=True)
time.sleep(60)
"""


def test_an_interrupted_attempt_continues_under_the_same_id(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED], cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout.readline() == "ready\n"
    (service,) = service_pids(process.pid)
    process.kill()
    process.communicate()
    wait_until(lambda: not Path(f"/proc/{service}").exists())  # it follows its parent
    tracker = open_run(tmp_path, resume_step=20)
    tracker.log(21, {"train/loss": 2.0})
    tracker.finish("done")
    first, second = (read_wandb(path) for path in offline_files(tmp_path))
    assert first.run_id == second.run_id
    assert first.exit_code is None and second.exit_code == 0
    rows = metric_rows(first)  # it writes whole blocks, so the last rows of a killed process are lost
    assert 20 <= len(rows) <= 100 and rows == [(step, 1.0) for step in range(1, len(rows) + 1)]
    assert metric_rows(second) == [(21, 2.0)] and second.rows[0]["_step"] == 0  # W&B's own count is of no use
    assert [r["step"] for r in read_jsonl(tmp_path / METRICS)] == list(range(1, 22))


def service_pids(parent: int) -> list[int]:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text().startswith("wandb-core")]


def wait_until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_service_process_that_dies_does_not_end_the_run(tmp_path):
    tracker = open_run(tmp_path)
    (service,) = service_pids(os.getpid())
    os.kill(service, signal.SIGKILL)
    time.sleep(0.2)
    for step in (1, 2, 3):
        tracker.log(step, {"train/loss": 1.0})
    tracker.finish("done")
    assert len(read_jsonl(tmp_path / METRICS)) == 3
    (failed,) = events_of(tmp_path, "wandb_failed")
    assert failed["doing"] == "log"


class Service(BaseHTTPRequestHandler):
    """Answers as `server.behaviour` says: a status code for all, "hang", or "accept": take the run, then hang."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode("utf-8", "replace")
        self.server.keys.append(self.headers.get("Authorization"))
        behaviour = self.server.behaviour
        if behaviour == "accept" and "RunResumeStatus" in body:
            return self.answer(200, {"data": {"model": None}})
        if behaviour == "accept" and "mutation UpsertBucket" in body and not self.server.accepted:
            self.server.accepted = True
            project = {"id": "1", "name": "llmscale", "entity": {"id": "2", "name": "someone"}}
            bucket = {"id": "3", "name": wandb_id("sft/demo"), "displayName": "t", "config": "{}", "project": project}
            return self.answer(200, {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}})
        if isinstance(behaviour, int):
            return self.answer(behaviour, {"errors": [{"message": "refused"}]})
        self.server.closing.wait(60)

    do_GET = do_POST

    def answer(self, status, content):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def service(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        server.daemon_threads, server.closing = True, threading.Event()
        server.keys, server.accepted = [], False
        threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield server
        server.closing.set()
        server.shutdown()


@pytest.mark.parametrize("behaviour", [429, 500, 401, "hang"])
def test_a_service_that_fails_at_start_means_offline(tmp_path, service, behaviour):
    service.behaviour = behaviour
    begin = time.monotonic()
    tracker = open_run(tmp_path)
    assert time.monotonic() - begin < TIMEOUT_S + MARGIN_S
    tracker.log(1, {"train/loss": 0.5})
    tracker.finish("done")
    assert time.monotonic() - begin < TIMEOUT_S + MARGIN_S
    assert service.keys, "the service was never asked"
    found = read_wandb(offline_files(tmp_path)[0])
    assert metric_rows(found) == [(1, 0.5)] and found.exit_code == 0
    (failed,), (started,) = events_of(tmp_path, "wandb_failed"), events_of(tmp_path, "wandb_started")
    assert failed["doing"] == "start online" and failed["reason"]
    assert started["mode"] == "offline"
    assert KEY not in (tmp_path / EVENTS).read_text()


def test_a_service_that_hangs_later_does_not_hold_the_end(tmp_path, service):
    service.behaviour = "accept"
    tracker = open_run(tmp_path)
    (started,) = events_of(tmp_path, "wandb_started")
    assert started["mode"] == "online" and "/runs/" in started["at"]
    tracker.log(1, {"train/loss": 0.5})
    begin = time.monotonic()
    tracker.finish("done")
    assert TIMEOUT_S * 0.9 < time.monotonic() - begin < TIMEOUT_S + MARGIN_S
    (failed,) = events_of(tmp_path, "wandb_failed")
    assert failed["doing"] == "finish"
    (path,) = tmp_path.glob("wandb/run-*/*.wandb")  # what was not uploaded can still be synced
    assert metric_rows(read_wandb(path)) == [(1, 0.5)]
    assert not any(KEY.encode() in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())


def test_online_without_a_key_asks_nobody(tmp_path, service, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY")
    open_run(tmp_path, wandb=WandbMode.online).finish("done")
    assert service.keys == []
    (failed,) = events_of(tmp_path, "wandb_failed")
    assert "WANDB_API_KEY" in failed["reason"]
    assert len(offline_files(tmp_path)) == 1


def test_without_a_place_to_write_the_run_goes_on_without(tmp_path):
    (tmp_path / "wandb").write_text("in the way")
    tracker = open_run(tmp_path)
    tracker.log(1, {"train/loss": 0.5})
    tracker.finish("done")
    assert len(read_jsonl(tmp_path / METRICS)) == 1


def test_ids():
    assert wandb_id("demo-1_x") == "demo-1_x"
    ids = {wandb_id(name) for name in ("a/b", "a-b", "a:b", "a" * 200, "a" * 201, "數學")}
    assert len(ids) == 6 and all(len(i) <= 64 and i.isascii() and "/" not in i for i in ids)
    assert wandb_id("a/b") == wandb_id("a/b")
