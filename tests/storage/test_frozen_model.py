"""Any legal use of frozen disks and private ones, against byte arrays."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from pyvmm.storage import layers
from pyvmm.storage.backend import BlockBackend
from pyvmm.storage.freezing import freeze, revert
from pyvmm.storage.frozen import FrozenDisk
from pyvmm.storage.open import DiskSource, open_backend

SECTORS = 8 * 20 + 3  # the last block is cut off
RANGES = st.integers(0, SECTORS - 1).flatmap(
    lambda first: st.tuples(st.just(first), st.integers(1, min(30, SECTORS - first)))
)


class Disk:
    """A disk and its bytes."""

    def __init__(self, disk: BlockBackend, model: bytes) -> None:
        self.disk = disk
        self.model = bytearray(model)

    def content(self) -> bytes:
        buffer = bytearray(len(self.model))
        with memoryview(buffer) as view:  # in pieces, as a guest's requests are
            self.disk.readv([view[:512], view[512:9000], view[9000:]], 0)
        return bytes(buffer)


class Frozen:
    """A frozen disk and its bytes."""

    def __init__(self, disk: FrozenDisk, model: bytes) -> None:
        self.disk = disk
        self.model = bytes(model)


class Machines(RuleBasedStateMachine):
    """Disks of machines that write, freeze, clone, go back, are saved and dropped."""

    disks: Bundle[Disk] = Bundle("disks")
    frozen: Bundle[Frozen] = Bundle("frozen")

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.directory = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        patch = self.stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("TMPDIR", str(self.directory))
        patch.setattr(layers, "_MAX_LAYERS", 4)
        self.open_disks: list[Disk] = []
        self.open_frozen: list[Frozen] = []
        self.number = 0

    @initialize(
        target=disks, has_overlay=st.booleans(), cheap_blocks=st.sampled_from([0, 3, 99]),
        numbers=st.sampled_from([5, 1000]),
    )
    def begin(self, has_overlay: bool, cheap_blocks: int, numbers: int) -> Disk:
        patch = self.stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(layers, "_CHEAP_BLOCKS", cheap_blocks)
        patch.setattr(layers, "_ENOUGH_NUMBERS", numbers)
        base = self.directory / "base.img"
        content = b"".join(bytes([sector, 255]) * 256 for sector in range(SECTORS))
        base.write_bytes(content)
        overlay = str(self.directory / "disk.overlay") if has_overlay else ""
        source = DiskSource(location=str(base), snapshot=True, overlay=overlay)
        return self.opened(open_backend(source, report=pytest.fail), content)

    def opened(self, disk: BlockBackend, model: bytes) -> Disk:
        self.open_disks.append(Disk(disk, model))
        return self.open_disks[-1]

    @rule(disk=disks, where=RANGES, is_durable=st.booleans())
    def write(self, disk: Disk, where: tuple[int, int], is_durable: bool) -> None:
        self.number += 1
        offset, length = where[0] * 512, where[1] * 512
        data = self.number.to_bytes(4, "little") * (length // 4)
        disk.disk.writev([memoryview(data)[:100], memoryview(data)[100:]], offset,
                         durable=is_durable)
        disk.model[offset : offset + length] = data

    @rule(disk=disks, where=RANGES, unmap=st.booleans())
    def zero(self, disk: Disk, where: tuple[int, int], unmap: bool) -> None:
        offset, length = where[0] * 512, where[1] * 512
        disk.disk.write_zeroes(offset, length, unmap=unmap)
        disk.model[offset : offset + length] = bytes(length)

    @rule(disk=disks, where=RANGES)
    def discard(self, disk: Disk, where: tuple[int, int]) -> None:
        disk.disk.discard(where[0] * 512, where[1] * 512)
        now = disk.content()
        for sector in range(where[0], sum(where)):
            at = slice(sector * 512, sector * 512 + 512)
            assert now[at] in (disk.model[at], bytes(512))
            disk.model[at] = now[at]

    @rule(target=frozen, disk=disks)
    def freeze(self, disk: Disk) -> Frozen:
        self.open_frozen.append(Frozen(freeze(disk.disk), bytes(disk.model)))
        return self.open_frozen[-1]

    @rule(target=disks, frozen=frozen)
    def clone(self, frozen: Frozen) -> Any:
        if len(self.open_disks) > 6:
            return multiple()
        return self.opened(frozen.disk.open(report=pytest.fail), frozen.model)

    @rule(disk=disks, frozen=frozen)
    def revert(self, disk: Disk, frozen: Frozen) -> None:
        if hasattr(disk.disk, "frozen"):  # not the one with an overlay file
            revert(disk.disk, frozen.disk)
            disk.model[:] = frozen.model

    @rule(target=frozen, frozen=frozen)
    def save(self, frozen: Frozen) -> Frozen:
        self.number += 1
        path = str(self.directory / f"{self.number}.overlay")
        held = frozen.disk.save_overlay(path)
        saved = FrozenDisk.open_saved(
            frozen.disk.location, None if held is None else path,
            size_bytes=frozen.disk.size_bytes, stamp_ns=frozen.disk.stamp_ns, read_only=False,
            report=pytest.fail,
        )
        assert saved.held_bytes == frozen.disk.held_bytes
        self.open_frozen.append(Frozen(saved, frozen.model))
        return self.open_frozen[-1]

    @precondition(lambda self: self.open_disks)
    @rule(frozen=consumes(frozen))
    def drop(self, frozen: Frozen) -> None:
        frozen.disk.close()
        self.open_frozen.remove(frozen)

    @precondition(lambda self: len(self.open_disks) + len(self.open_frozen) > 1)
    @rule(disk=consumes(disks))
    def end(self, disk: Disk) -> None:
        disk.disk.close()
        self.open_disks.remove(disk)

    @invariant()
    def every_disk_reads_as_its_model(self) -> None:
        for disk in self.open_disks:
            assert disk.content() == disk.model
        for frozen in self.open_frozen:
            buffer = bytearray(len(frozen.model))
            frozen.disk.readv([memoryview(buffer)], 0)
            assert buffer == frozen.model

    def teardown(self) -> None:
        for disk in self.open_disks:
            disk.disk.close()
        for frozen in self.open_frozen:
            frozen.disk.close()
        self.stack.close()


Machines.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestMachines = Machines.TestCase
