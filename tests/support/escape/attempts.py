"""Ways out of a jail, each as one system call with the arguments that an attacker would give it.

No attempt does harm if it succeeds: signals have number 0, mounts and new roots name no device.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import struct
from collections.abc import Callable
from typing import NamedTuple

from pyvmm.jail.bpf import OWN_PID
from pyvmm.jail.ioctls import REQUESTS
from pyvmm.jail.syscalls import NUMBERS

X32 = 1 << 30
"""The bit that marks the numbers of the x32 ABI."""
AT_FDCWD = -100
PAGE = mmap.PAGESIZE


class Attempt(NamedTuple):
    """The system call ``number`` with ``arguments``."""

    name: str
    number: int
    arguments: tuple[int, ...]
    is_stopped_without_filter: bool = False
    """True if the rest of the jail must refuse it too: Landlock, capabilities, descriptors."""


class Buffers:
    """Memory to which attempts point.  It stays, so their addresses do too."""

    def __init__(self) -> None:
        self._kept: list[ctypes.Array[ctypes.c_char]] = []
        self.page = self.new(bytes(2 * PAGE)) + PAGE - 1 & ~(PAGE - 1)
        """The address of a page of its own."""

    def new(self, data: bytes) -> int:
        """Return the address of a copy of ``data``, with a NUL behind it."""
        buffer = ctypes.create_string_buffer(data)
        self._kept.append(buffer)
        return ctypes.addressof(buffer)


class Machine(NamedTuple):
    """The descriptors of the machine that runs; -1 for none."""

    vm: int = -1
    vcpu: int = -1


def attempts(buffers: Buffers, machine: Machine) -> list[Attempt]:
    """Return all attempts on ``machine``, on this process, and on its parent.

    ``bpf.OWN_PID`` stands for the number of the process that makes an attempt.
    """
    return [
        *_files(buffers), *_programs(buffers), *_memory(buffers), *_machines(buffers, machine),
        *_processes(buffers), *_kernel(buffers), *_descriptors(buffers),
    ]


def _named(
    text: str, arguments: Callable[[str], tuple[int, ...]], *, stopped: bool = False
) -> list[Attempt]:
    return [Attempt(name, NUMBERS[name], arguments(name), stopped) for name in text.split()]


def _files(buffers: Buffers) -> list[Attempt]:
    new = buffers.new
    passwd, memory, kvm = new(b"/etc/passwd"), new(b"/proc/self/mem"), new(b"/dev/kvm")
    openat = NUMBERS["openat"]
    how = new(struct.pack("=QQQ", os.O_RDONLY, 0, 0))
    made = new(b"/tmp/pyvmm-escaped")
    return [
        Attempt("open", NUMBERS["open"], (passwd, os.O_RDONLY), True),
        Attempt("openat", openat, (AT_FDCWD, passwd, os.O_RDONLY), True),
        Attempt("openat2", NUMBERS["openat2"], (AT_FDCWD, passwd, how, 24), True),
        Attempt("open own memory", openat, (AT_FDCWD, memory, os.O_RDWR), True),
        Attempt("open /dev/kvm", openat, (AT_FDCWD, kvm, os.O_RDWR), True),
        Attempt("make a file", openat, (AT_FDCWD, made, os.O_CREAT | os.O_WRONLY, 0o600), True),
        Attempt("creat", NUMBERS["creat"], (made, 0o600), True),
        Attempt("open_by_handle_at", NUMBERS["open_by_handle_at"], (0, buffers.page, 0), True),
        *_named("unlink rmdir", lambda _: (made,), stopped=True),
        *_named("mkdir", lambda _: (made, 0o700), stopped=True),
        *_named("rename link symlink", lambda _: (passwd, made), stopped=True),
        *_named("mknod", lambda _: (made, 0o10600, 0), stopped=True),
        *_named("truncate", lambda _: (passwd, 1 << 40), stopped=True),
        *_named("chroot chdir", lambda _: (new(b"/tmp/pyvmm-nowhere"),), stopped=True),
        *_named("chmod", lambda _: (made, 0o777), stopped=True),
        *_named("inotify_init fanotify_init", lambda _: (0, 0)),
        *_named("statfs", lambda _: (passwd, buffers.page)),
    ]


def _programs(buffers: Buffers) -> list[Attempt]:
    shell = buffers.new(b"/bin/true")
    argv = buffers.new(struct.pack("=QQ", shell, 0))
    fork = signal.SIGCHLD
    return [
        Attempt("execve", NUMBERS["execve"], (shell, argv, 0), True),
        Attempt("execveat", NUMBERS["execveat"], (AT_FDCWD, shell, argv, 0, 0), True),
        Attempt("fork", NUMBERS["fork"], ()),
        Attempt("clone as fork", NUMBERS["clone"], (fork, 0, 0, 0, 0)),
        Attempt("clone of a user", NUMBERS["clone"], (0x1000_0000 | fork, 0, 0, 0, 0)),
        Attempt("clone3", NUMBERS["clone3"], (buffers.new(bytes(32) + struct.pack("=Q", fork)
                                                          + bytes(48)), 88)),
        *_named("memfd_create", lambda _: (shell, 0)),
        *_named("seccomp", lambda _: (1, 0, 0)),
    ]


def _memory(buffers: Buffers) -> list[Attempt]:
    read, write, code = mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_EXEC
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    parent = os.getppid()
    vector = buffers.new(struct.pack("=QQ", buffers.page, 8))
    return [
        Attempt("mmap of code", NUMBERS["mmap"], (0, PAGE, read | code, private, -1, 0)),
        Attempt("mmap RWX", NUMBERS["mmap"], (0, PAGE, read | write | code, private, -1, 0), True),
        Attempt("mprotect RWX", NUMBERS["mprotect"], (buffers.page, PAGE, read | write | code),
                True),
        Attempt("mprotect RX", NUMBERS["mprotect"], (buffers.page, PAGE, read | code), True),
        Attempt("pkey_mprotect", NUMBERS["pkey_mprotect"], (buffers.page, PAGE, read | code, -1),
                True),
        *_named("shmget", lambda _: (0, PAGE, 0o1600)),
        *_named("userfaultfd memfd_secret", lambda _: (1,)),
        *_named("process_vm_readv process_vm_writev",
                lambda _: (parent, vector, 1, vector, 1, 0), stopped=True),
        *_named("process_madvise", lambda _: (0, vector, 1, 4, 0), stopped=True),
        *_named("remap_file_pages", lambda _: (buffers.page, PAGE, 0, 1, 0)),
        *_named("personality", lambda _: (0x0040_0000,)),
        *_named("modify_ldt", lambda _: (0, buffers.page, 16)),
    ]


def _machines(buffers: Buffers, machine: Machine) -> list[Attempt]:
    vm, vcpu = machine
    region = buffers.new(struct.pack("=IIQQQ", 30, 0, 1 << 40, PAGE, buffers.page))
    ioctl = NUMBERS["ioctl"]
    on_the_vm = [
        Attempt(name, ioctl, (vm, REQUESTS[name], argument)) for name, argument in (
            ("KVM_CREATE_VM", 0), ("KVM_CREATE_VCPU", 7), ("KVM_SET_USER_MEMORY_REGION", region),
            ("KVM_IRQFD", buffers.page), ("KVM_IOEVENTFD", buffers.page),
            ("KVM_CREATE_IRQCHIP", 0), ("KVM_CREATE_PIT2", buffers.page),
            ("KVM_SET_CLOCK", buffers.page),
        )
    ]
    on_the_vcpu = [
        Attempt(name, ioctl, (vcpu, REQUESTS[name], buffers.page)) for name in (
            "KVM_SET_CPUID2", "KVM_GET_MSRS", "KVM_SET_REGS", "KVM_GET_REGS",
        )
    ]
    return [
        *on_the_vm, *on_the_vcpu,
        Attempt("KVM_CREATE_DEVICE", ioctl, (vm, 0xC00C_AEE0, buffers.page)),
        Attempt("KVM_SET_USER_MEMORY_REGION2", ioctl, (vm, 0x40A0_AE49, buffers.page)),
    ]


def _processes(buffers: Buffers) -> list[Attempt]:
    parent = os.getppid()
    return [
        Attempt("trace the parent", NUMBERS["ptrace"], (16, parent, 0, 0), True),
        Attempt("seize the parent", NUMBERS["ptrace"], (0x4206, parent, 0, 0), True),
        Attempt("be traced", NUMBERS["ptrace"], (0, 0, 0, 0)),
        Attempt("signal the parent", NUMBERS["kill"], (parent, 0), True),
        Attempt("signal init", NUMBERS["kill"], (1, 0), True),
        Attempt("signal a group", NUMBERS["kill"], (-parent, 0), True),
        Attempt("tgkill the parent", NUMBERS["tgkill"], (parent, parent, 0), True),
        *_named("tkill", lambda _: (parent, 0), stopped=True),
        *_named("rt_sigqueueinfo", lambda _: (parent, 0, buffers.page), stopped=True),
        *_named("pidfd_open", lambda _: (parent, 0)),
        *_named("setpriority", lambda _: (0, parent, -20), stopped=True),
        *_named("sched_setscheduler", lambda _: (0, 2, buffers.new(struct.pack("=i", 50))),
                stopped=True),
        *_named("kcmp", lambda _: (parent, OWN_PID, 0, 0, 0), stopped=True),
        *_named("move_pages", lambda _: (parent, 0, 0, 0, 0, 0), stopped=True),
        *_named("setuid setgid", lambda _: (0,)),
        *_named("setresuid", lambda _: (1, 1, 1), stopped=True),
        *_named("setgroups", lambda _: (0, 0), stopped=True),
        *_named("capset", lambda _: (
            buffers.new(struct.pack("=Ii", 0x2008_0522, 0)), buffers.new(b"\xff" * 24)
        ), stopped=True),
    ]


def _kernel(buffers: Buffers) -> list[Attempt]:
    nowhere = buffers.new(b"/tmp/pyvmm-nowhere")
    return [
        *[
            Attempt(f"socket of family {name}", NUMBERS["socket"], (family, kind, 0))
            for name, family, kind in (
                ("UNIX", 1, 1), ("INET", 2, 1), ("INET6", 10, 2), ("NETLINK", 16, 3),
                ("PACKET", 17, 3), ("ALG", 38, 5), ("VSOCK", 40, 1),
            )
        ],
        *_named("socketpair", lambda _: (1, 1, 0, buffers.page)),
        *_named("unshare", lambda _: (0x1000_0000,)),
        *_named("mount", lambda _: (nowhere, nowhere, nowhere, 0, 0), stopped=True),
        *_named("umount2", lambda _: (nowhere, 0), stopped=True),
        *_named("pivot_root", lambda _: (nowhere, nowhere), stopped=True),
        *_named("fsopen", lambda _: (buffers.new(b"tmpfs"), 0), stopped=True),
        *_named("setns", lambda _: (0, 0), stopped=True),
        *_named("bpf", lambda _: (0, buffers.page, 72), stopped=True),
        *_named("perf_event_open", lambda _: (buffers.page, 1, -1, -1, 0),
                stopped=True),
        *_named("io_uring_setup", lambda _: (1, buffers.page)),
        *_named("keyctl", lambda _: (0, -3, 0)),
        *_named("add_key", lambda _: (buffers.new(b"user"), nowhere, nowhere, 1, -3)),
        *_named("init_module", lambda _: (nowhere, 8, nowhere), stopped=True),
        *_named("finit_module", lambda _: (0, nowhere, 0), stopped=True),
        *_named("kexec_load", lambda _: (0, 0, 0, 0), stopped=True),
        *_named("reboot", lambda _: (0, 0, 0, 0), stopped=True),
        *_named("iopl", lambda _: (3,), stopped=True),
        *_named("ioperm", lambda _: (0x60, 1, 1), stopped=True),
        *_named("sethostname", lambda _: (nowhere, 4), stopped=True),
        *_named("clock_settime", lambda _: (0, buffers.page), stopped=True),
        *_named("swapon", lambda _: (nowhere, 0), stopped=True),
        *_named("syslog", lambda _: (5, 0, 0), stopped=True),
        *_named("landlock_create_ruleset", lambda _: (0, 0, 1)),
        *[
            Attempt(f"prctl {name}", NUMBERS["prctl"], (option, argument, 0, 0, 0))
            for name, option, argument in (
                ("PR_SET_DUMPABLE", 4, 1), ("PR_SET_PTRACER", 0x5961_6D61, (1 << 64) - 1),
                ("PR_SET_MM", 35, 1), ("PR_SET_SECUREBITS", 28, 0), ("PR_SET_TSC", 26, 1),
                ("PR_SET_SECCOMP", 22, 1),
            )
        ],
        Attempt("getppid by the x32 ABI", X32 | NUMBERS["getppid"], ()),
        Attempt("openat by the x32 ABI", X32 | NUMBERS["openat"], (AT_FDCWD, nowhere, 0)),
    ]


def _descriptors(buffers: Buffers) -> list[Attempt]:
    parent = os.getppid()
    return [
        *[
            Attempt(f"ioctl {name}", NUMBERS["ioctl"], (0, request, buffers.page))
            for name, request in (
                ("TIOCSTI", 0x5412), ("TIOCSCTTY", 0x540E), ("TIOCLINUX", 0x541C),
                ("TIOCSETD", 0x5423), ("FICLONE", 0x4004_9409), ("FS_IOC_SETFLAGS", 0x4008_6602),
                ("BLKDISCARD", 0x1277), ("SIOCGIFCONF", 0x8912),
            )
        ],
        *[
            Attempt(f"fcntl {name}", NUMBERS["fcntl"], (0, command, argument))
            for name, command, argument in (
                ("F_SETOWN", 8, parent), ("F_SETSIG", 10, 9), ("F_NOTIFY", 1026, 1),
                ("F_SETLEASE", 1024, 1),
            )
        ],
        *_named("fchmod", lambda _: (2, 0o777)),
        *_named("fchown", lambda _: (2, 1, 1), stopped=True),
        *_named("fchdir flock dup", lambda _: (2, 0)),
        *_named("getdents64", lambda _: (0, buffers.page, 64)),
        *_named("linkat", lambda _: (0, buffers.new(b""), AT_FDCWD, buffers.new(b"/tmp/pyvmm-l"),
                                     0x1000), stopped=True),
        *_named("pidfd_getfd", lambda _: (0, 0, 0), stopped=True),
        Attempt("signal oneself", NUMBERS["kill"], (OWN_PID, 0)),
    ]

