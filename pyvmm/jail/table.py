"""The table of system calls: which kind of thread may make which one, with what, and why.

The filters (``programs.py``) and the tables of docs/jail.md are generated from it.  A system call
that no rule names ends the process.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import signal
import termios
from dataclasses import dataclass

from pyvmm.jail.bpf import OWN_PID, Test
from pyvmm.jail.ioctls import KVM, PAGEMAP_SCAN

KINDS = {
    "vcpu": "sits in KVM_RUN and answers port and register accesses",
    "vcpu-elsewhere": "the same, of a machine with a disk that another process serves (vhost-user)",
    "vcpu-serving": "the same, and serves disks itself (`--serve exit`)",
    "disk": "serves the queues of a disk in a file or in memory",
    "disk-network": "serves the queues of a disk behind an NBD server",
    "disk-elsewhere": "watches the socket of a vhost-user back end",
    "console": "serves the virtio console and the gathered bytes of the UART",
    "entropy": "serves the entropy device",
    "agent": "serves the port of the agent in the guest",
    "device": "serves a device or a disk that a script brings (library only)",
    "control": "talks to the clients of `--control` and to the agent",
    "snapshot": "takes snapshots and checkpoints, and rewinds",
    "main": "keeps house: console, keys, signals, deadlines, the start and the end of the others",
    "main-export": "`pyvmm export`: serves a disk to another process's guest",
}
"""The kinds of threads, and what each does."""

ALL = tuple(KINDS)
VCPUS = ("vcpu", "vcpu-elsewhere", "vcpu-serving")
FILES = ("vcpu-serving", "disk", "device", "control", "snapshot", "main", "main-export")
"""Kinds that read, write, flush or close disks: the last ones for snapshots and at the end."""
SOCKETS = (
    "vcpu-elsewhere", "vcpu-serving", "disk-network", "disk-elsewhere", "console", "agent",
    "device", "control", "snapshot", "main", "main-export",
)
SAVERS = ("control", "snapshot", "main")
"""Kinds that take, or put back, the state of the whole machine."""


@dataclass(frozen=True)
class Rule:
    """``kinds`` may make the system call ``syscall`` if all tests of ``when`` are true.

    ``condition`` says in words what ``when`` tests.  Rules for the same system call add up.
    """

    syscall: str
    kinds: tuple[str, ...]
    why: str
    condition: str = ""
    when: tuple[Test, ...] = ()


@dataclass(frozen=True)
class Refusal:
    """``syscall`` fails with ``error`` in every kind that has no rule for it; nothing is killed."""

    syscall: str
    error: int
    why: str


def _rules(names: str, kinds: tuple[str, ...], why: str) -> tuple[Rule, ...]:
    return tuple(Rule(name, kinds, why) for name in names.split())


def _ioctls(names: str, kinds: tuple[str, ...], why: str) -> tuple[Rule, ...]:
    return tuple(
        Rule("ioctl", kinds, why, name, (Test(1, (REQUESTS[name],)),)) for name in names.split()
    )


REQUESTS = {
    **KVM,
    "PAGEMAP_SCAN": PAGEMAP_SCAN,
    **{name: getattr(termios, name) for name in (
        "TCGETS", "TCSETS", "TCFLSH", "TIOCGPGRP", "TIOCGWINSZ", "TIOCOUTQ", "FIONBIO",
        "FIOCLEX",
    )},
}
"""The requests of ioctl that a rule names."""

_FUTEX_OPERATIONS = (0, 1, 3, 4, 5, 9, 10)
"""FUTEX_WAIT, WAKE, REQUEUE, CMP_REQUEUE, WAKE_OP, WAIT_BITSET and WAKE_BITSET."""
_CLONE_THREAD_FLAGS = 0x3D0F00
"""What pthread_create asks for: CLONE_VM, FS, FILES, SIGHAND, THREAD, SYSVSEM, SETTLS,
PARENT_SETTID and CHILD_CLEARTID."""
_CLONE_FORK_FLAGS = 0x0120_0011
"""What fork asks for: CLONE_CHILD_SETTID, CHILD_CLEARTID and SIGCHLD."""
_PROT_EXEC = Test(2, (0,), mmap.PROT_EXEC)
_NOT_EXECUTABLE = "without PROT_EXEC"

MEMORY = (
    Rule("mmap", ALL, "memory of Python and the C library", _NOT_EXECUTABLE, (_PROT_EXEC,)),
    Rule("mprotect", ALL, "the C library's heaps of threads", _NOT_EXECUTABLE, (_PROT_EXEC,)),
    *_rules("munmap mremap brk madvise", ALL, "memory of Python and the C library"),
)

THREADS = (
    Rule(
        "futex", ALL, "locks, and the end of threads", "plain waits and wakes, no priorities",
        (Test(1, _FUTEX_OPERATIONS, 0x7F),),
    ),
    *_rules("rt_sigprocmask rt_sigreturn", ALL, "signals: the kick of a vCPU, and a person's"),
    Rule("restart_syscall", ALL, "Linux goes on with a wait after SIGCONT"),
    *_rules("getpid gettid", ALL, "the C library sends a signal to a thread, and in abort()"),
    Rule(
        "tgkill", ALL, "kick a vCPU out of KVM_RUN; abort()", "own threads; SIGRTMIN or SIGABRT",
        (Test(0, (OWN_PID,)), Test(2, (signal.SIGRTMIN, signal.SIGABRT))),
    ),
    *_rules("sched_yield", ALL, "the C library and Python wait for each other"),
    *_rules("sched_getaffinity", ALL, "the C library's count of heaps"),
    *_rules("exit exit_group", ALL, "the end of a thread, and of the process"),
)

CLOCKS = _rules(
    "clock_gettime clock_nanosleep gettimeofday time getcpu", ALL,
    "clocks, if the kernel has no clock page",
)

WAITING = (
    *_rules("read write close", ALL, "doorbells, interrupts, pipes: descriptors that are open"),
    *_rules("epoll_wait epoll_ctl poll", ALL, "wait for them"),
    *_rules("fstat", ALL, "the size and kind of an open file"),
)

FILE_IO = (
    *_rules(
        "preadv pwritev preadv2 pwritev2 pread64 pwrite64 readv writev lseek fdatasync fsync"
        " fallocate ftruncate copy_file_range",
        FILES, "requests of a disk",
    ),
    Rule("fcntl", FILES, "locks of disks, flags, seals, copies", "a few commands", (
        Test(1, (
            fcntl.F_GETFD, fcntl.F_GETFL, fcntl.F_SETFL, fcntl.F_DUPFD_CLOEXEC, fcntl.F_OFD_SETLK,
            fcntl.F_ADD_SEALS, fcntl.F_GET_SEALS, 1024 + 10,
        )),
    )),
)

SOCKET_IO = _rules(
    "sendto sendmsg recvfrom recvmsg shutdown getsockopt setsockopt getsockname getpeername",
    SOCKETS, "a socket that is open",
)

RANDOM = _rules("getrandom", ALL, "random numbers")

VCPU_IOCTLS = (
    *_ioctls("KVM_RUN", VCPUS, "run the guest"),
    *_ioctls(
        "KVM_GET_REGS KVM_GET_SREGS KVM_GET_MP_STATE KVM_TRANSLATE KVM_GET_LAPIC KVM_GET_IRQCHIP",
        VCPUS, "tell a halt for good, and describe how a vCPU ended",
    ),
    *_ioctls("KVM_KVMCLOCK_CTRL", VCPUS, "tell the guest that it was paused"),
    *_ioctls(
        "KVM_IRQ_LINE KVM_REGISTER_COALESCED_MMIO KVM_UNREGISTER_COALESCED_MMIO", ALL,
        "the UART's interrupt, and its gathered bytes",
    ),
)

TERMINAL = _ioctls(
    "TCGETS TCSETS TCFLSH TIOCGPGRP TIOCGWINSZ TIOCOUTQ", ("main", "console", "control"),
    "the terminal's modes, size and owner",
)

DESCRIPTORS = _ioctls(
    "FIONBIO FIOCLEX", ALL, "Python makes a descriptor non-blocking, or close on exec"
)

MAIN = (
    *_rules("rt_sigaction sigaltstack", ("main", "main-export", "control"), "handlers at the end"),
    *_rules("getpgrp getppid getpgid", ("main",), "tell whether the terminal is ours"),
    Rule(
        "kill", ("main", "control", "snapshot"), "end, or stop, this process itself",
        "own process", (Test(0, (OWN_PID,)),),
    ),
    *_rules("dup dup3 eventfd2 epoll_create1 pipe2", SAVERS, "another run after a rewind"),
    *_rules("set_robust_list rseq", SAVERS, "a new thread"),
    *_rules("wait4", SAVERS, "the end of a child that wrote RAM"),
    *_rules("accept4", ("control", "main-export"), "a new client"),
)

NEW_TASKS = (
    Rule(
        "clone", SAVERS, "a new thread, after a rewind", "the flags of pthread_create",
        (Test(0, (_CLONE_THREAD_FLAGS,)),),
    ),
    Rule(
        "clone", SAVERS, "a child that copies RAM while the guest goes on", "the flags of fork",
        (Test(0, (_CLONE_FORK_FLAGS,)),),
    ),
)

STATE = (
    *_rules("memfd_create", SAVERS, "RAM of a snapshot in memory"),
    *_ioctls(
        " ".join(name for name in KVM if name.startswith(("KVM_GET_", "KVM_SET_")) and name not in (
            "KVM_SET_USER_MEMORY_REGION", "KVM_SET_TSS_ADDR", "KVM_SET_IDENTITY_MAP_ADDR",
            "KVM_SET_CPUID2", "KVM_GET_API_VERSION", "KVM_GET_VCPU_MMAP_SIZE",
            "KVM_GET_SUPPORTED_CPUID",
        )),
        SAVERS, "the state of the vCPUs and the chips",
    ),
    *_ioctls("PAGEMAP_SCAN", SAVERS, "the pages that the guest has written"),
)

RULES: tuple[Rule, ...] = (
    *MEMORY, *THREADS, *CLOCKS, *WAITING, *RANDOM, *FILE_IO, *SOCKET_IO, *VCPU_IOCTLS, *TERMINAL,
    *DESCRIPTORS, *MAIN, *NEW_TASKS, *STATE,
)

_NO_PATHS = "Python looks for a file, a source line or a module: it is told that it may not"
REFUSED: tuple[Refusal, ...] = (
    *(Refusal(name, errno.EACCES, _NO_PATHS) for name in (
        "open", "openat", "stat", "lstat", "newfstatat", "statx", "access", "faccessat",
        "faccessat2", "readlink", "readlinkat", "getcwd",
    )),
    Refusal("clone3", errno.ENOSYS, "the C library then asks clone, whose flags can be seen"),
)
"""Refused rather than killed: a mistake of ours, or a library's habit, must not end the machine."""
