"""The parts of a snapshot that take their time: RAM, also while the guest goes on, and files."""

from __future__ import annotations

import os
from collections.abc import Sequence

from pyvmm.errors import HostError
from pyvmm.kvm.state import tsc_khz_of
from pyvmm.memory import GuestMemory
from pyvmm.ram.image import RamImage, new_memfd
from pyvmm.ram.live import LiveWriter, fork_writer
from pyvmm.ram.runs import USUAL_RUNS
from pyvmm.ram.write import write_ram
from pyvmm.snapshot.config_record import save_config, save_kernel
from pyvmm.snapshot.files.content import About, Base, SavedDisk, SavedRam
from pyvmm.snapshot.files.host import host_record
from pyvmm.snapshot.files.layout import RAM, overlay_name
from pyvmm.snapshot.files.writer import Writer
from pyvmm.snapshot.snapshot import Facts, Snapshot
from pyvmm.startup.types import TYPE_CHECKING
from pyvmm.storage.frozen import FrozenDisk

if TYPE_CHECKING:
    from pyvmm.machine import Machine


class LiveImage:
    """An image of ``memory`` in memory that a child process makes; a context manager.

    The guest is held still until this is made, and may go on then.  HostError.
    """

    def __init__(self, memory: GuestMemory) -> None:
        base = memory.image
        self._base: RamImage | None = None
        if isinstance(base, RamImage) and base.room:
            self._base = base.share()
        self._size_bytes = memory.size_bytes
        self._fd = -1
        self._child: LiveWriter | None = None
        try:
            self._fd = new_memfd(memory.size_bytes)
            most_runs = USUAL_RUNS if self._base is None else self._base.room
            self._child = fork_writer(memory, self._fd, over=self._base, most_runs=most_runs)
        except BaseException:
            self.close()
            raise

    def finish(self) -> RamImage:
        """Wait for the child and return the image; HostError."""
        assert self._child is not None
        try:
            runs = self._child.wait().runs
            if self._base is None or runs is None:
                image = RamImage.from_memfd(self._fd, self._size_bytes)
            else:
                image = self._base.over_memfd(self._fd, runs)
        except OSError as error:
            raise HostError(f"cannot keep RAM in memory: {error.strerror}") from error
        self._fd = -1
        self.close()
        return image

    def close(self) -> None:
        """End the child and free the rest; idempotent."""
        if self._child is not None:
            self._child.kill()
        if self._base is not None:
            self._base.close()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> LiveImage:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


class WrittenRam:
    """The file ``ram`` of a directory in the making, with ``regions`` as (GPA, bytes).

    A context manager, which ends a child that still writes.
    """

    def __init__(
        self, memory: GuestMemory, writer: Writer, *, live: bool, over: RamImage | None
    ) -> None:
        self.regions = tuple((region.gpa, region.length) for region in memory.regions)
        self.size_bytes = memory.size_bytes
        self._writer = writer
        self._child: LiveWriter | None = None
        self._fd = writer.create(RAM)
        try:
            if live:
                self._child = fork_writer(memory, self._fd, over=over)
            else:
                self._written = write_ram(memory, self._fd, over=over)
        except OSError as error:
            self.close()
            raise writer.failed(error, RAM) from error
        except BaseException:
            self.close()
            raise

    def finish(self) -> SavedRam:
        """Wait for a child, and return what is told of the file; SnapshotError, HostError."""
        if self._child is not None:
            try:
                self._written = self._child.wait()
            except OSError as error:
                raise self._writer.failed(error, RAM) from error
        written = self._written
        return SavedRam(
            regions=self.regions, crcs=written.crcs, held_bytes=written.held_bytes,
            runs=written.runs,
        )

    def close(self) -> None:
        """End the child and close the file; idempotent."""
        if self._child is not None:
            self._child.kill()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> WrittenRam:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def finish_directory(
    writer: Writer,
    about: About,
    host: dict[str, object],
    facts: Facts,
    ram: WrittenRam,
    disks: Sequence[FrozenDisk],
    base: Snapshot | None,
) -> RamImage:
    """Write all but RAM, give the directory its name, and return the image of its RAM.

    ``about`` and ``host`` become records.  SnapshotError, HostError.
    """
    saved_ram = ram.finish()
    saved_disks = [_save_disk(writer, index, disk) for index, disk in enumerate(disks)]
    writer.finish({
        "about": about.record(),
        "host": host,
        "config": save_config(facts.config, facts.own_devices),
        "kernel": save_kernel(facts.kernel),
        "ram": saved_ram.record(),
        "disks": [disk.record() for disk in saved_disks],
        "machine": facts.state,
        "base": None if base is None or base.path is None else Base.over(
            base.path, base.id.bytes, writer.path
        ).record(),
    })
    path = f"{writer.path}/{RAM}"
    if base is None or saved_ram.runs is None:
        return RamImage.open_file(path, ram.size_bytes)
    return base.image.over(path, saved_ram.runs)


def host_of(machine: Machine) -> dict[str, object]:
    """Return the record ``host``: what another host must have for the machine's vCPUs."""
    vcpus = [loop.vcpu for loop in machine.loops]
    kvm = vcpus[0].kvm
    assert kvm is not None  # ``build`` has made the vCPUs
    return host_record(
        supported=kvm.supported_cpuid(), given=[vcpu.cpuid for vcpu in vcpus],
        tsc_khz=tsc_khz_of(vcpus[0], kvm),
    )


def _save_disk(writer: Writer, index: int, disk: FrozenDisk) -> SavedDisk:
    path = writer.path_of(overlay_name(index))
    try:
        held = disk.save_overlay(path)
        size = None if held is None else os.stat(path).st_size
    except OSError as error:
        raise writer.failed(error, overlay_name(index)) from error
    return SavedDisk(
        index=index, location=disk.location, size_bytes=disk.size_bytes, stamp_ns=disk.stamp_ns,
        read_only=disk.read_only, overlay_bytes=size,
    )
