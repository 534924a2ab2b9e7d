"""The table of system calls: which kind of thread may make which one, with what, and why.

The filters (``programs.py``) and the tables of docs/jail.md are generated from it.  A system call
that no rule names ends the process, but for those in ``REFUSED``, which fail.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import signal
import socket
from dataclasses import dataclass

from pyvmm.jail.bpf import OWN_PID, Condition
from pyvmm.jail.ioctls import KVM, REQUESTS

KINDS = {
    "vcpu": "Sits in KVM_RUN and answers port and register accesses",
    "vcpu-elsewhere": "The same, in a machine with a disk that another process serves",
    "vcpu-serving": "The same, and serves the disks itself (`--serve exit`)",
    "disk": "Serves the queues of a disk in files or memory",
    "disk-network": "Serves the queues of a disk on an NBD server, or of an overlay of it",
    "disk-elsewhere": "Watches the socket of a vhost-user back end",
    "console": "Serves the virtio console and the UART's gathered bytes",
    "entropy": "Serves the entropy device",
    "agent": "Serves the port of the agent in the guest",
    "device": "Serves a device or a disk that a script brings (only in the library)",
    "control": "Serves the clients of `--control`, and their jobs for the agent",
    "snapshot": "Saves and rewinds the machine, and starts the threads of a rewound one; so it has"
    " all that those have, besides the following",
    "main": "Keeps house: console, keys, signals, deadlines, and the end of all others",
    "main-export": "`pyvmm export`: serves a disk to another process",
    "export-watch": "`pyvmm export`: ends a write that a peer makes wait",
}
"""The kinds of threads, and what each does."""

ALL = tuple(KINDS)
VCPUS = ("vcpu", "vcpu-elsewhere", "vcpu-serving")
DISKS = ("vcpu-serving", "disk", "disk-network", "device")
"""Kinds that read and write files of disks; an overlay of a disk on a server is one."""
CLOSERS = (*DISKS, "main", "main-export")
"""These, and the kinds that close disks: an overlay is flushed then."""
PEERS = ("vcpu-elsewhere", "vcpu-serving", "disk-network", "disk-elsewhere", "device", "main")
"""Kinds that speak to the server or the back end of a disk; ``main`` at the end."""
HEIR = "snapshot"
"""It starts the threads of a rewound machine.  Such a thread stays under the filter of its maker,
besides its own: so this kind has every rule of theirs."""
SAVER = (HEIR,)
_STARTED_BY_HEIR = {*ALL} - {"device", "control", "main-export", "export-watch"}


@dataclass(frozen=True)
class Rule:
    """``kinds`` may make the system call ``syscall`` if all conditions of ``when`` are true.

    ``only`` says in words what ``when`` tests.  Rules for the same system call add up.
    """

    syscall: str
    kinds: tuple[str, ...]
    why: str
    only: str = ""
    when: tuple[Condition, ...] = ()

    def __post_init__(self) -> None:
        if HEIR not in self.kinds and _STARTED_BY_HEIR & {*self.kinds}:
            object.__setattr__(self, "kinds", (*self.kinds, HEIR))

    @property
    def is_own_of_heir(self) -> bool:
        """True if the heir has this rule for itself, and not for a thread that it starts."""
        return not (_STARTED_BY_HEIR - {HEIR}) & {*self.kinds}


@dataclass(frozen=True)
class Refusal:
    """``syscall`` fails with ``error`` unless a rule allows it: the process goes on."""

    syscall: str
    error: int
    why: str


def _rules(names: str, kinds: tuple[str, ...], why: str) -> tuple[Rule, ...]:
    return tuple(Rule(name, kinds, why) for name in names.split())


def _ioctls(names: str, kinds: tuple[str, ...], why: str) -> tuple[Rule, ...]:
    return tuple(
        Rule("ioctl", kinds, why, name, (Condition(1, (REQUESTS[name],)),))
        for name in names.split()
    )


def _one_of(
    syscall: str, argument: int, values: dict[str, int], kinds: tuple[str, ...], why: str,
    *, mask: int = 0xFFFF_FFFF,
) -> Rule:
    """Return the rule that allows ``syscall`` with these values, by name, of one argument."""
    return Rule(
        syscall, kinds, why, ", ".join(values), (Condition(argument, tuple(values.values()), mask),)
    )


_NOT_EXECUTABLE = Condition(2, (0,), mmap.PROT_EXEC)
_ANONYMOUS = Condition(3, (mmap.MAP_ANONYMOUS,), mmap.MAP_ANONYMOUS)
_OWN = Condition(0, (OWN_PID,))
_MAPPERS = ("snapshot", "main-export", "device")
_PYTHON = "memory for Python and the C library"

MEMORY = (
    Rule(
        "mmap", tuple(kind for kind in ALL if kind not in _MAPPERS), _PYTHON,
        "anonymous, without PROT_EXEC", (_NOT_EXECUTABLE, _ANONYMOUS),
    ),
    Rule(
        "mmap", _MAPPERS, "RAM over an image, a peer's memory", "without PROT_EXEC",
        (_NOT_EXECUTABLE,),
    ),
    Rule("mprotect", ALL, "heaps and stacks of threads", "without PROT_EXEC", (_NOT_EXECUTABLE,)),
    *_rules("munmap mremap brk", ALL, _PYTHON),
    _one_of(
        "madvise", 2,
        {"MADV_DONTNEED": 4, "MADV_FREE": 8, "MADV_HUGEPAGE": 14},
        ALL, "the C library gives memory back",
    ),
    _one_of(
        "madvise", 2, {"MADV_DONTFORK": 10, "MADV_DOFORK": 11, "MADV_GUARD_INSTALL": 102,
         "MADV_GUARD_REMOVE": 103},
        SAVER, "a child that copies RAM; the guard of a new thread's stack",
    ),
)

THREADS = (
    _one_of(
        "futex", 1,
        {"FUTEX_WAIT": 0, "FUTEX_WAKE": 1, "FUTEX_WAIT_BITSET": 9},
        ALL, "locks, conditions, the end of threads", mask=0xFFFF_FFFF & ~0x180,
    ),
    *_rules("rt_sigprocmask rt_sigreturn", ALL, "signals: a kick, a person's"),
    *_rules("restart_syscall", ALL, "Linux goes on with a wait after SIGCONT"),
    *_rules("getpid gettid", ALL, "the C library, to signal a thread"),
    Rule(
        "tgkill", ALL, "abort(), after a defect of Python's", "own process; SIGABRT",
        (_OWN, Condition(2, (signal.SIGABRT,))),
    ),
    Rule(
        "tgkill", ("control", "main", "export-watch"), "bring a vCPU out of KVM_RUN, end a write",
        "own process; SIGRTMIN", (_OWN, Condition(2, (signal.SIGRTMIN,))),
    ),
    *_rules("sched_yield sched_getaffinity", ALL, "locks and heaps of the C library"),
    *_rules("exit exit_group", ALL, "the end of a thread, and of the process"),
)

TIME = _rules(
    "clock_gettime clock_nanosleep", ALL,
    "sleep; a clock that cannot be read without a call",
)

DESCRIPTORS = (
    *_rules("read write close", ALL, "doorbells, interrupts, pipes: descriptors it has"),
    *_rules("epoll_wait epoll_ctl poll", ALL, "wait for them"),
    *_rules("fstat lseek", ALL, "the kind and the length of an open file"),
    _one_of(
        "newfstatat", 3, {"AT_EMPTY_PATH": 0x1000}, ALL,
        "the C library's fstat; with a path it tells only facts about a file",
    ),
)

# The vCPU that asks is answered by its own thread: machine.py plugs the device "at_exit".
ENTROPY = _rules("getrandom", (*VCPUS, "entropy", "control", HEIR), "random bytes")

FILE_IO = (
    *_rules("preadv pwritev preadv2 pwritev2 pread64 pwrite64", CLOSERS, "a disk's requests"),
    *_rules("fdatasync fallocate ftruncate copy_file_range", CLOSERS, "a disk's requests"),
    *_rules("fsync", SAVER, "the files of a snapshot"),
)

PEER_IO = (
    Rule(
        "sendto", ALL, "a line, if standard error is a socket; a peer", "without an address",
        (Condition(5, (0,)),),
    ),
    *_rules(
        "sendmsg recvfrom recvmsg shutdown", (*PEERS, "control", "main-export"), "a socket it has"
    ),
    *_rules("accept4", ("control", "main-export"), "a new client"),
    *_rules("geteuid", ("control", "main-export", HEIR), "whose client, whose file is it"),
    *_rules("getsockname", ("main", "control", "main-export"), "Python, of a socket's descriptor"),
    *_rules("getpeername", ("main-export",), "is it one end of a socketpair that a peer sends"),
    Rule(
        "getsockopt", ("main", "control", "main-export"), "Python, of a socket's descriptor",
        "SO_TYPE, SO_ERROR, SO_PEERCRED, SO_PROTOCOL, SO_DOMAIN",
        (Condition(1, (socket.SOL_SOCKET,)), Condition(2, (3, 4, 17, 38, 39))),
    ),
    _one_of(
        "fcntl", 1, {"F_DUPFD_CLOEXEC": fcntl.F_DUPFD_CLOEXEC},
        ("main", "vcpu-elsewhere", "vcpu-serving"),
        "RAM for a back end that knows no memory slots; standard error, if it is a socket",
    ),
    _one_of(
        "fcntl", 1,
        {"F_DUPFD_CLOEXEC": fcntl.F_DUPFD_CLOEXEC, "F_GET_SEALS": fcntl.F_GET_SEALS,
         "F_GETFL": fcntl.F_GETFL, "F_SETFL": fcntl.F_SETFL},
        ("main-export",), "the descriptors that a front end sends",
    ),
    *_rules("eventfd2", ("main-export",), "a new front end"),
    *_rules(
        "readlinkat", ("main-export",),
        "is it an eventfd that a front end sends; of a link by its path this tells the target",
    ),
)

GUEST = (
    *_ioctls("KVM_RUN", VCPUS, "run the guest"),
    *_ioctls(
        "KVM_GET_REGS KVM_GET_MP_STATE KVM_GET_LAPIC KVM_GET_IRQCHIP", VCPUS,
        "tell a halt for good from one that an interrupt ends",
    ),
    *_ioctls("KVM_GET_SREGS KVM_TRANSLATE", VCPUS, "describe how a vCPU ended"),
    *_ioctls("KVM_GET_REGS KVM_GET_SREGS", ("main", "control"),
             "a client asks for registers; tell how far a guest came"),
    *_ioctls("KVM_KVMCLOCK_CTRL", VCPUS, "tell the guest that it was paused"),
    *_ioctls(
        "KVM_IRQ_LINE KVM_REGISTER_COALESCED_MMIO KVM_UNREGISTER_COALESCED_MMIO",
        (*VCPUS, "console", "main"), "the UART's interrupt and its gathered bytes",
    ),
)

TERMINAL = (
    *_ioctls("TCGETS TCSETS TCFLSH TIOCGPGRP TIOCOUTQ", ("main",), "the terminal of `pyvmm run`"),
    *_ioctls("TIOCGWINSZ", ("main", "console"), "the terminal's size"),
    *_rules("getpgrp", ("main",), "are we in the foreground of the terminal"),
    *_rules("rt_sigaction", ("main", "main-export"), "handlers, at the end and for a stop"),
    *_rules("sigaltstack", ("main", "main-export"), "Python's fault handler goes at the end"),
    Rule(
        "tgkill", ("main",), "Ctrl-Z: stop as the shell expects it", "own process; SIGTSTP",
        (_OWN, Condition(2, (signal.SIGTSTP,))),
    ),
    *_rules(
        "wait4", ("main", "main-export", "snapshot"),
        "the end of the attendant; of a child that saved RAM",
    ),
)

FLAGS = (
    *_ioctls("FIONBIO", ("control", "main-export", *PEERS), "a descriptor that must not wait"),
    *_ioctls("FIOCLEX", SAVER, "a descriptor that a child does not get"),
)

NEW_TASKS = (
    Rule(
        "clone", SAVER, "the threads of a rewound machine", "the flags of pthread_create",
        (Condition(0, (0x3D0F00,)),),
    ),
    Rule(
        "clone", SAVER, "a child that saves RAM while the guest runs", "the flags of fork",
        (Condition(0, (0x0120_0011,)),),
    ),
    *_rules("set_robust_list rseq", SAVER, "the C library, in a new thread"),
    _one_of(
        "prctl", 0, {"PR_SET_NAME": 15, "PR_SET_NO_NEW_PRIVS": 38}, SAVER,
        "a new thread is named, and takes its filter",
    ),
    Rule(
        "seccomp", SAVER, "a new thread is named, and takes its filter",
        "SECCOMP_SET_MODE_FILTER, with SPEC_ALLOW and no other flag",
        (Condition(0, (1,)), Condition(1, (4,))),
    ),
    *_rules("eventfd2 epoll_create1 pipe2 close_range", SAVER, "what a new loop, or a child, has"),
)

STATE = (
    *_rules("memfd_create", SAVER, "RAM of a snapshot in memory"),
    _one_of(
        "fcntl", 1,
        {"F_GETFD": fcntl.F_GETFD, "F_GETFL": fcntl.F_GETFL, "F_SETFL": fcntl.F_SETFL,
         "F_OFD_SETLK": fcntl.F_OFD_SETLK,
         "F_ADD_SEALS": fcntl.F_ADD_SEALS, "F_GET_SEALS": fcntl.F_GET_SEALS},
        SAVER, "layers of disks, seals of images",
    ),
    *_ioctls(
        " ".join(name for name in KVM if name.startswith(("KVM_GET_", "KVM_SET_")) and name not in (
            "KVM_GET_API_VERSION", "KVM_GET_VCPU_MMAP_SIZE", "KVM_GET_SUPPORTED_CPUID",
            "KVM_GET_MSR_INDEX_LIST", "KVM_SET_USER_MEMORY_REGION", "KVM_SET_TSS_ADDR",
            "KVM_SET_IDENTITY_MAP_ADDR", "KVM_SET_CPUID2", "KVM_GET_REGS", "KVM_GET_SREGS",
            "KVM_GET_MP_STATE", "KVM_GET_LAPIC", "KVM_GET_IRQCHIP",
        )),
        SAVER, "the state of the vCPUs and the chips",
    ),
    *_ioctls("PAGEMAP_SCAN", SAVER, "the pages that the guest has written"),
)

RULES: tuple[Rule, ...] = (
    *MEMORY, *THREADS, *TIME, *DESCRIPTORS, *ENTROPY, *FILE_IO, *PEER_IO, *GUEST, *TERMINAL, *FLAGS,
    *NEW_TASKS, *STATE,
)

_NO_PATHS = "Python looks for a source file or a module, the C library for a time zone"
REFUSED: tuple[Refusal, ...] = (
    *(Refusal(name, errno.EACCES, _NO_PATHS) for name in (
        "open", "openat", "stat", "lstat", "newfstatat", "access", "readlink", "readlinkat",
        "getcwd",
    )),
    Refusal("clone3", errno.ENOSYS, "the C library then asks clone, whose flags can be seen"),
    Refusal("madvise", errno.EINVAL, "advice that only makes something faster"),
    Refusal("prctl", errno.EINVAL, "names of threads and of memory"),
    Refusal("sysinfo", errno.EACCES, "the C library sorts with less memory then"),
    Refusal("prlimit64", errno.EPERM, "an error tells how many files may be open"),
    Refusal("getcpu", errno.ENOSYS, "an allocator asks which memory is near"),
)
"""System calls that Python and the C library try, and can do without."""
