"""Descriptor chains for every virtio device: legal ones against a model, and damaged ones."""

from __future__ import annotations

import struct

from fuzz.block_model import (
    DISCARD,
    FLUSH,
    GET_ID,
    IN,
    OUT,
    WRITE_ZEROES,
    Ask,
    ModelDisk,
)
from fuzz.machine import DISK_SECTORS, RAM_BYTES, RAM_END, Bench, Machine
from fuzz.source import Source
from fuzz.target import Target
from pyvmm.virtio import device as virtio_device
from pyvmm.virtio.block.fast import path as fast_path
from pyvmm.virtio.spec import BlockFeature, Feature, Register
from tests.support.packed_driver import PackedDriver, pack
from tests.support.virtio_driver import (
    INDIRECT,
    RAM_BASE,
    STATUS_POISON,
    WRITE,
    BlockDriver,
    Descriptor,
    VirtioDriver,
    readable,
    writable,
)

_TYPES = (IN, IN, OUT, OUT, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, 77)
_POISON = STATUS_POISON
_KINDS = ("block", "block", "block", "console", "entropy")
_MOST_ROUNDS = 12
_BUDGETS = (virtio_device.PASS_BYTES, 512, 1024, 5000)
"""Of a pass, in bytes.  With a small one a pass ends in the middle of what is offered, as it else
does after 64 MiB: what was taken and not served has to be there again."""
_DATA_BYTES = 2048


class RingsTarget(Target):
    """Legal requests do what the model says; of damaged ones nothing but their own is touched."""

    is_structured = True
    max_bytes = 2048

    def __init__(self) -> None:
        self._bench = Bench()

    def run(self, data: bytes) -> None:
        """Offer the chains that ``data`` describes."""
        source = Source(data)
        budget = source.pick(_BUDGETS)
        _set_budget(budget)
        try:
            machine = self._bench.machine(source.pick(_KINDS), source)
            case = _Case(machine, source)
            for _ in range(_MOST_ROUNDS):
                if not source.more or not case.round():
                    break
            machine.check_works()
            machine.close()
        finally:
            _set_budget(_BUDGETS[0])

    def close(self) -> None:
        """See ``Target.close``."""
        self._bench.close()


class _Case:
    """A driver of one queue of ``machine``."""

    def __init__(self, machine: Machine, source: Source) -> None:
        self._machine = machine
        self._source = source
        self._memory = machine.memory
        device = machine.device
        index = source.number(0, len(device.queues) - 1)
        features = device.avail_features & ~int(
            source.pick((0, 0, Feature.EVENT_IDX, Feature.INDIRECT_DESC, Feature.IN_ORDER))
            | source.pick((0, BlockFeature.FLUSH, BlockFeature.DISCARD))
        )
        if source.chance(128):
            features &= ~int(Feature.RING_PACKED)
        self._is_packed = bool(features & Feature.RING_PACKED)
        self._has_indirect = bool(features & Feature.INDIRECT_DESC)
        most = machine.queue_size
        size = source.pick([size for size in (2, 4, 8, 16, 64, 256) if size <= most] + [most])
        if self._is_packed:
            size = max(2, size - source.number(0, 1))  # need be no power of 2
        kind = PackedDriver if self._is_packed else BlockDriver
        self._driver = kind(machine.transport, machine.memory, size=size, index=index)
        self._driver.start(features)
        self._features = features
        self._size = size
        self._arena = self._driver._top
        self._heads = list(range(size))
        read_only = machine.config.read_only
        self._disk = ModelDisk(bytearray(machine.disk), features, read_only)

    def round(self) -> bool:
        """Offer some chains, serve them, judge what came of it; False if that was the end."""
        source, driver = self._source, self._driver
        is_legal = source.chance(160)
        driver._top = self._arena
        if driver.event_idx:
            driver.interrupt_after(source.number(1, 8))
        else:
            driver.want_interrupts(source.chance(128))
        asks: dict[int, Ask] = {}
        left = self._size
        for number in range(source.number(1, min(self._size, 40))):
            if driver._top > RAM_END - 4 * _DATA_BYTES:
                break
            chain, ask = self._make_chain(is_legal)
            if self._has_indirect and source.chance(128):
                chain = [driver.indirect(chain)]
            if len(chain) > left:
                break
            # A head of a split ring is the chain's place in the table; an ID of a packed one
            # may be anything.
            head = number if self._is_packed else self._size - left
            left -= len(chain)
            driver.place(chain, head)
            asks[head] = ask
            if is_legal:
                ask.execute(self._disk)
        if not is_legal:
            self._damage()
        if source.chance(64):
            self._machine.host_event(source) if self._machine.kind != "block" else None
        mask = None if is_legal else self._writable_bytes()
        before = self._memory.read(RAM_BASE, RAM_BYTES)
        driver.notify()
        if source.chance(20):
            return self._reset_midway()
        self._machine.serve_all(driver.index)
        if mask is not None:
            self._check_untouched(before, mask)
        if not is_legal:
            return self._go_on(driver, asks)
        assert not driver.needs_reset, "a legal driver was refused"
        self._judge(asks)
        return True

    # Chains

    def _make_chain(self, is_legal: bool) -> tuple[list[Descriptor], Ask]:
        if self._machine.kind != "block":
            return self._make_plain_chain()
        return self._make_request(is_legal)

    def _make_plain_chain(self) -> tuple[list[Descriptor], Ask]:
        """Buffers for a console or an entropy device."""
        source, driver = self._source, self._driver
        is_sent = self._machine.kind == "console" and driver.index == 1
        length = source.number(1, 600)
        gpa = driver.alloc(length, 1)
        pieces = _cut(source, gpa, length, self._size)
        buffer = readable if is_sent else writable
        lengths = (0,) if is_sent else (length,)
        return [buffer(*piece) for piece in pieces], Ask(lengths=lengths)

    def _make_request(self, is_legal: bool) -> tuple[list[Descriptor], Ask]:
        """A block request in any framing; the model does it at once."""
        source, driver = self._source, self._driver
        kind = source.pick(_TYPES)
        sector = source.number(0, DISK_SECTORS + 1)
        length = 512 * source.number(1, _DATA_BYTES // 512)
        if source.chance(16):
            length += source.pick((-1, 1, -512))
        if not is_legal and source.chance(64):
            sector = source.bits(64)
        ask = Ask()
        sent = b""
        if kind == OUT:
            sent = (source.take(4) or b"\xa5").ljust(length, b"\x5a")[:length]
        elif kind in (DISCARD, WRITE_ZEROES):
            ask.ranges = [(sector, source.number(1, 4))]
            while len(ask.ranges) < 4 and source.chance(96):
                ask.ranges.append((source.number(0, DISK_SECTORS), source.number(1, 4)))
            sent = b"".join(struct.pack("<QII", *one, 0) for one in ask.ranges)
        room = {IN: length, GET_ID: source.pick((20, 1, 19, 64))}.get(kind, 0)
        header = driver.header(kind, sector)
        ask.status_at = driver.status_byte()
        readables = [(header, 16)]
        if source.chance(24):
            readables = _cut(source, header, 16)
        if sent:
            readables += _cut(source, driver.put(sent), len(sent))
        writables: list[tuple[int, int]] = []
        if room:
            ask.buffer = driver.put(bytes([_POISON]) * room)
            writables = _cut(source, ask.buffer, room)
        writables.append((ask.status_at, 1))
        chain = [readable(*one) for one in readables] + [writable(*one) for one in writables]
        if len(chain) > self._size:  # a chain is no longer than the queue
            data = [readable(driver.put(sent), len(sent))] if sent else []
            data += [writable(ask.buffer, room)] if room else []
            chain = [readable(header, 16), *data, writable(ask.status_at, 1)]
        if len(chain) > self._size:
            return self._make_flush()
        ask.kind, ask.sector, ask.length = kind, sector, length
        ask.sent, ask.room = sent, room
        return chain, ask

    def _make_flush(self) -> tuple[list[Descriptor], Ask]:
        """The shortest request, for the smallest queue."""
        driver = self._driver
        ask = Ask(status_at=driver.status_byte(), kind=FLUSH)
        return [readable(driver.header(FLUSH), 16), writable(ask.status_at, 1)], ask

    # Damage

    def _damage(self) -> None:
        """Write descriptors, or anything, over what was laid out."""
        source, driver, memory = self._source, self._driver, self._memory
        for _ in range(source.bits(3)):
            gpa = source.edge(driver.desc, self._arena, RAM_BASE, RAM_END - 8, RAM_END)
            length = source.edge(0, 1, 16, 512, 1024, 4096, bits=32)
            flags = source.bits(3) if source.chance(200) else source.bits(16)
            following = source.number(0, self._size)
            one = Descriptor(gpa, length, flags, following)
            if source.chance(160):
                slot = source.number(0, self._size - 1)
                if isinstance(driver, PackedDriver):
                    driver.write_slot(slot, one, source.bits(4), driver.owner)
                else:
                    driver.write_table([one], slot)
            else:  # into an indirect table, if there is one
                at = self._arena + 16 * source.number(0, (driver._top - self._arena) // 16)
                if at + 16 <= RAM_END:
                    memory.write(at, pack(gpa, length, following, flags))
        if not isinstance(driver, PackedDriver):
            for _ in range(source.bits(2) if source.chance(64) else 0):
                driver.offer(source.number(0, self._size))

    def _writable_bytes(self) -> bytearray | None:
        """Return which bytes of RAM the device may write, as the descriptors are now; None if a
        request may change descriptors of a later one."""
        mask = bytearray(RAM_BYTES)
        driver = self._driver
        table = self._memory.read(driver.desc, 16 * self._size)
        if self._is_packed:
            _permit(mask, driver.desc, 16 * self._size)
            _permit(mask, driver.used, 4)
        else:
            _permit(mask, driver.used, 6 + 8 * self._size)
        rings = bytes(mask)
        self._permit_table(mask, table, self._has_indirect)
        # What is read as a descriptor, or as the place of one, has to be what we have read.
        if mask[: self._arena - RAM_BASE] != rings[: self._arena - RAM_BASE]:
            return None
        for gpa, length in self._tables(table):
            if any(mask[max(0, gpa - RAM_BASE) : gpa - RAM_BASE + length]):
                return None
        return mask

    def _tables(self, table: bytes) -> list[tuple[int, int]]:
        """The indirect tables that descriptors in ``table`` name, as far as they are in RAM."""
        return [
            (gpa, length) for gpa, length, flags in self._entries(table)
            if flags & INDIRECT and self._memory.contains(gpa, length)
        ]

    def _entries(self, table: bytes) -> list[tuple[int, int, int]]:
        flags_at = 3 if self._is_packed else 2
        whole = table[: len(table) & ~15]
        return [(one[0], one[1], one[flags_at]) for one in struct.iter_unpack("<QIHH", whole)]

    def _permit_table(self, mask: bytearray, table: bytes, may_indirect: bool) -> None:
        for gpa, length, flags in self._entries(table):
            if flags & INDIRECT and may_indirect:
                if self._memory.contains(gpa, length):
                    self._permit_table(mask, self._memory.read(gpa, length), False)
            elif flags & WRITE:
                _permit(mask, gpa, length)

    def _reset_midway(self) -> bool:
        """Reset the device, or the queue, while chains wait: nothing is touched any more."""
        source, driver = self._source, self._driver
        if self._features & Feature.RING_RESET and source.chance(128):
            driver.set(Register.QUEUE_SEL, driver.index)
            driver.set(Register.QUEUE_RESET, 1)
        else:
            driver.set(Register.STATUS, 0)
        before = self._memory.read(RAM_BASE, RAM_BYTES)
        disk = bytes(self._machine.disk)
        driver.notify()
        self._machine.now_s += 1.0
        self._machine.serve_all(driver.index)
        assert self._memory.read(RAM_BASE, RAM_BYTES) == before, "RAM written after a reset"
        assert self._machine.disk == disk, "the disk was written after a reset"
        if driver.status and not driver.needs_reset:
            # 2.6.1.2 "Virtqueue Re-enable"
            driver.restart()
            driver.setup_queue()
            self._arena = driver._top
            self._adopt_disk()
            return True
        return self._go_on(driver, {})

    def _adopt_disk(self) -> None:
        """The model becomes what the disk is."""
        self._disk.now = bytearray(self._machine.disk)
        self._disk.unknown.clear()

    def _check_untouched(self, before: bytes, mask: bytearray) -> None:
        after = self._memory.read(RAM_BASE, RAM_BYTES)
        if before == after:
            return
        for page in range(0, RAM_BYTES, 4096):
            old, new = before[page : page + 4096], after[page : page + 4096]
            if (_number(old) ^ _number(new)) & ~_number(mask[page : page + 4096]):
                wrong = [hex(RAM_BASE + page + i) for i in range(4096)
                         if old[i] != new[i] and not mask[page + i]]
                assert not wrong, f"RAM written that no descriptor offers: {wrong[:20]}"

    def _go_on(self, driver: VirtioDriver, asks: dict[int, Ask]) -> bool:
        """After damage: nothing may have been used that was not offered; then begin anew."""
        if not isinstance(driver, PackedDriver):
            used = (self._memory.read_int(driver.used + 2, 2) - driver.used_idx) & 0xFFFF
            offered = (driver.avail_idx - driver.used_idx) & 0xFFFF
            assert used <= offered, f"{used} chains used of {offered} offered"
        driver.start(self._features)
        self._adopt_disk()
        return True

    # What came of legal chains

    def _judge(self, asks: dict[int, Ask]) -> None:
        kind, driver = self._machine.kind, self._driver
        done = driver.reap()
        if kind == "console" and driver.index == 0:
            assert len(done) <= len(asks)  # chains wait for input; begin anew
            driver.start(self._features)
            return
        heads = [used.head for used in done]
        assert heads == list(asks), f"used {heads}, offered {list(asks)}: not each once, in order"
        for used in done:
            ask = asks[used.head]
            if kind != "block":
                assert used.length in ask.lengths, (used, ask)
                continue
            status = self._memory.read_int(ask.status_at, 1)
            assert status == ask.status, f"status {status}, not {ask.status}"
            assert used.length in ask.lengths, (used, ask)
            if ask.data:
                got = self._memory.read(ask.buffer, len(ask.data))
                assert got == ask.data, "read something else"
        if kind == "block":
            self._check_disk()
        assert not driver.is_quiet(), "it does not want to be notified"

    def _check_disk(self) -> None:
        now, model = self._machine.disk, self._disk
        if now != model.now:
            wrong = {at // 512 for at in range(0, len(now), 512)
                     if now[at : at + 512] != model.now[at : at + 512]}
            assert wrong <= model.unknown, f"sectors differ: {wrong - model.unknown}"


def _set_budget(pass_bytes: int) -> None:
    """Let a pass end after so many bytes, wherever that is looked at."""
    for module in (virtio_device, fast_path):
        assert hasattr(module, "PASS_BYTES"), "the budget of a pass has another name now"
        setattr(module, "PASS_BYTES", pass_bytes)  # noqa: B010 - not exported


def _cut(source: Source, gpa: int, length: int, most: int = 8) -> list[tuple[int, int]]:
    """``length`` bytes at ``gpa``, in ``most`` pieces at most: most often in one."""
    pieces: list[tuple[int, int]] = []
    while length > 1 and len(pieces) < min(most, 8) - 1 and source.chance(64):
        first = source.number(1, length - 1)
        pieces.append((gpa, first))
        gpa, length = gpa + first, length - first
    return [*pieces, (gpa, length)]


def _number(data: bytes | bytearray) -> int:
    return int.from_bytes(data, "little")


def _permit(mask: bytearray, gpa: int, length: int) -> None:
    first, end = max(gpa, RAM_BASE), min(gpa + length, RAM_END)
    if first < end:
        mask[first - RAM_BASE : end - RAM_BASE] = b"\xff" * (end - first)


def make() -> Target:
    """Return the target."""
    return RingsTarget()
