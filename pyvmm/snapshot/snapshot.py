"""A saved machine from which any number of clones go on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from pyvmm.board.origin import Origin
from pyvmm.config import DiskConfig, RunConfig, Source
from pyvmm.errors import SnapshotError
from pyvmm.machine import Machine, build
from pyvmm.ram.image import RamImage
from pyvmm.snapshot.files.layout import no_such_disk
from pyvmm.snapshot.shell import Lines, Shell
from pyvmm.startup.types import TYPE_CHECKING, Record
from pyvmm.storage.frozen import FrozenDisk
from pyvmm.virtio.block import BlockDevice
from pyvmm.virtio.device import VirtioDevice
from pyvmm.x86.image import Kernel

if TYPE_CHECKING:
    from uuid import UUID


class Facts(Record):
    """All of a snapshot but its RAM and disks.

    ``id`` has the 16 bytes of a UUID.  ``state`` is that of ``Machine.save``.  ``own_devices`` are
    the names of the virtio devices that a script brought.
    """

    id: bytes
    made_ns: int
    is_live: bool
    config: RunConfig
    kernel: Kernel
    cpuid: tuple[bytes, ...]
    own_devices: tuple[str, ...]
    state: dict[str, object]


class Snapshot:
    """A machine at one moment: its RAM ``image``, its ``disks``, and all other ``facts``.

    Nothing ever changes it.  Clones map its RAM privately and write to disks of their own over
    its frozen ones.  ``path`` is its directory, None if it is in memory only.

    Each holder closes its share once; the RAM and the disks are freed with the last one.  Clones
    hold what they need, so a snapshot may be closed before them.  All methods may be called from
    any thread.
    """

    def __init__(
        self, facts: Facts, image: RamImage, disks: Sequence[FrozenDisk], path: str | None = None
    ) -> None:
        self.facts = facts
        self.image = image
        self.disks = tuple(disks)
        self.path = path
        self._lock = threading.Lock()
        self._shares = 1

    @property
    def id(self) -> UUID:
        """The snapshot's own number."""
        from uuid import UUID  # a restore does without: its imports take longer than the rest

        return UUID(bytes=self.facts.id)

    @property
    def name(self) -> str:
        """The snapshot in messages."""
        return self.path or "the snapshot in memory"

    def share(self) -> Snapshot:
        """Return the snapshot for one more holder, who closes it; RuntimeError once it is freed."""
        with self._lock:
            if not self._shares:
                raise RuntimeError(f"{self.name} was closed")
            self._shares += 1
        return self

    def close(self) -> None:
        """Give up a share."""
        with self._lock:
            if not self._shares:
                return
            self._shares -= 1
            if self._shares:
                return
        self.image.close()
        for disk in self.disks:
            disk.close()

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def build_shell(
        self,
        *,
        console: str = "none",
        disks: Mapping[int, Source] = MappingProxyType({}),
        devices: Mapping[str, VirtioDevice] = MappingProxyType({}),
        report: Callable[[str], None],
    ) -> Shell:
        """Return a machine without a state, made of this snapshot.

        ``disks`` take the place of the frozen ones, by index: the guest must find there what it
        knows.  ``devices`` have the names of those that the saved machine had.  SnapshotError, and
        errors as those of ``build``.
        """
        if set(devices) != set(self.facts.own_devices):
            names = ", ".join(self.facts.own_devices) or "none"
            raise SnapshotError(
                self.name, f"was made with devices of a script's own: {names}; a clone needs the "
                f"same ones again, as devices={{name: device}}, not {', '.join(devices) or 'none'}"
            )
        in_order = {name: devices[name] for name in self.facts.own_devices}
        lines = Lines(report)
        base = self.share()
        try:
            machine = build(
                self._config(console, disks), report=lines, devices=in_order,
                origin=Origin(
                    image=self.image, kernel=self.facts.kernel, cpuid=self.facts.cpuid
                ),
            )
        except BaseException:
            base.close()
            raise
        machine.base, machine.newest = base, self.share()
        try:
            self._check_sizes(machine, disks)
        except BaseException:
            machine.close()
            raise
        return Shell(machine, self, lines)

    def _check_sizes(self, machine: Machine, disks: Mapping[int, Source]) -> None:
        """Raise SnapshotError if one of ``disks`` has not the size that the guest knows."""
        for index, source in disks.items():
            device = machine.board.slots[index].device  # disks have the first slots
            size = device.disk.size_bytes if isinstance(device, BlockDevice) else 0
            if size != self.disks[index].size_bytes:
                raise SnapshotError(
                    f"disk {index}", f"{source.location} has {size} bytes, and the guest knows a "
                    f"disk of {self.disks[index].size_bytes}"
                )

    def clone(
        self,
        *,
        console: str = "none",
        timeout_s: float | None = None,
        clock: str = "keep",
        disks: Mapping[int, Source] = MappingProxyType({}),
        devices: Mapping[str, VirtioDevice] = MappingProxyType({}),
        report: Callable[[str], None],
    ) -> Machine:
        """Return a machine that goes on from here when it is started: see ``build_shell`` and
        ``Shell.become_clone``."""
        shell = self.build_shell(console=console, disks=disks, devices=devices, report=report)
        return shell.become_clone(timeout_s=timeout_s, clock=clock)

    def _config(self, console: str, disks: Mapping[int, Source]) -> RunConfig:
        saved = self.facts.config
        for index in disks:
            if index not in range(len(self.disks)):
                raise no_such_disk(index, self.name, len(self.disks))
        found: list[DiskConfig] = []
        for index, (config, frozen) in enumerate(zip(saved.disks, self.disks, strict=True)):
            assert isinstance(config, DiskConfig)  # no other is ever frozen
            source = disks[index] if index in disks else frozen.as_source()
            if source.read_only != config.read_only:
                raise SnapshotError(
                    f"disk {index}", f"{source.location}: the guest knows it as "
                    f"{'read-only' if config.read_only else 'writable'}"
                )
            found.append(config.replace(source=source))
        return saved.replace(disks=tuple(found), console=console, timeout_s=None)
