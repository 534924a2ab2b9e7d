"""The lab: a Linux host with a genuine kvm_amd, under emulated hardware, for hosts without one.

``run`` executes a command in it.  The command sees the host's whole file system and may change all
of it, but only changes in the directories named as writable last.  Its output, input and exit
status are those of a command run on the host.  There is no network but 127.0.0.1, and 9p cannot
make named pipes or sockets in a writable directory (/tmp takes them).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pyvmm.errors import ConfigError, HostError
from pyvmm.lab import initramfs, kernel, qemu
from pyvmm.lab.session import Session, Wiring
from pyvmm.linux.cache import cache_directory
from pyvmm.numerals import whole_number

INSIDE = "PYVMM_LAB"
"""The environment variable that is 1 inside the lab."""

MIN_MEMORY_BYTES = 512 << 20
MAX_MEMORY_BYTES = 1 << 40
MAX_CPUS = 64
MAX_TIMEOUT_S = 10 * 365 * 86400.0
_MAX_GIT_SETTINGS = 1 << 20


class CommandError(ConfigError):
    """CMD cannot be run; ``exit_status`` is a shell's for that, 126 or 127."""

    def __init__(self, command: str, problem: str, exit_status: int) -> None:
        super().__init__(command, problem)
        self.exit_status = exit_status


@dataclass(frozen=True, slots=True, kw_only=True)
class LabConfig:
    """One command to run in the lab.

    ``writable`` directories are written back to the host; other writes of CMD are dropped.
    ``timeout_s`` counts from the start of CMD; None means no limit.
    """

    command: Sequence[str]
    cwd: Path
    environment: Mapping[bytes, bytes]
    writable: Sequence[Path]
    cpus: int = 1
    memory_bytes: int = 2 << 30
    timeout_s: float | None = None
    verbose: bool = False

    def __post_init__(self) -> None:
        if not self.command:
            raise ConfigError("lab", "no command given; write: pyvmm lab -- CMD...")
        if not 1 <= self.cpus <= MAX_CPUS:
            raise ConfigError(f"--cpus {self.cpus}", f"must be between 1 and {MAX_CPUS}")
        if self.memory_bytes < MIN_MEMORY_BYTES:
            raise ConfigError(
                f"--memory {self.memory_bytes >> 20}M",
                f"too small for the lab's Linux; the least is {MIN_MEMORY_BYTES >> 20}M",
            )
        if self.memory_bytes > MAX_MEMORY_BYTES:
            raise ConfigError(
                f"--memory {self.memory_bytes >> 20}M",
                f"too large for an emulated machine; the most is {MAX_MEMORY_BYTES >> 30}G",
            )
        if self.timeout_s is not None and not 0 < self.timeout_s <= MAX_TIMEOUT_S:
            raise ConfigError(
                f"--timeout {self.timeout_s:g}",
                f"must be a number of seconds above 0, at most {MAX_TIMEOUT_S:.0f}",
            )
        for directory in self.writable:
            if not directory.is_dir():
                raise ConfigError(f"--rw {directory}", "is not a directory")
            if directory == Path("/"):
                raise ConfigError("--rw /", "would give away the whole host; name a directory")


def default_writable(cwd: Path) -> tuple[Path, ...]:
    """Return the git checkout around ``cwd``, else ``cwd`` itself; never the host's root."""
    checkout = next((path for path in (cwd, *cwd.parents) if (path / ".git").exists()), cwd)
    return () if checkout == Path("/") else (checkout,)


def resolve_command(
    command: Sequence[str], cwd: Path, environment: Mapping[bytes, bytes]
) -> tuple[str, ...]:
    """Return ``command`` with its program found on ``PATH``, because the lab has the host's files.

    CommandError tells of a missing program before a machine is started for it.
    """
    program = command[0]
    search = os.fsdecode(environment.get(b"PATH", os.fsencode(os.defpath)))
    here = program if "/" in program else shutil.which(program, path=search)
    if not program or here is None or not (cwd / here).exists():
        raise CommandError(program, "command not found", 127)
    if (cwd / here).is_dir() or not os.access(cwd / here, os.X_OK):
        raise CommandError(program, "not an executable file", 126)
    return (here if "/" in program else str(cwd / here), *command[1:])


def lab_environment(environment: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """Return the host's environment with the mark of the lab and git's permission.

    git refuses a checkout whose owner is not the user, and in the lab everyone is root.
    """
    text = os.fsdecode(environment.get(b"GIT_CONFIG_COUNT", b"0"))
    count = whole_number(text, 0, _MAX_GIT_SETTINGS) or 0
    return {
        **environment,
        INSIDE.encode(): b"1",
        b"GIT_CONFIG_COUNT": b"%d" % (count + 1),
        b"GIT_CONFIG_KEY_%d" % count: b"safe.directory",
        b"GIT_CONFIG_VALUE_%d" % count: b"*",
    }


def run(config: LabConfig, say: Callable[[str], None]) -> int:
    """Run ``config.command`` in the lab; return its status, 124 on timeout, 128+n on signal n.

    Call it on the main thread (it handles signals) with file descriptors 0, 1 and 2 open.  ``say``
    gets lines about progress.  CommandError for a command that cannot be run, HostError when the
    lab fails.
    """
    if os.environ.get(INSIDE):
        raise HostError(f"lab: this already is the lab ({INSIDE} is set); run the command directly")
    busybox = qemu.find_busybox()
    command = resolve_command(config.command, config.cwd, config.environment)
    linux = kernel.obtain(cache_directory(), say)

    foreground = _in_foreground()
    on_terminal = foreground and os.isatty(1)
    size = os.get_terminal_size(0) if on_terminal else None
    end_mark = secrets.token_hex(16)
    archive = initramfs.pack_initramfs(
        busybox,
        linux.modules,
        initramfs.run_settings(
            config.writable, end_mark, (size.lines, size.columns) if size else None, os.isatty(2)
        ),
        initramfs.command_script(command, config.cwd, lab_environment(config.environment)),
    )
    ports = ["terminal", "err", "control"] if on_terminal else ["in", "out", "err", "control"]
    with _machine(config, linux.vmlinux, archive, ports) as (wiring, process):
        session = Session(
            wiring,
            end_mark=b"\0" + end_mark.encode(),
            kill=process.kill,
            say=say,
            timeout_s=config.timeout_s,
            stdin_fd=0 if foreground or not os.isatty(0) else None,
            verbose=config.verbose,
        )
        return session.run()


@contextlib.contextmanager
def _machine(
    config: LabConfig, vmlinux: Path, archive: bytes, ports: Sequence[str]
) -> Iterator[tuple[Wiring, subprocess.Popen[bytes]]]:
    """Yield a running QEMU and our ends of its ``ports``; it is dead when the context is left.

    It leaves no file behind: the initramfs is a memory file, the ports are unnamed sockets.
    """
    with contextlib.ExitStack() as stack:
        initramfs_fd = os.memfd_create("pyvmm-lab-initramfs")
        stack.callback(os.close, initramfs_fd)
        with open(initramfs_fd, "wb", closefd=False) as file:
            file.write(archive)
        ours, theirs = _socket_pairs(stack, ports)
        console, console_end = _pipe(stack)
        messages, messages_end = _pipe(stack)
        arguments = qemu.command_line(
            vmlinux=vmlinux,
            initramfs_fd=initramfs_fd,
            cpus=config.cpus,
            memory_bytes=config.memory_bytes,
            writable=config.writable,
            ports={name: sock.fileno() for name, sock in theirs.items()},
            quiet=not config.verbose,
        )
        try:
            # A session of its own: we pass the terminal's Ctrl-C on, and QEMU must not die of it.
            process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=console_end,
                stderr=messages_end,
                pass_fds=[initramfs_fd, *(sock.fileno() for sock in theirs.values())],
                start_new_session=True,
            )
        except OSError as error:
            raise HostError(f"lab: cannot start {arguments[0]}: {error.strerror}") from error
        stack.callback(process.wait)
        stack.callback(process.kill)
        # QEMU must hold the only copies, or our streams would not end with it.
        for sock in theirs.values():
            sock.close()
        console_end.close()
        messages_end.close()
        yield (
            Wiring(ports=ours, console_fd=console.fileno(), messages_fd=messages.fileno()),
            process,
        )


def _socket_pairs(
    stack: contextlib.ExitStack, names: Sequence[str]
) -> tuple[dict[str, socket.socket], dict[str, socket.socket]]:
    """Return connected sockets by name: ours, which do not block, and QEMU's."""
    ours, theirs = {}, {}
    for name in names:
        mine, other = socket.socketpair()
        ours[name], theirs[name] = stack.enter_context(mine), stack.enter_context(other)
        mine.setblocking(False)
    return ours, theirs


def _pipe(stack: contextlib.ExitStack) -> tuple[BinaryIO, BinaryIO]:
    """Return a pipe's reading and writing end."""
    read_fd, write_fd = os.pipe()
    return (
        stack.enter_context(os.fdopen(read_fd, "rb", buffering=0)),
        stack.enter_context(os.fdopen(write_fd, "wb", buffering=0)),
    )


def _in_foreground() -> bool:
    """True if standard input is a terminal and we may read it without being stopped."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False
