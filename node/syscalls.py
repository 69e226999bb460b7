"""What a process that only computes may still ask of the kernel: a seccomp filter, written out.

Rules:
- What is refused here is what a process would need that was taken over, and none that computes: new processes and programs,
  sockets, namespaces and mounts, other processes, keyrings, not to die with its parent, and doors of the kernel through which
  others have got out before.
- It is a list of what is refused, so that libraries and drivers that we have not seen go on; the walls proper are the sandbox's.
- For good: a filter cannot be taken off, and threads and whatever else comes after have it too.

bubblewrap alone leaves these open (tried from inside, `node.testing.hostile_engine`): a child can ask not to be killed with its
parent, multiply, and so pass every limit on memory; sockets of virtual machines (AF_VSOCK) and keyrings know no namespace.

Sources: seccomp(2); Linux's Documentation/userspace-api/seccomp_filter.rst; numbers from asm/unistd.h of both machines.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

_ARCHES: Final[Mapping[str, tuple[int, int]]] = MappingProxyType(
    {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
)
"""Column of the numbers below, and AUDIT_ARCH."""

_Numbers = Mapping[str, tuple[int, int]]
REFUSED: Final[_Numbers] = MappingProxyType(
    {
        # other programs and processes
        "fork": (57, -1),
        "vfork": (58, -1),
        "execve": (59, 221),
        "execveat": (322, 281),
        "ptrace": (101, 117),
        "process_vm_readv": (310, 270),
        "process_vm_writev": (311, 271),
        "process_madvise": (440, 440),
        "pidfd_open": (434, 434),
        "pidfd_getfd": (438, 438),
        "pidfd_send_signal": (424, 424),
        "rt_sigqueueinfo": (129, 138),
        "rt_tgsigqueueinfo": (297, 240),
        "setpriority": (141, 140),
        "sched_setscheduler": (144, 119),
        "sched_setparam": (142, 118),
        "sched_setattr": (314, 274),
        "ioprio_set": (251, 30),
        # the outside; a pair of sockets can still be made
        "socket": (41, 198),
        "connect": (42, 203),
        "bind": (49, 200),
        "listen": (50, 201),
        "accept": (43, 202),
        "accept4": (288, 242),
        # namespaces and mounts
        "unshare": (272, 97),
        "setns": (308, 268),
        "mount": (165, 40),
        "umount2": (166, 39),
        "pivot_root": (155, 41),
        "chroot": (161, 51),
        "open_tree": (428, 428),
        "move_mount": (429, 429),
        "fsopen": (430, 430),
        "fsmount": (432, 432),
        "mount_setattr": (442, 442),
        # what no namespace divides, or what is shared memory without a limit
        "add_key": (248, 217),
        "request_key": (249, 218),
        "keyctl": (250, 219),
        "shmget": (29, 194),
        "msgget": (68, 186),
        "semget": (64, 190),
        "mq_open": (240, 180),
        # doors of the kernel
        "bpf": (321, 280),
        "userfaultfd": (323, 282),
        "perf_event_open": (298, 241),
        "io_uring_setup": (425, 425),
        "io_uring_enter": (426, 426),
        "io_uring_register": (427, 427),
    }
)
"""By number, on x86-64 and on arm64; -1 where there is no such call."""
UNCOUNTED: Final[_Numbers] = MappingProxyType(
    {
        "memfd_create": (319, 279),
        "memfd_secret": (447, 447),
        "mkdir": (83, -1),
        "mkdirat": (258, 34),
        "mknod": (133, -1),
        "mknodat": (259, 33),
        "symlink": (88, -1),
        "symlinkat": (266, 36),
        "creat": (85, -1),
    }
)
"""Memory that no limit of a process counts, and files in memory; refused too where a process computes on the CPU alone."""
_LATER: Final[_Numbers] = MappingProxyType({"clone3": (435, 435), "openat2": (437, 437)})
"""Their arguments lie where no filter looks; libraries fall back on the older call when these are said not to exist."""
_CLONE, _KILL, _TKILL, _TGKILL = (56, 220), (62, 129), (200, 130), (234, 131)
_PRCTL, _PRLIMIT, _MMAP, _OPEN, _OPENAT = (157, 167), (302, 261), (9, 222), (2, -1), (257, 56)

_CLONE_THREAD: Final = 0x10000
_SHARED_ANONYMOUS: Final = 0x21
_CREATES: Final = 0x40 | 0x400000
"""O_CREAT and what tells O_TMPFILE from O_DIRECTORY."""
_LOAD, _EQUAL, _AND, _RETURN = 0x20, 0x15, 0x54, 0x06
_ALLOW: Final = 0x7FFF0000
_ERRNO: Final = 0x00050000
_ARGUMENT: Final = tuple(16 + 8 * n for n in range(6))
"""Offsets of the lower halves of the arguments; little-endian machines both."""
PR_SET_SECCOMP: Final = 22

_Line = tuple[int, int, int, int]
"""One instruction of BPF: code, jump if true, jump if false, value."""


def refuse(*, cpu_only: bool) -> bool:
    """Put the filter on this process, for good. False: this system has none, or does not let us. `no_new_privs` must be set."""
    machine = _ARCHES.get(os.uname().machine) if sys.platform == "linux" else None
    if machine is None or sys.maxsize < 1 << 32:
        return False
    program = _program(*machine, os.getpid(), cpu_only)
    raw = b"".join(struct.pack("<HBBI", *line) for line in program)
    lines = ctypes.create_string_buffer(raw, len(raw))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(lines)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    return int(prctl(PR_SET_SECCOMP, 2, header, 0, 0)) == 0


def _program(column: int, arch: int, own: int, cpu_only: bool) -> list[_Line]:
    lines: list[_Line] = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, arch),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
        (_LOAD, 0, 0, 0),
    ]
    if column == 0:
        lines += [(0x35, 0, 1, 0x40000000), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]  # x32 has numbers of its own

    def rule(numbers: tuple[int, int], *test: _Line, error: int = errno.EPERM) -> None:
        """For one call: lines that fall through to a refusal, and jump over it (1 line) to let the call pass."""
        number = numbers[column]
        if number >= 0:
            body = [*test, (_RETURN, 0, 0, _ERRNO | error)]
            lines.extend([(_EQUAL, 0, len(body) + (1 if test else 0), number), *body])
            if test:
                lines.append((_RETURN, 0, 0, _ALLOW))

    for numbers in REFUSED.values():
        rule(numbers)
    for numbers in _LATER.values():
        rule(numbers, error=errno.ENOSYS)
    rule(_CLONE, *_unless_any(0, _CLONE_THREAD))
    for call in (_KILL, _TGKILL):
        rule(call, (_LOAD, 0, 0, _ARGUMENT[0]), (_EQUAL, 1, 0, own))
    rule(_TKILL)
    rule(_PRLIMIT, (_LOAD, 0, 0, _ARGUMENT[0]), (_EQUAL, 1, 0, 0))
    # PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_PTRACER: fall to the refusal, all else jumps over it
    rule(
        _PRCTL,
        (_LOAD, 0, 0, _ARGUMENT[0]),
        (_EQUAL, 2, 0, 1),
        (_EQUAL, 1, 0, 4),
        (_EQUAL, 0, 1, 0x59616D61),
    )
    if cpu_only:
        for numbers in UNCOUNTED.values():
            rule(numbers)
        rule(_MMAP, (_LOAD, 0, 0, _ARGUMENT[3]), (_AND, 0, 0, _SHARED_ANONYMOUS), (_EQUAL, 0, 1, _SHARED_ANONYMOUS))
        rule(_OPEN, *_if_any(1, _CREATES), error=errno.EROFS)
        rule(_OPENAT, *_if_any(2, _CREATES), error=errno.EROFS)
    return [*lines, (_RETURN, 0, 0, _ALLOW)]


def _unless_any(argument: int, bits: int) -> tuple[_Line, ...]:
    """Let it pass where any of these bits is set."""
    return (_LOAD, 0, 0, _ARGUMENT[argument]), (_AND, 0, 0, bits), (_EQUAL, 0, 1, 0)


def _if_any(argument: int, bits: int) -> tuple[_Line, ...]:
    """Let it pass where none of these bits is set."""
    return (_LOAD, 0, 0, _ARGUMENT[argument]), (_AND, 0, 0, bits), (_EQUAL, 1, 0, 0)
