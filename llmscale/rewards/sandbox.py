"""Running Python that a model wrote, against tests, on a machine where other things matter.

A `Sandbox` keeps some launchers: processes with an empty environment that have shut themselves off (`inside/walls.py`) and
start, for each program, two processes more: one runs the program, the other the tests (`inside/judge.py`). What they can ask of
the kernel is a short list (`inside/seccomp.py`).

Guaranteed, as far as the kernel keeps its word:
- The program cannot read files other than Python's own and those it wrote itself, nor environment variables, nor other
  processes; it cannot change anything outside its directory, which is in memory and gone afterwards; it has no network, starts
  no other program file, and is nobody, without capabilities, also where the run is root's.
- It ends with all that it started, however detached, within the time limit. Of memory it uses at most `memory_bytes` times
  `max_processes` + 1, of files `files_bytes`, of output `output_bytes` and what it prints until the next look (0.05 s).
- It cannot declare itself passed. It never sees the tests nor what they expect; calls and results travel as data between
  two processes, and what compares is not the program's. `os._exit(0)`, objects that equal everything, patched builtins,
  frames, garbage collector and own memory give it nothing.
- It does not learn what programs before it did.

Not guaranteed: a bug in the kernel's part (namespaces, seccomp, Landlock) or in Python's `json` on the tests' side, side
channels (timing, caches, load), a fair share of processors among programs that run side by side, tests that mean harm (they
are shut in as well, but they decide the verdict), and what only tests in the program's own process could do:
`isinstance` with its classes, identity of its values, comparing its own objects with plain data. Two of the program's
objects compare as its own `__eq__` says, and it can change a list that a test hands to it, as in any Python.

Needs Linux 5.12 or newer on x86-64.

Without user namespaces (many containers) Landlock takes their place, with less: see `walls.py`. Without both there is an
error and no program runs.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmscale.errors import ConfigError, WorkerError
from llmscale.rewards.inside.limits import Limits, Reason

KINDS = ("namespaces", "landlock")  # in this order
_ROOT = str(Path(__file__).parents[2])
_START = """import sys; sys.path.insert(0, sys.argv[1])
from llmscale.rewards.inside.launcher import main; from llmscale.rewards.inside.limits import Limits; import json
main(int(sys.argv[2]), sys.argv[3], Limits(**json.loads(sys.argv[4])))"""
_GRACE_S = 20.0  # that a launcher may need beyond a program's own time, on a machine that is busy
_OUTPUT_KEPT = 4096  # bytes of what a program printed


@dataclass(frozen=True)
class Program:
    source: str
    tests: tuple[str, ...]  # each is Python: assertions about what the program defines


_TRIAL = Program("x = 1", ("assert x == 1",))


@dataclass(frozen=True)
class Result:
    reason: Reason
    text: str  # what happened, in words of the sandbox or (of an exception) of the program
    passed: tuple[bool, ...]  # by test; False where it was not reached
    output: str  # the beginning of what it printed
    seconds: float
    peak_bytes: int

    def __str__(self) -> str:
        return f"{self.reason.name}: {self.text or self.reason.value}"


class Sandbox:
    """Runs programs, at most `num_workers` side by side.

    Raises: ConfigError (`where`) when this machine cannot shut a program in.
    """

    def __init__(self, limits: Limits, num_workers: int, where: str = "reward", kinds: Sequence[str] = KINDS):
        self.limits, self.where = limits, where
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="sandbox")
        first, refusals = None, []
        for kind in kinds:
            try:
                first = Launcher(limits, kind)
                break
            except OSError as error:
                refusals.append(f"{kind}: {error}")
        if first is None:
            what = f"this machine cannot run a model's code safely ({'; '.join(refusals)})"
            fix = "Allow user namespaces (in a container also its seccomp and AppArmor profile), or Landlock (Linux 5.13+)."
            raise ConfigError(what, where=where, fix=fix)
        self.kind = first.kind
        self._idle: queue.SimpleQueue[Launcher | None] = queue.SimpleQueue()
        self._idle.put(first)
        for _ in range(num_workers - 1):
            self._idle.put(None)  # started when needed

    def run(self, programs: Sequence[Program]) -> list[Result]:
        """Results in the order of the programs. Raises: WorkerError when the sandbox itself fails, twice."""
        return list(self._threads.map(self._run, programs))

    def close(self) -> None:
        self._threads.shutdown()
        while not self._idle.empty():
            launcher = self._idle.get()
            if launcher is not None:
                launcher.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, program: Program) -> Result:
        if not program.tests:
            raise ValueError("a program without tests can neither pass nor fail")
        launcher = self._idle.get()
        try:
            for last_try in (False, True):
                try:
                    launcher = launcher or Launcher(self.limits, self.kind)
                    return launcher.run(program)
                except OSError as error:
                    if launcher is not None:
                        launcher.close()
                        launcher = None
                    if last_try:
                        raise WorkerError(f"the sandbox failed: {error}", where=self.where) from error
            raise AssertionError
        finally:
            self._idle.put(launcher)


class Launcher:
    """One process that starts programs, one after the other.

    Raises: OSError with what the machine does not give.
    """

    def __init__(self, limits: Limits, kind: str):
        self.limits, self.kind = limits, kind
        self._channel, theirs = socket.socketpair()
        command = [sys.executable, "-s", "-S", "-B", "-P", "-X", "utf8", "-c", _START]
        command += [_ROOT, str(theirs.fileno()), kind, json.dumps(vars(limits))]
        # A fixed hash seed, so that a program that walks over a set does the same in every launcher.
        environment = {"PYTHONHASHSEED": "0"}
        self._process = subprocess.Popen(
            command,
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )
        theirs.close()
        try:
            self._hear(_GRACE_S)
            trial = self.run(_TRIAL)
            if trial.reason not in (Reason.passed, Reason.timeout):  # on a busy machine the limit may be too short
                raise OSError(f"a trial program ended with {trial}")
        except BaseException:
            self.close()
            raise

    def run(self, program: Program) -> Result:
        names = ("source", "tests", "verdicts", "output")
        files = {name: os.memfd_create(name) for name in names}
        try:
            os.pwrite(files["source"], program.source.encode(errors="replace"), 0)
            os.pwrite(files["tests"], json.dumps(program.tests).encode(), 0)
            socket.send_fds(self._channel, [b"!"], list(files.values()))
            said = self._hear(self.limits.timeout_s + _GRACE_S)
            lines = os.pread(files["verdicts"], os.fstat(files["verdicts"]).st_size, 0).splitlines()
            output = os.pread(files["output"], _OUTPUT_KEPT, 0).decode(errors="replace")
        finally:
            for descriptor in files.values():
                os.close(descriptor)
        return judged(program, [json.loads(line) for line in lines], said, output)

    def close(self) -> None:
        self._channel.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)  # it ends when the channel does
        self._process.kill()
        self._process.wait()

    def _hear(self, timeout_s: float) -> dict[str, Any]:
        self._channel.settimeout(timeout_s)
        message = self._channel.recv(65536)
        if not message:
            raise ConnectionError("its launcher ended")
        said = json.loads(message)
        if "error" in said:
            raise OSError(said["error"])
        return said


def judged(program: Program, lines: Sequence[dict[str, Any]], said: dict[str, Any], output: str) -> Result:
    """What the judge wrote, line by line, and what the launcher saw."""
    first, tests = (lines[0] if lines else None), [line for line in lines[1:] if "ok" in line]
    passed = [bool(line["ok"]) for line in tests] + [False] * (len(program.tests) - len(tests))
    complete = bool(lines) and bool(lines[-1].get("end"))
    fault = next((line for line in lines if line.get("ok") is False), None)
    if said["reason"] is not None:
        reason, text = Reason[said["reason"]], said["text"]
    elif complete and all(passed):
        reason, text = Reason.passed, ""
    elif fault is not None and "reason" in fault:
        reason, text = Reason.__members__.get(fault["reason"], Reason.failed), fault["text"]
        reason = reason if reason is not Reason.passed else Reason.failed
    elif said["signal"]:
        reason, text = Reason.killed, f"signal {said['signal']}"
    else:
        when = "before" if first is None else "during"
        reason, text = Reason.failed, f"the program ended {when} its tests, with exit code {said['exit_code']}"
    return Result(reason, text, tuple(passed), output, said["seconds"], said["peak_bytes"])
