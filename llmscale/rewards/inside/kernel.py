"""The calls of Linux that Python has no function for. Numbers are those of x86-64."""

from __future__ import annotations

import ctypes
import os
import struct

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

NEW_NAMESPACES = {  # flag of clone(2) and unshare(2) -> what it makes private
    "user": 0x10000000,
    "mount": 0x00020000,
    "pid": 0x20000000,
    "net": 0x40000000,
    "ipc": 0x08000000,
    "uts": 0x04000000,
    "cgroup": 0x02000000,
}
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE, MS_REMOUNT = 4096, 16384, 1 << 18, 32
_MNT_DETACH = 2
_AT_EMPTY_PATH, _AT_RECURSIVE = 0x1000, 0x8000
_PIVOT_ROOT, _SETNS, _PROCESS_VM_READV, _CAPSET, _MOUNT_SETATTR = 155, 308, 310, 126, 442
_PR_SET_PDEATHSIG, PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 36, 38
LAST_CAPABILITY = 40
PAGE = 4096


def syscall(what: str, number: int, *args: object) -> int:
    """Raises: OSError that says `what` failed."""
    result = _libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) if isinstance(a, int) else a for a in args])
    return _checked(what, result)


def _checked(what: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def unshare(*names: str) -> None:
    _checked(f"new {', '.join(names)} namespace", _libc.unshare(sum(NEW_NAMESPACES[name] for name in names)))


def enter(namespace: int, name: str) -> None:
    syscall(f"entering the {name} namespace", _SETNS, namespace, NEW_NAMESPACES[name])


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind)]
    result = _libc.mount(*encoded, ctypes.c_ulong(flags), options.encode() or None)
    _checked(f"mounting {target}", result)


def lock_mount(target: str, flags: int) -> None:
    """Add MS_ flags to a mount and to all below it, and keep those that it has."""
    attributes = struct.pack(
        "=QQQQ", flags, 0, 0, 0
    )  # the first four are also MOUNT_ATTR_RDONLY, _NOSUID, _NODEV, _NOEXEC
    directory = os.open(target, os.O_PATH)
    try:
        flags_at = _AT_EMPTY_PATH | _AT_RECURSIVE
        syscall(f"locking {target}", _MOUNT_SETATTR, directory, b"", flags_at, attributes, len(attributes))
    finally:
        os.close(directory)


def pivot(new_root: str) -> None:
    """Make `new_root`, a mount point, the root; nothing of the old one can be reached any more."""
    os.chdir(new_root)
    syscall("pivot_root", _PIVOT_ROOT, b".", b".")
    _checked("leaving the old root", _libc.umount2(b".", _MNT_DETACH))
    os.chdir("/")


def prctl(what: str, option: int, value: int) -> None:
    _checked(what, _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0))


def die_with_parent(signal: int) -> None:
    prctl("tying a process to its parent", _PR_SET_PDEATHSIG, signal)


def adopt_orphans() -> None:
    prctl("adopting orphans", _PR_SET_CHILD_SUBREAPER, 1)


def drop_bounding_set() -> None:
    for capability in range(LAST_CAPABILITY + 1):
        prctl("dropping capabilities", _PR_CAPBSET_DROP, capability)


def drop_capabilities() -> None:
    header = struct.pack("=Ii", 0x20080522, 0)
    syscall("dropping capabilities", _CAPSET, header, bytes(24))


def read_string(pid: int, address: int, limit: int = PAGE) -> str:
    """The C string at an address of another process; what can be read of it."""
    found = b""
    while len(found) < limit and b"\0" not in found:
        size = PAGE - (address + len(found)) % PAGE  # never over the end of a page: the next one may not be there
        buffer = ctypes.create_string_buffer(size)
        local = struct.pack("=QQ", ctypes.addressof(buffer), size)
        remote = struct.pack("=QQ", address + len(found), size)
        try:
            syscall("reading a path", _PROCESS_VM_READV, pid, local, 1, remote, 1, 0)
        except OSError:
            break
        found += buffer.raw
    return os.fsdecode(found.partition(b"\0")[0])
