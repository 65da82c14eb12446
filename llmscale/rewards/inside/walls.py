"""Two ways to shut a process in: namespaces, and where the machine gives none, Landlock.

`prepare` runs once in the launcher, `fork` and `enclose` for each process that gets code to run: between them nothing but
these files has run. Both end as nobody (or as the user that started the run, who is not root), without capabilities.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from llmscale.rewards.inside import kernel
from llmscale.rewards.inside.limits import Limits

NOBODY = 65534
WORK = "/work"
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_MAX_FILES = 64  # open descriptors of a process
_MAX_INODES = 1024  # files and directories of a program


def python_folders() -> list[str]:
    """What Python needs to run: its standard library, and the shared libraries of its own and of the system."""
    system = [p for p in ("/lib", "/lib64", "/usr/lib", "/usr/lib64") if os.path.isdir(p)]
    own = [os.path.realpath(os.path.dirname(os.__file__)), os.path.realpath(f"{sys.base_prefix}/lib")]
    return [*system, *(p for p in own if not any(p == s or p.startswith(f"{s}/") for s in system))]


class Walls(Protocol):
    own_root: bool  # whether paths and process numbers mean nothing outside
    work: str  # the private directory, where the program starts
    folders: list[str]  # that can be read

    def prepare(self) -> None:
        """Raises: OSError that says what the machine does not give."""
        ...

    def fork(self) -> int: ...

    def enclose(self, max_processes: int) -> None:
        """In the child: no way back. What is left to do is the system call filter."""
        ...

    def clean(self) -> None:
        """After a program has ended: nothing of it is left."""
        ...

    def close(self) -> None:
        """After the last one."""
        ...


class Namespaces:
    """The launcher has a user, mount, process, network, IPC, host name and cgroup namespace of its own and a root that
    holds Python and nothing else; each process again its own mounts and process numbers, and an empty directory in
    memory. When the first process of those numbers ends, the kernel ends all the others."""

    own_root, work = True, WORK

    def __init__(self, limits: Limits):
        self.limits, self.folders = limits, python_folders()
        self._numbers = -1

    def prepare(self) -> None:
        was_root = os.geteuid() == 0
        self._new_namespaces(was_root)
        child = os.fork()  # the first process of the new numbers; this one only waits for it
        if child:
            os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
        kernel.die_with_parent(signal.SIGKILL)
        self._numbers = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self._new_root()

    def _new_namespaces(self, was_root: bool) -> None:
        uid, gid, me = os.geteuid(), os.getegid(), os.getpid()
        # Root keeps its number for a while, to read Python where only root can; programs get nobody's.
        maps = {True: ("0 0 1\n65534 65534 1\n",) * 2, False: (f"{NOBODY} {uid} 1\n", f"{NOBODY} {gid} 1\n")}[was_root]
        ready, go = os.pipe()
        mapper = os.fork() if was_root else None  # a map of two numbers is written by a process outside
        if mapper == 0:
            os.close(go)
            status = 1
            with suppress(OSError):
                if os.read(ready, 1):  # else the other side has failed
                    _write_maps(f"/proc/{me}", maps)
                    status = 0
            os._exit(status)
        kernel.unshare("user", "mount", "pid", "net", "ipc", "uts", "cgroup")
        if mapper is None:
            Path("/proc/self/setgroups").write_text("deny")
            _write_maps("/proc/self", maps)
        else:
            os.write(go, b"!")
            if os.waitpid(mapper, 0)[1]:
                raise OSError("the user numbers of a new user namespace cannot be written")
        os.close(ready)
        os.close(go)

    def _new_root(self) -> None:
        sources = [*self.folders, *DEVICES]
        opened = [os.open(s, os.O_PATH | os.O_CLOEXEC) for s in sources]
        kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
        root = tempfile.gettempdir()  # covered by the new root, for this process alone
        kernel.mount("tmpfs", root, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755,size=64k")
        for source, descriptor in zip(sources, opened, strict=True):
            target = Path(root + source)
            target.parent.mkdir(parents=True, exist_ok=True)
            if os.path.islink(source):
                target.symlink_to(os.readlink(source))
                continue
            if os.path.ismount(target) or target.exists():
                continue  # below one that is there already
            target.touch() if source in DEVICES else target.mkdir()
            kernel.mount(f"/proc/self/fd/{descriptor}", str(target), None, kernel.MS_BIND | kernel.MS_REC)
            flags = kernel.MS_NOSUID | kernel.MS_NOEXEC if source in DEVICES else kernel.MS_NOSUID | kernel.MS_NODEV
            kernel.lock_mount(str(target), flags | kernel.MS_RDONLY)
        for descriptor in opened:
            os.close(descriptor)
        Path(root + WORK).mkdir()
        kernel.pivot(root)
        kernel.lock_mount("/", kernel.MS_RDONLY)

    def fork(self) -> int:
        kernel.unshare("pid")
        child = os.fork()
        if child:
            kernel.enter(self._numbers, "pid")  # so that another one can be made
        return child

    def enclose(self, max_processes: int) -> None:
        os.setsid()
        kernel.unshare("mount")
        flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
        options = f"mode=777,size={self.limits.files_bytes},nr_inodes={_MAX_INODES}"
        kernel.mount("tmpfs", WORK, "tmpfs", flags, options)
        os.chdir(WORK)
        set_limits(self.limits, max_processes)
        kernel.drop_bounding_set()
        drop_user(NOBODY)
        # After a change of user a process is closed to all others; the launcher reads the paths that it asks about.
        kernel.prctl("opening memory to the launcher", kernel.PR_SET_DUMPABLE, 1)

    def clean(self) -> None:
        """The kernel has done it."""

    close = clean


class Landlock:
    """For machines without user namespaces (most containers): rules on paths, of the kernel's own. Weaker: names, sizes and
    times of files outside can be seen, the private directory is on disk and `files_bytes` bound each of 64 files, and
    processes are ended by the launcher, one by one."""

    own_root = False

    def __init__(self, limits: Limits):
        self.limits, self.folders = limits, python_folders()
        self._private = tempfile.mkdtemp(prefix="llmscale-sandbox-")
        self.work = f"{self._private}/work"

    def prepare(self) -> None:
        version = _landlock(0, 0, 1)
        if version < 1:
            raise OSError("Landlock is not enabled in this kernel")
        self.version = version
        if os.geteuid() == 0:
            try:
                os.chown(self._private, NOBODY, NOBODY)
            except OSError as error:
                raise OSError("user nobody has no number here, and root is too much") from error
            kernel.drop_bounding_set()
            os.setgroups([])
            drop_user(NOBODY)
            kernel.prctl("opening memory to the launcher", kernel.PR_SET_DUMPABLE, 1)
        unreadable = [p for p in self.folders if not os.access(p, os.R_OK | os.X_OK)]
        if unreadable:
            raise OSError(f"nobody may not read {unreadable[0]}, where Python is")
        if not self._children.exists():
            raise OSError(f"this kernel has no {self._children}, by which a program's processes are found")
        kernel.adopt_orphans()
        self.clean()

    def fork(self) -> int:
        launcher = os.getpid()
        child = os.fork()
        if not child:
            kernel.die_with_parent(signal.SIGKILL)
            if os.getppid() != launcher:
                os._exit(1)
        return child

    def enclose(self, max_processes: int) -> None:
        os.setsid()
        os.chdir(self.work)
        kernel.prctl("no new privileges", kernel.PR_SET_NO_NEW_PRIVS, 1)
        self._restrict()
        set_limits(self.limits, None)  # the user's other processes would count; the launcher counts these
        kernel.drop_capabilities()

    def _restrict(self) -> None:
        rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(self.version, 16)  # how many file rights this version knows
        every = (1 << rights) - 1
        write_file, read_file, read_dir, make_device = 1 << 1, 1 << 2, 1 << 3, (1 << 6) | (1 << 11)
        attributes = struct.pack("=QQQ", every, 3 if self.version >= 4 else 0, 3 if self.version >= 6 else 0)
        size = 24 if self.version >= 6 else 16 if self.version >= 4 else 8
        rules = _landlock(attributes, size, 0, "making Landlock rules")
        allowed = [(p, read_file | read_dir) for p in self.folders]
        allowed += [(p, read_file | write_file) for p in DEVICES] + [(self.work, every & ~make_device)]
        for path, access in allowed:
            descriptor = os.open(path, os.O_PATH)
            rule = struct.pack("=Qi", access, descriptor)
            kernel.syscall(f"allowing {path}", 445, rules, 1, rule, 0)
            os.close(descriptor)
        kernel.syscall("Landlock", 446, rules, 0)
        os.close(rules)

    @property
    def _children(self) -> Path:
        return Path(f"/proc/self/task/{os.getpid()}/children")

    def clean(self) -> None:
        """Processes whose parents ended belong to the launcher now: end them too, and empty the directory."""
        while True:
            for child in self._children.read_text().split():
                with suppress(ProcessLookupError):
                    os.kill(int(child), signal.SIGKILL)
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                break
        shutil.rmtree(self.work, ignore_errors=True)
        os.mkdir(self.work, 0o700)

    def close(self) -> None:
        shutil.rmtree(self._private, ignore_errors=True)


def set_limits(limits: Limits, max_processes: int | None) -> None:
    wanted = {
        resource.RLIMIT_AS: limits.memory_bytes,
        resource.RLIMIT_CPU: int(limits.timeout_s) + 2,
        resource.RLIMIT_FSIZE: max(limits.output_bytes, limits.files_bytes),
        resource.RLIMIT_NOFILE: _MAX_FILES,
        resource.RLIMIT_CORE: 1,  # with 0 the kernel would still hand the dump to a program that collects them
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 64,
    }
    if max_processes is not None:
        wanted[resource.RLIMIT_NPROC] = max_processes
    for what, value in wanted.items():
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))


def drop_user(identity: int) -> None:
    """Become `identity`, for good: without capabilities, and with no program file that could give any."""
    if os.getuid() != identity:
        os.setgroups([])
        os.setresgid(identity, identity, identity)
        os.setresuid(identity, identity, identity)
    kernel.drop_capabilities()
    kernel.prctl("no new privileges", kernel.PR_SET_NO_NEW_PRIVS, 1)


def _write_maps(process: str, maps: Sequence[str]) -> None:
    Path(process, "uid_map").write_text(maps[0])
    Path(process, "gid_map").write_text(maps[1])


def _landlock(attributes: bytes | int, size: int, flags: int, what: str = "Landlock") -> int:
    return kernel.syscall(what, 444, attributes, size, flags)
