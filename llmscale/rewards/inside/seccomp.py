"""Which system calls a program can make, as a seccomp filter; the kernel asks the launcher about those that need a look.

What is not listed is refused with EPERM: whole families (io_uring, bpf, keyrings, tracing, namespaces, shared memory
segments, memory files) that a Python program needs not, and through which kernels have been broken into. Numbers are those
of x86-64; the filter kills a process that calls by another convention (i386, x32).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import struct
from dataclasses import dataclass

from llmscale.rewards.inside.kernel import NEW_NAMESPACES, syscall

OPENAT, OPEN, CREAT, SOCKET, CLONE, FORK, VFORK, SYMLINK, SYMLINKAT = 257, 2, 85, 41, 56, 57, 58, 88, 266
STARTS = (CLONE, FORK, VFORK)
CHANGES_PATH = {  # call -> which of its arguments are paths that it changes
    83: (0,),  # mkdir
    258: (1,),  # mkdirat
    84: (0,),  # rmdir
    87: (0,),  # unlink
    263: (1,),  # unlinkat
    82: (0, 1),  # rename
    264: (1, 3),  # renameat
    316: (1, 3),  # renameat2
    86: (0, 1),  # link
    265: (1, 3),  # linkat
}
ASKED = (OPENAT, OPEN, CREAT, SOCKET, *STARTS, SYMLINK, SYMLINKAT, *CHANGES_PATH)

# fmt: off
_ALLOWED = (
    0, 1, 3, 4, 5, 6, 7, 8,  # read write close stat fstat lstat poll lseek
    9, 10, 11, 12, 13, 14, 15,  # mmap mprotect munmap brk, signal handlers
    17, 18, 19, 20, 295, 296, 327, 328,  # pread pwrite, vectors
    21, 22, 23, 24, 25, 26, 27, 28, 32, 33, 34, 35, 36, 37, 38, 39, 40,  # access pipe select ... alarm setitimer getpid
    44, 45, 46, 47, 48, 51, 52, 54, 55, 299, 307,  # sending over a socket that there is
    60, 61, 63, 73, 74, 75, 77, 79, 80, 81, 89, 95, 96, 97, 98, 99, 100,  # exit wait4 uname flock fsync ... getrusage times
    102, 104, 107, 108, 110, 111, 115, 118, 120, 121, 124,  # who am I
    109, 112,  # setpgid setsid
    127, 128, 130, 131, 140, 160, 186, 201, 202, 204, 217, 218, 219, 221,  # signals, priority, futex, getdents64
    228, 229, 230, 231, 232, 233, 247, 262, 267, 269, 270, 271, 273, 274, 275, 276,
    281, 283, 284, 285, 286, 287, 289, 290, 291, 292, 293,  # epoll, timers and events by descriptor, dup3 pipe2
    309, 318, 324, 326, 332, 334, 436, 439, 441, 449,  # getcpu getrandom membarrier copy_file_range statx rseq close_range
)
_NEEDS_OWN_ROOT = (62, 200, 234, 76, 90, 91, 268, 235, 261, 280)  # kill tkill tgkill truncate chmod utimes
# fmt: on

_IOCTL, _FCNTL, _PRCTL, _PRLIMIT64, _SOCKETPAIR, _CLONE3, _EXECVE, _EXECVEAT = 16, 72, 157, 302, 53, 435, 59, 322
_KILL, _TGKILL, _SECCOMP = 62, 234, 317
_TERMINAL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS TIOCGWINSZ FIONREAD FIONBIO FIONCLEX FIOCLEX
_F_SETOWN, _F_SETOWN_EX, _PR_SET_NAME, _AF_UNIX = 8, 15, 15, 1
_STREAM = (1, 1 | 0x800, 1 | 0x80000, 1 | 0x80800)  # SOCK_STREAM, perhaps with _NONBLOCK and _CLOEXEC

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF opcodes
_ALLOW, _ASK, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x7FC00000, 0x80000000, 0x00050000
_X86_64, _X32_BIT = 0xC000003E, 0x40000000
_NUMBER_AT, _ARCH_AT, _ARGS_AT = 0, 4, 16  # offsets in struct seccomp_data
_NEW_LISTENER, _FILTER_MODE = 8, 1
_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV, _SEND
_GO_ON = 1  # SECCOMP_USER_NOTIF_FLAG_CONTINUE

Code = list[tuple[int, int, int, int]]


def install(own_root: bool, pid: int) -> int:
    """Filter this process and all that it starts; needs no_new_privs. The descriptor on which the kernel asks.

    Without a file system and process numbers of its own (`own_root`) a program may not change what a path names, nor send
    a signal to any process but `pid`, itself.
    """
    code = _code(own_root, pid)
    array = b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
    buffer = ctypes.create_string_buffer(array)
    program = struct.pack("=HxxxxxxQ", len(code), ctypes.addressof(buffer))
    return syscall("installing the system call filter", _SECCOMP, _FILTER_MODE, _NEW_LISTENER, program)


def _code(own_root: bool, pid: int) -> Code:
    code: Code = [
        (_LOAD, 0, 0, _ARCH_AT),
        (_EQUAL, 1, 0, _X86_64),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_AT_LEAST, 0, 1, _X32_BIT),
        (_RETURN, 0, 0, _KILL_PROCESS),
    ]
    namespaces = sum(NEW_NAMESPACES.values())
    code += _when(CLONE, 0, [(_ANY_BIT, 0, 1, namespaces), _refuse(errno.EPERM), (_RETURN, 0, 0, _ASK)])
    code += _when(_IOCTL, 1, _only(_TERMINAL, errno.ENOTTY))
    code += _when(_FCNTL, 1, _all_but((_F_SETOWN, _F_SETOWN_EX)))
    code += _when(_PRCTL, 0, _only((_PR_SET_NAME,)))
    code += _when(_PRLIMIT64, 0, _only((0,)))
    # A pair of datagram sockets could still send to any address; a pair of streams is a pipe.
    second = (_LOAD, 0, 0, _ARGS_AT + 8)
    code += _when(_SOCKETPAIR, 0, [(_EQUAL, 1, 0, _AF_UNIX), _refuse(errno.EPERM), second, *_only(_STREAM)])
    if not own_root:
        code += _when(_KILL, 0, _only((0, pid)))
        code += _when(_TGKILL, 0, _only((pid,)))
    for number, answer in (
        *((n, _ASK) for n in ASKED if n != CLONE),
        (
            _CLONE3,
            _ERRNO | errno.ENOSYS,
        ),  # its flags lie in memory, which a filter cannot read; libc falls back to clone
        (_EXECVE, _ERRNO | errno.EACCES),
        (_EXECVEAT, _ERRNO | errno.EACCES),
        *((n, _ALLOW) for n in (*_ALLOWED, *(_NEEDS_OWN_ROOT if own_root else ()))),
    ):
        code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, answer)]
    return [*code, _refuse(errno.EPERM)]


def _when(number: int, argument: int, then: Code) -> Code:
    """`then` decides about this call by the low half of an argument: all of those tested are ints to the kernel."""
    return [(_EQUAL, 0, len(then) + 1, number), (_LOAD, 0, 0, _ARGS_AT + 8 * argument), *then]


def _only(values: tuple[int, ...], otherwise: int = errno.EPERM) -> Code:
    allow = [step for v in values for step in ((_EQUAL, 0, 1, v), (_RETURN, 0, 0, _ALLOW))]
    return [*allow, _refuse(otherwise)]


def _all_but(values: tuple[int, ...]) -> Code:
    return [*(step for v in values for step in ((_EQUAL, 0, 1, v), _refuse(errno.EPERM))), (_RETURN, 0, 0, _ALLOW)]


def _refuse(number: int) -> tuple[int, int, int, int]:
    return (_RETURN, 0, 0, _ERRNO | number)


@dataclass(frozen=True)
class Call:
    """A system call that waits for an answer."""

    id: int
    pid: int  # as this process counts
    number: int
    args: tuple[int, ...]  # 6


def receive(listener: int) -> Call | None:
    """None when the caller was killed meanwhile."""
    buffer = bytearray(80)
    try:
        fcntl.ioctl(listener, _RECEIVE, buffer)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINTR):
            return None
        raise
    call_id, pid, _, number, _, _, *args = struct.unpack("=QIIiIQ6Q", buffer)
    return Call(call_id, pid, number, tuple(args))


def go_on(listener: int, call: Call) -> None:
    try:
        fcntl.ioctl(listener, _SEND, bytearray(struct.pack("=QqiI", call.id, 0, 0, _GO_ON)))
    except OSError as error:
        if error.errno != errno.ENOENT:  # killed meanwhile
            raise
