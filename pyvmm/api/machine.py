"""``pyvmm.Machine``, which can be saved, and ``pyvmm.Snapshot``, from which machines go on."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType

from pyvmm.api.arguments import (
    check_by_index,
    check_checkpoint,
    check_files_by_index,
    check_flag,
    check_path,
    check_path_or_none,
    check_report,
    check_seconds,
)
from pyvmm.api.config import as_disk_config, check_type
from pyvmm.api.running import RunningMachine, check_devices, log_line
from pyvmm.config import DiskConfig, Source
from pyvmm.errors import SnapshotError
from pyvmm.machine import Machine as CoreMachine
from pyvmm.open_files import EnoughFiles
from pyvmm.snapshot.shells import Shells
from pyvmm.snapshot.snapshot import Snapshot as CoreSnapshot
from pyvmm.startup.types import TYPE_CHECKING
from pyvmm.virtio.device import VirtioDevice

if TYPE_CHECKING:
    from os import PathLike
    from uuid import UUID

    from pyvmm.api.config import AnyDisk

MAX_PREPARED = 1000


class Machine(RunningMachine):
    """A machine made of ``config``: ``run()`` it, or ``start()`` and ``wait()``; once.

    A context manager: leaving it stops the machine and frees all that it has.  All methods may be
    called from any thread, several machines may run at once, and none touches the process's
    signals (but for the handler of one real-time signal while vCPUs run, which does nothing),
    terminal, ``gc``, switch interval or working directory.

    ``report`` is called with lines about what is odd, from any thread; by default they go to the
    logger ``pyvmm`` as warnings.  ``devices`` are virtio devices of your own, by name
    (docs/devices.md).

    ConfigError for files and options that cannot work, HostError for a host that cannot.
    RuntimeError for a second start, for use after ``close``, and for a call that would wait for
    its own thread, as ``wait`` in a hook would.
    """

    @classmethod
    def _of(
        cls,
        make: Callable[[Callable[[str], None]], CoreMachine],
        report: Callable[[str], None] | None,
    ) -> Machine:
        """Return the machine that ``make`` makes; it is told who takes its lines."""
        machine = cls.__new__(cls)
        machine._report = report or log_line
        machine._is_built = False
        machine._take(make(machine._tell))
        return machine

    # Time travel

    def checkpoint(self) -> int:
        """Keep this moment in memory, to return to it; return its number.

        Cheap enough for one every 100 ms: only what the guest has written since the last one is
        copied.  A running guest is paused meanwhile, and runs on.  The oldest checkpoints make
        room for new ones: at most 1024 are kept, and 1 GiB to undo what was written.

        SnapshotError for a run that is over, and for disks that cannot be brought back: those
        written in place, or by another process.  RuntimeError in a hook.
        """
        self._lifetime.check_open("checkpoint()")
        with EnoughFiles():
            from pyvmm.snapshot.checkpoints import checkpoints_of

            return checkpoints_of(self._machine).take()

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """The numbers of the checkpoints that there are, the oldest first."""
        if self._machine.checkpoints is None:
            return ()
        from pyvmm.snapshot.checkpoints import checkpoints_of

        return checkpoints_of(self._machine).numbers

    def rewind(self, number: int | None = None) -> None:
        """Return to checkpoint ``number`` and forget those after it.

        None is the newest moment that was kept: a checkpoint, a snapshot that was taken after it,
        or the snapshot from which the machine was cloned.  A guest that runs goes on running, a
        paused one stays paused.  One that has ended (panicked, powered off, stopped) is paused
        then, without an outcome: ``resume`` it.  A time limit starts anew.

        All that the guest has printed stays in ``console.text``.  SnapshotError if there is no such
        moment.  RuntimeError in a hook.
        """
        check_checkpoint(number)
        with self._lifetime.rewinding():
            from pyvmm.snapshot.checkpoints import checkpoints_of

            checkpoints_of(self._machine).rewind(number, attach=self._attach_anew)

    # Snapshots

    def snapshot(
        self,
        dir: str | PathLike[str] | None = None,  # noqa: A002 - as in `pyvmm restore DIR`
        *,
        live: bool = False,
        diff: bool = False,
    ) -> Snapshot:
        """Save the whole machine as it is now, for clones to go on from: see ``Snapshot``.

        In memory, or in the directory ``dir``, which is made and never overwritten.  A guest that
        runs is paused meanwhile, and runs on afterwards.  With ``live`` it is paused only for
        milliseconds, and a child process copies its RAM.  With ``diff`` the directory has only
        what differs from the one that the machine was cloned from.

        SnapshotError for a machine that cannot be saved: disks that are written in place, or that
        another process serves.  RuntimeError in a hook, which would wait for itself.
        """
        check_path_or_none("dir", dir)
        check_flag("live", live)
        check_flag("diff", diff)
        self._lifetime.check_open("snapshot()")
        with EnoughFiles():
            from pyvmm.snapshot.capture import take

            return Snapshot(take(self._machine, dir, live=live, diff=diff), self._report)

    @property
    def clone_id(self) -> UUID | None:
        """The number of a clone, fresh for each and at each rewind; None for a machine that
        booted."""
        return self._machine.clone_id


class Snapshot:
    """A machine at one moment, from ``Machine.snapshot`` or ``Snapshot.open``; it never changes.

    A context manager: leaving it frees the snapshot and what was prepared.  Its clones go on, and
    may outlive it; so does the machine that it was taken of.  A snapshot in a directory is there
    until somebody removes it.  All methods may be called from any thread.
    """

    def __init__(self, snapshot: CoreSnapshot, report: Callable[[str], None]) -> None:
        self._snapshot = snapshot
        self._report = report
        self._shells = Shells(snapshot, report)
        self._lock = threading.Lock()
        self._is_closed = False
        self._pid = os.getpid()

    @classmethod
    def open(
        cls,
        dir: str | PathLike[str],  # noqa: A002 - as in `pyvmm restore DIR`
        *,
        disks: Mapping[int, str | PathLike[str]] = MappingProxyType({}),
        report: Callable[[str], None] | None = None,
    ) -> Snapshot:
        """Return the snapshot in the directory ``dir``.

        ``disks`` names the files under the guest's disks, by index from 0, if they are at other
        places now.  SnapshotError, in one line, for a directory that is damaged or of a later
        version, for a disk that is missing or has changed, and if this host's processor lacks
        something that the guest uses.
        """
        check_path("dir", dir)
        check_files_by_index(disks)
        check_report(report)
        tell = report or log_line
        files = {index: os.fspath(path) for index, path in disks.items()}
        with EnoughFiles():
            from pyvmm.snapshot.opening import open_snapshot

            return cls(open_snapshot(dir, disks=files, report=tell), tell)

    @property
    def id(self) -> UUID:
        """The snapshot's own number."""
        return self._snapshot.id

    @property
    def path(self) -> str | None:
        """The snapshot's directory; None if it is in memory only."""
        return self._snapshot.path

    def clone(
        self,
        *,
        disks: Mapping[int, AnyDisk] | None = None,
        devices: Mapping[str, VirtioDevice] = MappingProxyType({}),
        console: str | PathLike[str] | None = None,
        timeout_s: float | None = None,
        clock: str = "keep",
        report: Callable[[str], None] | None = None,
    ) -> Machine:
        """Return a machine that goes on from here once it is started, as often as you like.

        Each has RAM and disks of its own: what one of them writes no other sees, and it is gone
        with the machine.  ``disks`` replaces disks, by index from 0, with others of the same
        content, such as ``Overlay(base, path)``.  ``devices`` are needed again if the saved
        machine had any, with the same names.  ``console`` is a file that gets the guest's output
        too.  The run ends after ``timeout_s`` seconds.  ``clock`` "keep" has the guest's clock go
        on from the snapshot, "now" has it show that time has passed.

        A prepared clone is taken if there is one, unless ``disks``, ``devices`` or ``console`` ask
        for another machine.  SnapshotError, ConfigError, HostError.
        """
        check_seconds("timeout_s", timeout_s)
        check_path_or_none("console", console)
        check_type("clock", clock, str, "'keep' or 'now'")
        check_report(report)
        check_devices(devices)
        if disks is not None:
            check_by_index(disks)
        sources = {index: _source(index, disk) for index, disk in (disks or {}).items()}
        snapshot = self._share("clone()")

        def make(tell: Callable[[str], None]) -> CoreMachine:
            shell = None
            if not sources and not devices and console is None:
                shell = self._shells.take()
            if shell is None:
                shell = snapshot.build_shell(
                    console="none" if console is None else os.fspath(console), disks=sources,
                    devices=devices, report=tell,
                )
            shell.lines.to = tell
            return shell.become_clone(timeout_s=timeout_s, clock=clock)

        try:
            with EnoughFiles():
                return Machine._of(make, report or self._report)
        finally:
            snapshot.close()

    def prepare(self, n: int) -> None:
        """Have ``n`` more clones prepared in the background; ``clone`` takes them, the fastest way.

        Returns at once.  Each prepared clone has its VM already, but none of the guest's memory.
        """
        check_type("n", n, int, "a number of clones")
        if not 0 <= n <= MAX_PREPARED:
            raise ValueError(f"prepare({n}): must be from 0 to {MAX_PREPARED}")
        with self._lock:
            self._check_open("prepare()")
            if self._snapshot.facts.own_devices:
                raise SnapshotError(
                    "prepare()", "this snapshot's clones need devices of your own, which only "
                    "clone(devices=...) can give them"
                )
            self._shells.prepare(n)

    @property
    def ready(self) -> int:
        """The number of prepared clones that nobody has taken."""
        return self._shells.ready

    def wait_until_prepared(self, timeout_s: float | None = None) -> bool:
        """Wait until all that ``prepare`` asked for is ready; False after ``timeout_s``."""
        check_seconds("timeout_s", timeout_s)
        return self._shells.wait(timeout_s)

    def close(self) -> None:
        """Free the snapshot and what was prepared; idempotent.  Clones go on."""
        with self._lock:
            if self._is_closed or os.getpid() != self._pid:
                return
            self._is_closed = True
        self._shells.close()
        self._snapshot.close()

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if "_pid" in self.__dict__ and not self._is_closed and os.getpid() == self._pid:
            self.close()
            warnings.warn("the snapshot was never closed", ResourceWarning, stacklevel=2)

    def _share(self, call: str) -> CoreSnapshot:
        with self._lock:
            self._check_open(call)
            return self._snapshot.share()

    def _check_open(self, call: str) -> None:
        if self._is_closed:
            raise RuntimeError(f"{call}: the snapshot was closed")
        if os.getpid() != self._pid:
            raise RuntimeError(f"{call}: the snapshot belongs to process {self._pid}")


def _source(index: int, disk: AnyDisk) -> Source:
    """Return ``disk`` as the source that takes the place of a frozen one."""
    config = as_disk_config(disk)
    if not isinstance(config, DiskConfig):
        raise SnapshotError(
            f"disk {index}", "a disk that another process serves has a state of its own, and "
            "cannot take a saved one's place"
        )
    return config.source
