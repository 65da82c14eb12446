"""The ground every test stands on: a private HOME, nothing over the network, one thread, no process left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MARKER = f"LLMSCALE_TEST_SESSION={uuid.uuid4().hex}"  # every process that the tests start inherits it
PRIVATE_HOME = Path(tempfile.mkdtemp(prefix="llmscale-home-"))
# Tests that compare what a fixture makes once a worker, which takes minutes.
TOGETHER = [("tests/engine/",), ("tests/stages/test_lost_workers.py", "tests/stages/test_ranks_stopped.py")]


def _private_environment() -> None:
    """Set before torch, ray or a subprocess reads it. The real HOME holds a Ray token and a wandb account."""
    real_cache = Path(os.environ.pop("XDG_CACHE_HOME", "") or Path.home() / ".cache")
    extensions = real_cache / "torch_extensions"  # compiled DeepSpeed ops: half a minute to build, so shared
    extensions.mkdir(parents=True, exist_ok=True)
    (PRIVATE_HOME / ".cache").mkdir()
    (PRIVATE_HOME / ".cache" / "torch_extensions").symlink_to(extensions)
    for inherited in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "RAY_ADDRESS", "HF_HOME"):
        os.environ.pop(inherited, None)
    name, value = MARKER.split("=")
    os.environ.update(
        {
            name: value,
            "HOME": str(PRIVATE_HOME),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # torch calls ninja by name
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "WANDB_MODE": "offline",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
    )


_private_environment()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # `make test &`, whose children would be deaf to Ctrl-C too
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data beside the checkout")
    return folder


@pytest.fixture(scope="session")
def vllm_installed() -> None:
    """Leaves out what needs it, or fails where CI is true."""
    if find_spec("vllm") is None:
        missing = "vLLM is not installed: make vllm"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", mount], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
    yield mount
    # Lazily: the traceback of a failed torch.save may still hold its file open.
    subprocess.run(["umount", "--lazy", mount], check=True)


def _parent(entry: Path) -> int:
    return int((entry / "stat").read_text().rpartition(")")[2].split()[1])


def _left_behind() -> dict[int, str]:
    """Living processes, other than this one, that carry the session's marker: pid -> command line."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:  # it ended while we looked, or belongs to another user
            continue
        own_helper = "from multiprocessing." in command and _parent(entry) == os.getpid()  # ends with this process
        if MARKER.encode() in environment and command and not own_helper:
            found[int(entry.name)] = command
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that one of two workers is not left with it at the end."""
    items.sort(key=lambda item: item.path.parent.name != "engine" and item.path.name != "test_readme.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Gives a file to one worker, and those that are TOGETHER to the same one."""
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((names[0] for names in TOGETHER if nodeid.startswith(names)), super()._split_scope(nodeid))

    return Together(config, log)  # xdist's own marker for it, xdist_group, does nothing with pytest 9


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a session that leaves processes behind, and end them."""
    if session.config.getoption("numprocesses", None) and not hasattr(session.config, "workerinput"):
        return  # this one only hands out tests; its workers look after themselves
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()  # its service belongs to this process and would end with it
    deadline = time.monotonic() + 10
    while (left := _left_behind()) and time.monotonic() < deadline:
        time.sleep(0.2)
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    for pid, command in left.items():
        if reporter is not None:
            reporter.write_line(f"left behind by the tests: {pid} {command[:150]}", red=True)
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, 9)
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_unconfigure() -> None:
    shutil.rmtree(PRIVATE_HOME, ignore_errors=True)
