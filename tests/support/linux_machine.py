"""A Linux in a machine of this process, with a shell on its console, that can be saved and cloned.

The copies are made by hand, of RAM and of the disks' files: what a snapshot does better is not
what is tried with it.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from uuid import UUID, uuid4

import pytest

from pyvmm.config import DiskConfig, RunConfig
from pyvmm.machine import Machine
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.snapshot.snapshot import Snapshot
from pyvmm.storage.open import DiskSource
from tests.support.disk_guest import built, read_memory, write_memory
from tests.support.guest import KERNEL, MIB, TOOLS, sparse
from tests.support.patience import patient
from tests.support.stock import stock_kernel

WAIT_S = 120.0
STOPPED = Outcome(Kind.STOPPED)
COMPLAINTS = (
    "soft lockup|hard LOCKUP|rcu.*stall|unstable|hung_task|blocked for more|I/O error|Oops|BUG:"
    "|WARNING:|clocksource.*skew|time.*went backwards"
)
"""A guest may say none of these of its pause, clocks or disks; an extended regular expression."""


def linux_config(
    folder: Path, *, cpus: int = 1, append: str = "", console: str = "ttyS0",
    stock: str | None = None, data_disks: int = 2,
) -> RunConfig:
    """Return a Linux with a shell: root ``TOOLS``, and ``data_disks`` empty disks in ``folder``.

    ``stock`` names a kernel of Debian's (``support.stock``), else it is ours.
    """
    disks = [DiskConfig(source=DiskSource(location=str(TOOLS), read_only=True))]
    for number in range(data_disks):
        path = sparse(folder / f"data{number}.img", 16)
        disks.append(DiskConfig(source=DiskSource(location=str(path)), serial=f"data{number}"))
    kernel, initrd = KERNEL, None
    if stock is not None:
        kernel, initrd = stock_kernel(stock).vmlinuz, stock_kernel(stock).initramfs
        append = f"root=/dev/vda {append}"
    return RunConfig(
        kernel=kernel, initrd=initrd, disks=tuple(disks), cpus=cpus, memory_bytes=256 * MIB,
        append=f"quiet console={console} pyvmm.shell {append}", console=str(folder / "console"),
        timeout_s=patient(900),
    )


@dataclass(frozen=True, slots=True)
class Saved:
    """A machine's state, and copies of its RAM and of the disks that it writes."""

    config: RunConfig
    state: dict[str, object]
    memory: list[bytes]
    disks: tuple[str, ...]


class LinuxMachine:
    """A machine of ``config``; its console is a file, which starts empty.

    ``machine`` is one that has been made of it already, a clone.
    """

    def __init__(self, config: RunConfig, machine: Machine | None = None) -> None:
        if machine is None:
            Path(config.console).unlink(missing_ok=True)
            machine = built(config)
        self.config = config
        self.machine: Machine = machine
        self._heard = 0
        self._number = 0

    def __enter__(self) -> LinuxMachine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.machine.stop(STOPPED)
        self.machine.close()

    # The console

    @property
    def shown(self) -> str:
        """Return all that the guest has written."""
        return Path(self.config.console).read_bytes().decode(errors="replace").replace("\r", "")

    def wait_for(self, text: str, timeout_s: float = WAIT_S) -> str:
        """Return what it writes up to ``text``, behind what was waited for before."""
        until_s = time.monotonic() + patient(timeout_s)
        while True:
            ended = self.machine.wait(timeout_s=0.05)
            new = self.shown[self._heard:]
            before, found, _ = new.partition(text)
            if found:
                self._heard += len(before) + len(text)
                return before
            assert ended is None, f"{ended}, without {text!r}: {new}"
            assert time.monotonic() < until_s, f"no {text!r}: {new}"

    def type(self, text: str) -> None:
        """Type ``text`` at the console."""
        left, until_s = text.encode(), time.monotonic() + patient(WAIT_S)
        while left:
            left = left[self.machine.consoles.receive(left):]
            if left:
                assert time.monotonic() < until_s, f"{left!r} is not taken"
                time.sleep(0.02)

    def run(self, line: str) -> str:
        """Return what the shell prints for ``line``, stripped."""
        self._number += 1
        mark = f"-{self._number}-"
        self.type(f"echo be''gin{mark}; {line}; echo e''nd{mark}\n")
        self.wait_for(f"begin{mark}\n")
        return self.wait_for(f"end{mark}\n").strip()

    def complaints(self) -> str:
        """Return the kernel's messages that it should have had no reason for."""
        return self.run(f"dmesg | grep -E '{COMPLAINTS}'")

    # Saving

    def begin(self, prompt: str = "# ") -> None:
        """Start it; wait for the shell."""
        self.machine.start()
        self.wait_for(prompt, 600)

    def save(self, folder: Path) -> Saved:
        """Quiesce it, copy all that it is, the disks into ``folder``; it stays quiesced."""
        folder.mkdir(exist_ok=True)
        assert self.machine.quiesce(patient(WAIT_S))
        state, memory = self.machine.save(), read_memory(self.machine)
        disks = []
        for disk in self.config.disks:
            assert isinstance(disk, DiskConfig)
            disks.append(disk.location)
            if not disk.read_only:
                disks[-1] = copied(disk.location, folder)
        return Saved(config=self.config, state=state, memory=memory, disks=tuple(disks))

    @classmethod
    def clone_of(
        cls, snapshot: Snapshot, console: Path, *, clock: str = "keep"
    ) -> LinuxMachine:
        """Return a clone, started; the new file ``console`` gets what it writes."""
        console.unlink(missing_ok=True)
        machine = snapshot.clone(console=str(console), clock=clock, report=pytest.fail)
        machine.start()
        return cls(machine.config.replace(console=str(console)), machine)

    @classmethod
    def restored(
        cls, saved: Saved, folder: Path, *, clock: str = "keep", clone_id: UUID | None = None
    ) -> LinuxMachine:
        """Return a machine that goes on from ``saved``, with files of its own; not started.

        It gets ``clone_id``, or one that nobody has had.
        """
        folder.mkdir()
        disks = []
        for disk, path in zip(saved.config.disks, saved.disks, strict=True):
            assert isinstance(disk, DiskConfig)
            if not disk.read_only:
                disk = disk.replace(source=DiskSource(location=copied(path, folder)))
            disks.append(disk)
        linux = cls(saved.config.replace(disks=tuple(disks), console=str(folder / "console")))
        write_memory(linux.machine, saved.memory)
        linux.machine.restore(saved.state, clock=clock)
        linux.machine.board.vmgenid.set(clone_id or uuid4())
        return linux


def copied(path: str, folder: Path) -> str:
    """Copy the file ``path``, holes and all, into ``folder``; return where it is."""
    target = folder / Path(path).name
    with Path(path).open("rb") as source, target.open("wb") as out:
        size, at = os.fstat(source.fileno()).st_size, 0
        out.truncate(size)
        with contextlib.suppress(OSError):  # ENXIO: nothing but a hole is left
            while at < size:
                at = os.lseek(source.fileno(), at, os.SEEK_DATA)
                end = os.lseek(source.fileno(), at, os.SEEK_HOLE)
                source.seek(at)
                out.seek(at)
                out.write(source.read(end - at))
                at = end
    return str(target)
