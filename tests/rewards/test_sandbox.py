"""Programs that try to get out or to use everything up, behind both kinds of walls."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from llmscale.rewards.inside.limits import Reason
from llmscale.rewards.sandbox import Sandbox
from tests.rewards.programs import LIMITS, RIGHT, descendants, run

pytestmark = pytest.mark.usefixtures("launchers")


@pytest.mark.parametrize(
    ("source", "reason", "text"),
    [
        ("import os\nwhile True: os.fork()", Reason.processes, "more than 3"),
        ("import os\ntry:\n    while True: os.fork()\nfinally:\n    os.fork()", Reason.processes, "more than 3"),
        ("import threading, time\nwhile True: threading.Thread(target=time.sleep, args=[9]).start()", "processes", ""),
        ("import os\nfor _ in range(9): os.posix_spawn('/bin/true', ['true'], {})", "failed", ""),
        ("import subprocess\nsubprocess.run(['/bin/ls'])", "failed", "PermissionError|FileNotFoundError"),
        ("import os\nos.execv('/bin/sh', ['sh'])", "failed", "PermissionError|FileNotFoundError"),
        ("x = []\nwhile True: x.append(bytearray(10**6))", Reason.memory, "MemoryError"),
        ("b'x' * 10**10", Reason.memory, "MemoryError"),
        ("import mmap\nmmap.mmap(-1, 2**30)", "failed", "OSError"),
        ("import os\nos.memfd_create('x')", "failed", "PermissionError"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 22))", Reason.network, "family 2"),
        ("import socket\nsocket.socket(socket.AF_INET6, socket.SOCK_DGRAM)", Reason.network, "family 10"),
        ("import socket\nsocket.socket(socket.AF_UNIX).connect('/run/docker.sock')", Reason.network, "family 1"),
        ("try:\n    import socket; socket.socket()\nexcept BaseException:\n    pass\n" + RIGHT, Reason.network, ""),
        ("import socket\nsocket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)", "failed", "PermissionError"),
        ("from urllib.request import urlopen\nurlopen('http://127.0.0.1:80')", "network", "family"),
        ("import os\nos.environ['SECRET']", Reason.environment, "KeyError: 'SECRET'"),
        ("def f(x):\n    import os\n    return os.environ['SECRET']", Reason.environment, "KeyError: 'SECRET'"),
        ("import os\nprint(os.environ)\nassert not os.environ", "failed", "NameError"),
        ("open('/proc/self/environ').read()", Reason.read_outside, "/proc/self/environ"),
        ("open('/etc/shadow').read()", Reason.read_outside, "/etc/shadow"),
        ("open('../../etc/shadow').read()", "read_outside", "etc/shadow"),
        ("try:\n    open('/etc/shadow')\nexcept OSError:\n    pass\n" + RIGHT, Reason.read_outside, "/etc/shadow"),
        ("import os\nos.symlink('/etc/shadow', 'x')\nopen('x')", Reason.read_outside, "/etc/shadow"),
        ("import os\nos.symlink('../../../etc', 'x')\nopen('x/shadow')", Reason.read_outside, "etc"),
        ("import os\nos.link('/etc/shadow', 'x')", Reason.write_outside, "/etc/shadow"),
        ("open('/etc/passwd', 'a')", Reason.write_outside, "/etc/passwd"),
        ("open('/tmp/escaped', 'w')", Reason.write_outside, "/tmp/escaped"),
        ("open('../escaped', 'w')", Reason.write_outside, "escaped"),
        ("import os\nos.mkdir('/tmp/escaped')", Reason.write_outside, "/tmp/escaped"),
        ("import os\nopen('x', 'w').close()\nos.rename('x', '/tmp/escaped')", "write_outside", "/tmp/escaped"),
        ("import os\nos.remove('/etc/hostname')", Reason.write_outside, "/etc/hostname"),
        ("import shutil\nshutil.rmtree('/usr/lib', ignore_errors=True)", Reason.write_outside, "/usr/lib"),
        ("print('x' * 10**6)", Reason.output, "more than 20000"),
        ("import os\nos.write(2, b'x' * 10**6)\n" + RIGHT, Reason.output, "more than 20000"),
        ("while True: print('x' * 1000)", Reason.output, "more than 20000"),
        ("def f(x:", Reason.syntax, "SyntaxError"),
        ("x = '\0'", Reason.syntax, "null bytes"),
        ("def f(x): return f(x)", Reason.failed, "RecursionError"),
        ("input()", Reason.failed, "EOFError"),
        ("1 / 0", Reason.failed, "ZeroDivisionError: division by zero"),
        ("", Reason.failed, "NameError"),
        ("def f(x): return x", Reason.failed, r"AssertionError in: assert f\(1\) == 2"),
        ("import sys\nsys.exit(3)", Reason.failed, "exit code 3"),
        ("import ctypes\nctypes.string_at(0)", Reason.killed, "signal 11"),
        ("open('big', 'wb').write(bytes(10**8))", Reason.files, "OSError"),
        (
            "import os\nfor i in range(999): open(str(i), 'wb').write(bytes(10**5))",
            Reason.files,
            "OSError|more than 64",
        ),
        ("open('x', 'wb').truncate(10**9)", Reason.files, "OSError"),
        ("import os\nos.posix_fallocate(os.open('x', os.O_CREAT | os.O_RDWR), 0, 10**9)", Reason.files, "OSError"),
        ("x = [open('/dev/null') for _ in range(999)]", Reason.failed, "Too many open files"),
    ],
)
def test_stopped_with_its_reason(sandbox: Sandbox, source: str, reason: Reason | str, text: str):
    result = run(sandbox, source)
    assert result.reason is (reason if isinstance(reason, Reason) else Reason[reason]), result
    assert result.passed == (False,) or result.reason in (Reason.network, Reason.read_outside, Reason.output)
    assert re.search(text, result.text), result
    assert result.seconds < LIMITS.timeout_s
    assert result.peak_bytes < LIMITS.memory_bytes


def test_recursion_without_end_takes_no_more_than_memory(sandbox: Sandbox):
    result = run(sandbox, "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)\nf(1)")
    assert result.reason in (Reason.memory, Reason.killed, Reason.failed)  # as Python's version has it
    assert result.peak_bytes <= LIMITS.memory_bytes


def test_nothing_of_the_machine_has_changed(sandbox: Sandbox):
    """After all of the above, which came before in this file."""
    assert not Path("/tmp/escaped").exists() and Path("/etc/shadow").exists() and Path("/usr/lib").is_dir()


def test_a_secret_in_the_home_directory_is_not_there(sandbox: Sandbox):
    secret = Path.home() / "token"
    secret.write_text("swordfish")
    secret.chmod(0o644)
    assert run(sandbox, f"open({str(secret)!r}).read()").reason is Reason.read_outside
    seen = run(sandbox, f"import os\ndef f(x): return os.path.exists({str(secret)!r})", "assert f(1) is False")
    # Landlock does not hide that there is a file, unless the directories above do.
    assert seen.reason is Reason.passed or sandbox.kind == "landlock"


@pytest.mark.parametrize("name", ["environ", "mem", "cmdline", "root/etc/hostname", "cwd", "fd/0"])
def test_no_other_process_can_be_read(sandbox: Sandbox, name: str):
    for pid in (os.getpid(), os.getppid(), *descendants(os.getpid(), "rewards.inside"), "self", 1):
        source = (
            f"import os\nopen(os.path.realpath('/proc/{pid}/{name}') if '{name}' == 'cwd' else '/proc/{pid}/{name}')"
        )
        result = run(sandbox, source)
        assert result.reason in (Reason.read_outside, Reason.failed)
        assert result.passed == (False,)


CALL = """
    import ctypes, os
    libc = ctypes.CDLL(None, use_errno=True)
    def f(number, *args):
        result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) for a in args])
        return ctypes.get_errno() if result < 0 else "done"
"""


@pytest.mark.parametrize(
    ("name", "number", "args"),
    [
        ("ptrace attach", 101, (16, "PID", 0, 0)),
        ("process_vm_readv", 310, ("PID", 0, 0, 0, 0, 0)),
        ("process_vm_writev", 311, ("PID", 0, 0, 0, 0, 0)),
        ("pidfd_open", 434, ("PID", 0)),
        ("unshare user", 272, (0x10000000,)),
        ("clone user", 56, (0x10000011, 0, 0, 0, 0)),
        ("setns", 308, (0, 0)),
        ("mount", 165, (0, 0, 0, 0, 0)),
        ("umount2", 166, (0, 2)),
        ("pivot_root", 155, (0, 0)),
        ("chroot", 161, (0,)),
        ("open_tree", 428, (-100, 0, 1)),
        ("setuid", 105, (0,)),
        ("capset", 126, (0, 0)),
        ("bpf", 321, (0, 0, 0)),
        ("io_uring_setup", 425, (8, 0)),
        ("userfaultfd", 323, (0,)),
        ("perf_event_open", 298, (0, 0, -1, -1, 0)),
        ("add_key", 248, (0, 0, 0, 0, 0)),
        ("keyctl", 250, (0, 0, 0)),
        ("shmget", 29, (0, 2**30, 0o1600)),
        ("msgget", 68, (0, 0o1600)),
        ("mq_open", 240, (0, 0, 0, 0)),
        ("memfd_create", 319, (0, 0)),
        ("open_by_handle_at", 304, (0, 0, 0)),
        ("init_module", 175, (0, 0, 0)),
        ("reboot", 169, (0, 0, 0, 0)),
        ("sethostname", 170, (0, 0)),
        ("personality", 135, (0x0040000,)),
        ("ioctl TIOCSTI", 16, (0, 0x5412, 0)),
        ("prctl dumpable", 157, (4, 0)),
        ("fcntl F_SETOWN", 72, (0, 8, "PID")),
        ("prlimit of another", 302, ("PID", 7, 0, 0)),
        ("mknod", 133, (0, 0, 0)),
        ("fanotify_init", 300, (0, 0)),
        ("seccomp", 317, (1, 0, 0)),
    ],
)
def test_the_kernel_refuses(sandbox: Sandbox, name: str, number: int, args: tuple[int | str, ...]):
    given = ", ".join(str(os.getpid() if a == "PID" else a) for a in args)
    refused = "assert f({}) in (1, 25), f({})".format(*[f"{number}, {given}"] * 2)  # EPERM; ENOTTY of an ioctl
    assert run(sandbox, CALL, refused).reason is Reason.passed


def test_it_is_nobody_without_capabilities(sandbox: Sandbox):
    source = "import os\ndef f(x): return os.getresuid(), os.getresgid(), os.getgroups()"
    number = 65534 if os.geteuid() == 0 else os.geteuid()
    test = f"assert f(1)[0] in ((65534,) * 3, ({number},) * 3) and 0 not in f(1)[0] + f(1)[1]"
    assert run(sandbox, source, test).reason is Reason.passed
    drops = "import ctypes\ndef f(x): return ctypes.CDLL(None).prctl(24, 0, 0, 0, 0)"
    assert run(sandbox, drops, "assert f(1) == -1").reason is Reason.passed


@pytest.mark.parametrize("number", [0, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outside_can_be_sent_a_signal(sandbox: Sandbox, number: int):
    victim = subprocess.Popen(["sleep", "60"])
    try:
        # All processes that it could name: its own numbers start at 1 behind namespaces.
        source = f"""
            import os
            def f(x):
                sent = []
                for pid in ({victim.pid}, os.getppid(), {os.getpid()}, -{victim.pid}):
                    try:
                        os.kill(pid, {number})
                        sent.append(pid)
                    except OSError:
                        pass
                return sent
        """
        allowed = "assert set(f(1)) <= {0}"  # behind namespaces the parent is number 0: its own process group
        assert run(sandbox, source, allowed).reason in (Reason.passed, Reason.killed)
        time.sleep(0.05)
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


def test_daemons_end_with_the_program(sandbox: Sandbox):
    source = """
        import os, signal, time
        def f(x):
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    for s in (1, 2, 15): signal.signal(s, signal.SIG_IGN)
                    os.closerange(0, 64)
                    while True: time.sleep(1)
                os._exit(0)
            return x + 1
    """
    result = run(sandbox, source)
    assert result.reason is Reason.passed and result.seconds < LIMITS.timeout_s / 2
    # nothing_is_left looks for them


def test_files_of_its_own(sandbox: Sandbox):
    source = """
        import os, pathlib, tempfile
        def f(x):
            os.makedirs("a/b")
            pathlib.Path("a/b/c").write_text("hello")
            os.rename("a/b/c", "a/d")
            os.symlink("a/d", "link")
            with tempfile.TemporaryFile(dir=".") as file:
                file.write(b"x")
            return sorted(os.listdir("a")), open("link").read()
    """
    assert run(sandbox, source, "assert f(1) == (['b', 'd'], 'hello')").reason is Reason.passed
    assert run(sandbox, "import os\ndef f(x): return os.listdir('.')", "assert f(1) == []").reason is Reason.passed
