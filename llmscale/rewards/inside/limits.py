"""How much a program may use, and why one was stopped."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class Limits:
    timeout_s: float  # from start to end, of the program and its tests together
    memory_bytes: int  # address space of each process
    max_processes: int  # and threads that a program may start, besides itself
    output_bytes: int  # of standard output and standard error together
    files_bytes: int  # in its directory


class Reason(Enum):
    """How the run of a program ended."""

    passed = "all tests passed"
    failed = "a test failed, or the program raised or ended before its tests"
    syntax = "this is not Python"
    timeout = "it ran out of time"
    memory = "it ran out of memory"
    processes = "it started too many processes"
    output = "it printed too much"
    files = "it wrote too much into files"
    network = "it asked for the network"
    read_outside = "it opened a file outside its directory"
    write_outside = "it wrote outside its directory"
    environment = "it asked for an environment variable"
    killed = "a signal ended it"


# The program did what it must not, or more than it may: no test that it passed counts.
BREACHES = (Reason.processes, Reason.output, Reason.files, Reason.network, Reason.read_outside, Reason.write_outside)
