"""Starts programs behind walls, one after the other, and watches each: the process that `Sandbox` keeps for this.

It has an empty environment and never reads what passes through it (source, tests, verdicts: descriptors that it hands on),
because what it had read would lie in the memory of the next program, which starts as a copy of it.
"""

from __future__ import annotations

import json
import os
import random
import resource
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from llmscale.rewards.inside import kernel, seccomp
from llmscale.rewards.inside.exchange import Wire
from llmscale.rewards.inside.judge import run_tests
from llmscale.rewards.inside.limits import Limits, Reason
from llmscale.rewards.inside.program import run_program
from llmscale.rewards.inside.walls import DEVICES, Landlock, Namespaces, Walls

_MAX_FILES = 64  # that a program may open for writing where no file system of its own counts them
_LOOK_EVERY_S = 0.05  # at how much was printed
# Files that Python and the C library look for by themselves, whether or not a program means to.
_HARMLESS: tuple[str, ...] = (
    "/etc/ld.so",
    "/etc/localtime",
    "/etc/nsswitch.conf",
    "/etc/mime.types",
    "/usr/share",
    "/usr/local/lib",
)
_HARMLESS += ("/sys/devices/system/cpu", "/proc/self/maps", "/proc/cpuinfo", "/proc/meminfo", "/usr/local/share")
_HARMLESS += (os.path.dirname(__file__),)  # for tracebacks
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# What programs import most: loaded once here instead of in each. Whoever runs this has them loaded already or not at all.
_PRELOADED = "bisect cmath collections copy dataclasses datetime decimal enum fractions functools heapq itertools math"
_PRELOADED += " operator queue random re statistics string textwrap threading time typing unicodedata"


@dataclass
class Stop:
    reason: Reason
    text: str


@dataclass
class Cell:
    """One enclosed process."""

    pid: int
    listener: int
    ended: int  # a descriptor that can be read from when it has
    started: int = 0  # processes and threads
    made: int = 0  # files
    status: int | None = None  # as wait gives it
    peak_bytes: int = 0


def main(control: int, kind: str, limits: Limits) -> None:
    """Serve jobs from a socket until it closes: each is one byte and the descriptors of source, tests, verdicts, output."""
    channel = socket.socket(fileno=control)
    walls: Walls = Namespaces(limits) if kind == "namespaces" else Landlock(limits)
    os.umask(0o022)
    try:
        with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # where the machine runs out of memory, it is taken from here first
        for name in _PRELOADED.split():
            __import__(name)
        if sys.maxsize < 2**32 or os.uname().machine != "x86_64":
            raise OSError(f"the system call filter is written for x86-64, this is {os.uname().machine}")
        walls.prepare()
    except Exception as error:  # whatever it is, the machine does not give what is needed
        said = getattr(error, "strerror", None) or str(error)
        channel.send(json.dumps({"error": said}).encode())
        walls.close()
        return
    library = os.path.dirname(os.__file__)
    sys.path[:] = [os.path.realpath(library), os.path.realpath(f"{library}/lib-dynload")]
    null = os.open("/dev/null", os.O_RDWR)
    channel.send(b'{"ready": true}')
    launcher = Launcher(walls, limits, null)
    try:
        while (received := socket.recv_fds(channel, 1, 4))[0]:
            try:
                answer = launcher.run(channel, *received[1])
            except OSError as error:
                answer = {"error": str(error)}
            for descriptor in received[1]:
                os.close(descriptor)
            if answer is None:
                break
            channel.send(json.dumps(answer).encode())
    finally:
        walls.close()


class Launcher:
    def __init__(self, walls: Walls, limits: Limits, null: int):
        self.walls, self.limits, self.null = walls, limits, null
        self.folders = [*walls.folders, *DEVICES, walls.work]

    def run(self, channel: socket.socket, source: int, tests: int, verdicts: int, output: int) -> dict[str, Any] | None:
        """How it went; None when nobody waits for it any more."""
        started = time.monotonic()
        asks, answers = (end.detach() for end in socket.socketpair())

        def program() -> None:
            run_program(_read(source), Wire(socket.socket(fileno=answers)))

        def judge() -> None:
            run_tests(json.loads(_read(tests)), Wire(socket.socket(fileno=asks)), verdicts)

        cells: list[Cell] = []
        try:
            cells.append(self.start(program, (source, answers), output, self.limits.max_processes + 4))
            cells.append(self.start(judge, (tests, asks, verdicts), self.null, self.limits.max_processes + 4))
            os.close(asks)
            os.close(answers)
            stop = self.watch(channel, cells, output, started + self.limits.timeout_s)
        finally:
            for cell in cells:
                self.end(cell)
            self.walls.clean()
        if stop is None:
            return None
        status = cells[0].status or 0
        return {
            "reason": stop.reason.name if isinstance(stop, Stop) else None,
            "text": stop.text if isinstance(stop, Stop) else "",
            "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
            "exit_code": os.WEXITSTATUS(status) if os.WIFEXITED(status) else 0,
            "seconds": time.monotonic() - started,
            "peak_bytes": cells[0].peak_bytes,
        }

    def start(self, work: Callable[[], None], keep: tuple[int, ...], output: int, max_processes: int) -> Cell:
        ready, theirs = socket.socketpair()
        pid = self.walls.fork()
        if pid:
            theirs.close()
            message, descriptors, _, _ = socket.recv_fds(ready, 200, 1)
            ready.close()
            if not descriptors:
                os.waitpid(pid, 0)
                raise OSError(f"a process could not be enclosed: {message.decode() or 'it ended'}")
            return Cell(pid, descriptors[0], os.pidfd_open(pid))
        status = 1
        try:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            try:
                self.walls.enclose(max_processes)
                for target, descriptor in enumerate((self.null, output, output)):
                    os.dup2(descriptor, target)
                listener = seccomp.install(self.walls.own_root, os.getpid())
                socket.send_fds(theirs, [b"!"], [listener])
            except BaseException as error:
                theirs.send(str(error).encode()[:200])
                raise
            last = 3
            for descriptor in sorted(keep):  # close all that is not for this side
                os.closerange(last, descriptor)
                last = descriptor + 1
            os.closerange(last, resource.getrlimit(resource.RLIMIT_NOFILE)[0] + 1024)
            os.environ.clear()
            random.seed(0)
            work()
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status & 0xFF)

    def watch(self, channel: socket.socket, cells: list[Cell], output: int, deadline: float) -> Stop | bool | None:
        """Until the judge is done (True), something is to be stopped, or the other end of the channel is gone (None)."""
        poll = select.poll()
        poll.register(channel, select.POLLIN)
        for cell in cells:
            poll.register(cell.listener, select.POLLIN)
            poll.register(cell.ended, select.POLLIN)
        by_listener = {cell.listener: cell for cell in cells}
        by_end = {cell.ended: cell for cell in cells}
        judged = False
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                return Stop(Reason.timeout, f"after {self.limits.timeout_s:g} s")
            for descriptor, event in poll.poll(min(left, _LOOK_EVERY_S) * 1000):
                if descriptor == channel.fileno():
                    return None
                if descriptor in by_end:
                    poll.unregister(descriptor)
                    self.reap(by_end[descriptor])
                    judged = judged or by_end[descriptor] is cells[-1]
                elif event & select.POLLIN and (call := seccomp.receive(descriptor)):
                    stop = self.look_at(by_listener[descriptor], call)
                    if stop is not None:
                        return stop
                    seccomp.go_on(descriptor, call)
                elif event & select.POLLHUP:  # nothing is left that could ask
                    poll.unregister(descriptor)
            if os.fstat(output).st_size > self.limits.output_bytes:
                return Stop(Reason.output, f"more than {self.limits.output_bytes} bytes")
            if judged:
                return True

    def look_at(self, cell: Cell, call: seccomp.Call) -> Stop | None:
        """What to stop for. The walls hold whatever is answered here: this is how each breach gets its name."""
        if call.number == seccomp.SOCKET:
            return Stop(Reason.network, f"socket of family {call.args[0]}")
        if call.number in seccomp.STARTS:
            cell.started += 1
            over = cell.started > self.limits.max_processes
            return Stop(Reason.processes, f"more than {self.limits.max_processes}") if over else None
        if call.number in (seccomp.SYMLINK, seccomp.SYMLINKAT):
            return self.refused(kernel.read_string(call.pid, call.args[0]), writes=False)
        if call.number in seccomp.CHANGES_PATH:
            paths = (kernel.read_string(call.pid, call.args[i]) for i in seccomp.CHANGES_PATH[call.number])
            return next((stop for path in paths if (stop := self.refused(path, writes=True))), None)
        at, flags = (1, call.args[2]) if call.number == seccomp.OPENAT else (0, call.args[1])
        writes = call.number == seccomp.CREAT or bool(flags & _WRITES)
        if flags & os.O_DIRECTORY and not writes:
            return None
        cell.made += writes
        if cell.made > _MAX_FILES and not self.walls.own_root:  # else its file system counts
            return Stop(Reason.files, f"more than {_MAX_FILES} files")
        return self.refused(kernel.read_string(call.pid, call.args[at]), writes)

    def refused(self, path: str, writes: bool) -> Stop | None:
        path = os.path.normpath(os.path.join(self.walls.work, path))
        if not writes and ".so" in os.path.basename(path):
            return None  # shared libraries are looked for in many places
        folders = [self.walls.work, *DEVICES] if writes else [*self.folders, *_HARMLESS]
        if any(path == f or path.startswith(f"{f}/") or (f in _HARMLESS and path.startswith(f)) for f in folders):
            return None
        return Stop(Reason.write_outside if writes else Reason.read_outside, path)

    def end(self, cell: Cell) -> None:
        if cell.status is None:
            with suppress(ProcessLookupError):
                os.kill(cell.pid, signal.SIGKILL)
            self.reap(cell)
        os.close(cell.listener)
        os.close(cell.ended)

    def reap(self, cell: Cell) -> None:
        _, cell.status, usage = os.wait4(cell.pid, 0)
        cell.peak_bytes = usage.ru_maxrss * 1024


def _read(descriptor: int) -> str:
    with open(descriptor, "rb", closefd=False) as file:
        file.seek(0)
        return file.read().decode()
