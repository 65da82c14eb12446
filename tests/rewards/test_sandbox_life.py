"""The sandbox as a part of a run: time limits, several at once, what dies, and who is refused."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from llmscale.errors import ConfigError
from llmscale.rewards.inside.limits import Limits, Reason
from llmscale.rewards.sandbox import KINDS, Program, Sandbox
from tests.conftest import ROOT
from tests.rewards.programs import LIMITS, RIGHT, TESTS, descendants, python_for_nobody, run


@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "def f(x):\n    while True: pass",
        "import time\ntime.sleep(1000)",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "import signal\nfor s in (1, 2, 3, 15, 24): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        while True: time.sleep(1)\n"
        "while True: time.sleep(1)",
    ],
)
def test_time_is_limited(source: str):
    limits = Limits(1.0, LIMITS.memory_bytes, 3, 1000, 2**20)
    with Sandbox(limits, 1) as sandbox:
        result = run(sandbox, source)
        assert result.reason is Reason.timeout
        assert "after 1 s" in result.text
        assert 0.5 < result.seconds < 15.0
        assert run(sandbox, RIGHT).reason is Reason.passed
    assert not descendants(os.getpid(), "rewards.inside")


def test_programs_run_side_by_side_and_come_back_in_order():
    sources = [f"import time\ntime.sleep({3 * (i % 2)})\ndef f(x): return {i}" for i in range(8)]
    with Sandbox(LIMITS, 4) as sandbox:
        started = time.monotonic()
        results = sandbox.run([Program(s, (f"assert f(1) == {i}",)) for i, s in enumerate(sources)])
        assert time.monotonic() - started < 4 * 3  # four of them sleep for three seconds
        assert len(descendants(os.getpid(), "rewards.inside")) <= 4 * 2
    assert [r.reason for r in results] == [Reason.passed] * 8
    assert not descendants(os.getpid(), "rewards.inside")


def test_a_launcher_that_was_killed_is_replaced():
    with Sandbox(LIMITS, 1) as sandbox:
        assert run(sandbox, RIGHT).reason is Reason.passed
        for pid in descendants(os.getpid(), "rewards.inside"):
            os.kill(pid, signal.SIGKILL)
        assert run(sandbox, RIGHT).reason is Reason.passed


def test_nothing_outlives_a_killed_driver():
    source = "import time\ntime.sleep(50)"
    script = textwrap.dedent(f"""
        from llmscale.rewards.sandbox import *
        sandbox = Sandbox(Limits(40.0, 2**28, 3, 1000, 2**20), 1)
        print("up", flush=True)
        sandbox.run([Program({source!r}, ("pass",))])
    """)
    driver = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None and driver.stdout.readline() == "up\n"
    deadline = time.monotonic() + 20
    while len(started := descendants(driver.pid, "rewards.inside")) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(started) == 4  # two of the launcher's, program and judge
    driver.kill()
    driver.wait()
    driver.stdout.close()
    while any(Path(f"/proc/{pid}").exists() for pid in started) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]


@pytest.mark.skipif(os.geteuid() != 0, reason="starts a process as another user")
@pytest.mark.parametrize("kind", KINDS)
def test_an_ordinary_user_needs_no_root(kind: str):
    script = textwrap.dedent(f"""
        from llmscale.rewards.sandbox import *
        with Sandbox(Limits(20.0, 2**28, 3, 1000, 2**20), 1, kinds=[{kind!r}]) as sandbox:
            for source in ({RIGHT!r}, "open('/etc/passwd')", "import os\\nwhile True: os.fork()"):
                print(sandbox.run([Program(source, {TESTS!r})])[0].reason.name)
    """)
    command = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", python_for_nobody(), "-c", script]
    done = subprocess.run(command, cwd="/", env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100)
    if "No module named 'llmscale'" in done.stderr:
        pytest.skip("another user cannot read this checkout")
    assert done.stdout.split() == ["passed", "read_outside", "processes"], done.stderr


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_a_machine_that_gives_no_walls_is_refused_with_the_reason():
    """Real ones: a namespace in which no other can be made and nobody has no number, so Landlock cannot become it."""
    script = "from llmscale.rewards.sandbox import *\nSandbox(Limits(9.0, 2**28, 3, 1000, 2**20), 1)"
    inside = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", inside, "sh", sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-2:]
    assert "ConfigError: reward: this machine cannot run a model's code safely (namespaces: new user" in last[0]
    assert "landlock: user nobody has no number" in last[0] and "Allow user namespaces" in last[1]


def test_root_without_a_python_for_nobody_is_refused(tmp_path: Path):
    if python_for_nobody() == sys.executable:
        pytest.skip("nobody may read this Python")
    with pytest.raises(ConfigError, match="landlock: nobody may not read") as caught:
        Sandbox(LIMITS, 1, where="true_reward", kinds=["landlock"])
    assert caught.value.where == "true_reward"


def test_a_program_needs_tests():
    with Sandbox(LIMITS, 1) as sandbox, pytest.raises(ValueError, match="without tests"):
        sandbox.run([Program(RIGHT, ())])
