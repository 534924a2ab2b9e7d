"""Open a snapshot's directory: from files to a ``Snapshot`` from which clones go on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from types import MappingProxyType

from pyvmm.config import Source
from pyvmm.errors import SnapshotError, StateError
from pyvmm.kvm.handles import Kvm
from pyvmm.snapshot.config_record import restore_config, restore_kernel
from pyvmm.snapshot.files.host import check_host, read_host
from pyvmm.snapshot.files.layout import STATE, no_such_disk
from pyvmm.snapshot.files.saved import Saved, open_saved
from pyvmm.snapshot.snapshot import Facts, Snapshot
from pyvmm.storage.frozen import FrozenDisk
from pyvmm.x86 import layout


def open_snapshot(
    path: str | os.PathLike[str],
    *,
    disks: Mapping[int, str] = MappingProxyType({}),
    report: Callable[[str], None],
) -> Snapshot:
    """Return the snapshot in the directory ``path``, for the caller to close.

    ``disks`` names the files under the guest's disks, by index, if they are at other places now.
    SnapshotError, naming the file and what is wrong with it, or what this host lacks; HostError.
    """
    with contextlib.ExitStack() as stack:
        saved = stack.enter_context(open_saved(path))
        for index in disks:
            if index not in range(len(saved.disks)):
                raise no_such_disk(index, saved.path, len(saved.disks))
        image = saved.open_ram()
        stack.callback(image.close)
        frozen = []
        for disk in saved.disks:
            frozen.append(FrozenDisk.open_saved(
                disks.get(disk.index, disk.location), saved.overlay_path(disk.index),
                size_bytes=disk.size_bytes, stamp_ns=disk.stamp_ns, read_only=disk.read_only,
                replaced=disk.index in disks, report=report,
            ))
            stack.callback(frozen[-1].close)
        cpuid = _check_host(saved)
        try:
            facts = _read_facts(saved, cpuid, [disk.as_source() for disk in frozen])
        except StateError as error:
            raise SnapshotError(saved.path, f"its state cannot be used: {error}") from error
        ours = stack.pop_all()
        saved.close()
        ours.pop_all()
        return Snapshot(facts, image, frozen, saved.path)


def _check_host(saved: Saved) -> tuple[bytes, ...]:
    """Return the CPUID of each vCPU; SnapshotError if this host cannot run them, HostError.

    Its TSC is compared when a vCPU is restored: KVM tells the rate of vCPUs only.
    """
    host = read_host(saved.record("host"), name=saved.path_of(STATE))
    with Kvm() as kvm:
        supported = kvm.packed_cpuid()
    check_host(host, name=saved.path, supported=supported, tsc_khz=None, scales_tsc=False)
    return host.given


def _read_facts(saved: Saved, cpuid: tuple[bytes, ...], sources: list[Source]) -> Facts:
    """Return all else that ``state`` has; StateError."""
    config, own_devices = restore_config(saved.record("config"), sources)
    if saved.ram.regions != tuple(layout.ram_ranges(config.memory_bytes)):
        raise StateError("ram", "regions are not those of a machine with so much memory")
    if len(cpuid) != config.cpus:
        raise StateError("host", f"cpuid is not a list of {config.cpus}")
    state = saved.record("machine")
    if not isinstance(state, dict):
        raise StateError("machine", "the state is no dict")
    return Facts(
        id=saved.id, made_ns=saved.about.made_ns, is_live=saved.about.is_live,
        config=config, kernel=restore_kernel(saved.record("kernel")), cpuid=cpuid,
        own_devices=own_devices, state=state,
    )
