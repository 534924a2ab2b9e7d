"""``--jail``, ``--user``, ``--cgroup``: from the options to a process in its jail (docs/jail.md).

The steps themselves are in ``pyvmm.jail``; here are only their order in a start, and the lines.
"""

from __future__ import annotations

import fcntl
import os
import stat

from pyvmm.config import DiskConfig
from pyvmm.errors import ConfigError, HostError
from pyvmm.jail import check_mode
from pyvmm.report import say
from pyvmm.startup.commands import Option
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import SimpleNamespace

    from pyvmm.jail.namespaces import Namespaces
    from pyvmm.jail.root import User
    from pyvmm.kvm.handles import Kvm
    from pyvmm.machine import Machine

JAIL_OPTIONS = (
    Option(name="--jail", metavar="MODE", default="on",
           help="on: give up every right that the guest does not need, before it runs; strict: the "
           "same, or do not run if this host lacks a part of it; off: give up nothing (default "
           "on; docs/jail.md)"),
    Option(name="--user", metavar="USER[:GROUP]",
           help="as root: become this user, by name or number, before the guest runs"),
    Option(name="--cgroup", metavar="DIR[,memory=SIZE][,cpu=N][,pids=N]",
           help="as root: be in this directory of cgroup v2, made if it is missing, with these "
           "limits"),
)
OFF = "--jail off: a guest that breaks out has all rights of this process"
FILES_OF_CLIENTS = 1024
"""Descriptors that a control socket's clients bring, with their snapshots and their programs."""
FILES_OF_A_SNAPSHOT = 32
STANDARD = {0: "standard input", 1: "standard output", 2: "standard error"}


class Jail:
    """The jail that the options in ``args`` ask for, of this process; ConfigError.

    ``verbose`` is the number of -v: with one a line says what is in force, with two the kept
    descriptors are listed.  ``namespaces`` are root's, if they are made already; the jail owns
    them.
    """

    def __init__(self, args: SimpleNamespace, namespaces: Namespaces | None = None) -> None:
        mode = check_mode(args.jail)
        self.is_on = mode != "off"
        self._is_strict = mode == "strict"
        self._verbose: int = args.verbose
        self.user: User | None = None
        """Whom the process becomes; None: nobody else."""
        self._cgroup, self._namespaces = None, namespaces
        for option, text in (("--user", args.user), ("--cgroup", args.cgroup)):
            if text is not None and not self.is_on:
                raise ConfigError(f"{option} {text}", "is a part of the jail, and --jail is off")
        if args.user is not None or args.cgroup is not None:
            from pyvmm.jail.cgroup import parse_cgroup
            from pyvmm.jail.root import parse_user

            self.user = None if args.user is None else parse_user(args.user)
            self._cgroup = None if args.cgroup is None else parse_cgroup(args.cgroup)
        if not self.is_on:
            say(OFF)
        elif namespaces is None and os.geteuid() == 0:
            from pyvmm.jail.namespaces import Namespaces

            self._namespaces = Namespaces()

    def close(self) -> None:
        """Free what was made for a jail that is not entered; idempotent."""
        if self._namespaces is not None:
            self._namespaces.close()

    def enter(
        self, kept: Mapping[int, str], *, more_files: int = 0, may_grow: bool = False
    ) -> Callable[[str], None] | None:
        """Put the process into its jail; return what confines a thread of a given kind further.

        ``kept`` names the descriptors that stay open; with ``may_grow`` files may be written that
        become longer.  None if nothing confines threads.  To be called with one thread; HostError
        if the jail is strict and this host lacks a part of it.
        """
        if not self.is_on:
            return None
        from pyvmm.jail import seccomp
        from pyvmm.jail.confine import Plan, confine

        kept = STANDARD | dict(kept)
        if self._verbose > 1:
            for fd, use in sorted(kept.items()):
                say(f"open: {fd} {use}")
        reason = seccomp.why_not()
        if reason and self._is_strict:
            raise HostError(f"--jail strict: {reason}")
        done = confine(Plan(
            kept=tuple(kept), more_files=more_files, strict=self._is_strict,
            largest_file_bytes=None if may_grow else _largest_file_bytes(kept),
            user=self.user, cgroup=self._cgroup, namespaces=self._namespaces,
        ))
        in_force, lacking = list(done.in_force), list(done.lacking)
        if reason:
            lacking.append(f"the jail lacks filters of system calls: {reason}")
        else:
            in_force.append("a filter of system calls for each thread")
        for line in lacking:
            say(line)
        if self._verbose:
            say(f"jail: {'; '.join(in_force)}")
        return None if reason else seccomp.load  # ``confine`` has set no_new_privs


def descriptors_of(machine: Machine) -> dict[int, str]:
    """Return every descriptor that ``machine`` keeps open before its run, each with a name."""
    found = machine.board.descriptors() | machine.runner.descriptors()
    found |= machine.console.descriptors()
    found[machine.vm.fd] = "KVM: the virtual machine"
    if (pagemap_fd := machine.board.memory.pagemap_fd) is not None:
        found[pagemap_fd] = "this process's page map"
    found |= {loop.vcpu.fd: f"KVM: vCPU {index}" for index, loop in enumerate(machine.loops)}
    for moment in (machine.base, machine.newest):
        if moment is not None:
            found |= moment.descriptors()
    return found


def close_kvm(machine: Machine) -> None:
    """Close /dev/kvm, with which another virtual machine could be made."""
    kvm_of(machine).close()


def kvm_of(machine: Machine) -> Kvm:
    """Return the /dev/kvm with which ``machine`` was made."""
    kvm = machine.loops[0].vcpu.kvm
    assert kvm is not None  # ``build`` has made the vCPUs
    return kvm


def files_of_a_run(machine: Machine) -> int:
    """Return how many descriptors a run of ``machine`` makes for itself, all at one time."""
    return len(machine.board.workers) + 2  # an epoll each; the pipe of the signals


def may_grow(machine: Machine) -> bool:
    """True if a file of ``machine`` may become longer: a log, or a disk that a person enlarges."""
    output_fd = machine.console.output_fd
    if output_fd is not None and stat.S_ISREG(os.fstat(output_fd).st_mode):
        return True
    return any(
        not (disk.read_only or (isinstance(disk, DiskConfig) and disk.source.snapshot))
        for disk in machine.config.disks
    )


def _largest_file_bytes(kept: Mapping[int, str]) -> int | None:
    """Return the size of the largest file in ``kept`` that can be written; None for no limit.

    None too if standard output or error is such a file, because a log grows.
    """
    largest = 0
    for fd in kept:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode) or _is_read_only(fd):
            continue
        if fd in STANDARD:
            return None
        largest = max(largest, facts.st_size)
    return largest


def _is_read_only(fd: int) -> bool:
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
