"""The registers of every virtio device: any access, in any order, with any rings behind them."""

from __future__ import annotations

import struct

from fuzz.machine import KINDS, RAM_BYTES, RAM_END, Bench, Machine
from fuzz.source import Source
from fuzz.target import Target
from pyvmm.errors import VhostUserError
from pyvmm.virtio.spec import Feature, Register, Status
from tests.support.virtio_driver import RAM_BASE

_REGISTERS = tuple(int(register) for register in Register)
_ADDRESSES = tuple(RAM_BASE + offset for offset in (0, 0x1000, 0x2000, 0x3000, 0x4000, 0x5000))
_SIZES = (16, 0, 1, 2, 3, 4, 64, 128, 256, 512, 1 << 15, 1 << 16)
_WAY_UP = tuple(int(status) for status in (
    Status.ACKNOWLEDGE, Status.ACKNOWLEDGE | Status.DRIVER,
    Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK,
    Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK,
))


class RegistersTarget(Target):
    """No access raises, and after a reset the device works."""

    is_structured = True
    max_bytes = 2048

    def __init__(self) -> None:
        self._bench = Bench()

    def run(self, data: bytes) -> None:
        """Do the accesses that ``data`` describes."""
        source = Source(data)
        try:
            machine = self._bench.machine(source.pick(KINDS), source)
        except VhostUserError:
            return  # a back end that is no disk, found out before the guest starts
        for _ in range(source.bits(1) * len(machine.device.queues)):
            _bring_up(machine, source)
        while source.more:
            _step(machine, source)
        if machine.kind == "block":
            assert len(machine.disk) % 512 == 0
        machine.check_works()
        machine.close()

    def close(self) -> None:
        """See ``Target.close``."""
        self._bench.close()


def _step(machine: Machine, source: Source) -> None:
    match source.number(0, 9):
        case 0 | 1:
            register = source.pick(_REGISTERS)
            machine.write(register, 4, source.edge(*_values(register), bits=32))
        case 2:
            offset = source.pick(_REGISTERS) if source.chance(128) else source.bits(12)
            machine.write(offset, source.pick((1, 2, 4, 8)), source.bits(64))
        case 3:
            size = source.pick((1, 2, 4, 8))
            value = machine.transport.read(source.bits(12), size)
            assert 0 <= value < 1 << 8 * size
        case 4:
            _bring_up(machine, source)
        case 5:
            machine.write(Register.QUEUE_NOTIFY, 4, source.pick((0, 0, 1, 2, 3, 8, 0xFFFF_FFFF)))
        case 6:
            _scribble(machine, source)
        case 7:
            _offer(machine, source)
        case 8:
            machine.host_event(source)
        case 9:
            machine.write(Register.STATUS, 4, source.pick((0, *_WAY_UP, 128, 255)))


def _values(register: int) -> tuple[int, ...]:
    """Values that mean something in ``register``."""
    if register == Register.QUEUE_NUM:
        return _SIZES
    if Register.QUEUE_DESC_LOW <= register < Register.SHM_LEN_LOW:
        return (*_ADDRESSES, RAM_END - 16, RAM_END, 0)
    if register == Register.STATUS:
        return _WAY_UP
    return (0, 1, 2, 3)


def _bring_up(machine: Machine, source: Source) -> None:
    """From reset to DRIVER_OK, with a step left out or bent now and then."""
    write = machine.write
    features = machine.device.avail_features
    if source.chance(160):
        features &= ~source.edge(int(Feature.RING_PACKED), bits=64) | int(Feature.VERSION_1)
    write(Register.STATUS, 4, 0)
    for status in _WAY_UP[:2]:
        write(Register.STATUS, 4, status)
    for word in (0, 1):
        write(Register.DRIVER_FEATURES_SEL, 4, word)
        write(Register.DRIVER_FEATURES, 4, features >> 32 * word & 0xFFFF_FFFF)
    write(Register.STATUS, 4, _WAY_UP[2])
    for index in range(len(machine.device.queues)):
        write(Register.QUEUE_SEL, 4, index)
        size = machine.queue_size
        write(Register.QUEUE_NUM, 4, source.pick(_SIZES) if source.chance(32) else size)
        base = _ADDRESSES[index % 2] + 0x8000 * index
        for register, address in ((Register.QUEUE_DESC_LOW, base),
                                  (Register.QUEUE_DRIVER_LOW, base + 16 * size),
                                  (Register.QUEUE_DEVICE_LOW, base + 24 * size)):
            if source.chance(16):
                address = source.edge(*_ADDRESSES, RAM_END)
            write(register, 4, address & 0xFFFF_FFFF)
            write(register + 4, 4, address >> 32)
        write(Register.QUEUE_READY, 4, 0 if source.chance(16) else 1)
    write(Register.STATUS, 4, _WAY_UP[3])


def _scribble(machine: Machine, source: Source) -> None:
    """The driver writes RAM, most likely where rings are."""
    piece = source.take(source.bits(6))
    at = source.bits(13) if source.chance(200) else source.number(0, RAM_BYTES)
    at = min(at, RAM_BYTES - len(piece))
    machine.memory.write(RAM_BASE + at, piece)


def _offer(machine: Machine, source: Source) -> None:
    """Put a descriptor at a queue's beginning and offer it, in both formats' manner."""
    index = source.number(0, len(machine.device.queues) - 1)
    base = _ADDRESSES[index % 2] + 0x8000 * index - RAM_BASE
    slot = source.bits(4)
    flags = source.pick((0, 1, 2, 3, 4, 5, 6, 7)) | source.pick((0x80, 0, 0x8000, 0x8080))
    descriptor = struct.pack(
        "<QIHH", source.edge(*_ADDRESSES, RAM_END - 8), source.edge(0, 1, 16, 512, 4096, bits=32),
        source.bits(4), flags,
    )
    if source.chance(128):  # a split ring has ``next`` where a packed one has flags
        descriptor = descriptor[:12] + descriptor[14:] + descriptor[12:14]
    _put(machine, base + 16 * slot, descriptor)
    avail = base + 16 * machine.queue_size
    heads = source.take(source.bits(3))
    for number, head in enumerate(heads):
        _put(machine, avail + 4 + 2 * number, bytes([head, 0]))
    _put(machine, avail + 2, source.pick((len(heads), 1, 2)).to_bytes(2, "little"))
    machine.write(Register.QUEUE_NOTIFY, 4, index)
    machine.service(index)


def _put(machine: Machine, offset: int, data: bytes) -> None:
    if 0 <= offset <= RAM_BYTES - len(data):
        machine.memory.write(RAM_BASE + offset, data)


def make() -> Target:
    """Return the target."""
    return RegistersTarget()
