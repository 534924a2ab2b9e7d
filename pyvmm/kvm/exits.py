"""The page shared with the kernel (``struct kvm_run``), and the exits that it describes.

There are two ways to read an exit.  The vCPU loop takes port and MMIO accesses, which come by the
million, straight from ``RunPage.io()`` and ``RunPage.mmio()``: one ``struct`` call each, 0.1 us.
Everything that ends a run or is rare goes through ``decode()``, which returns a typed object.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import struct
from collections.abc import Callable

from pyvmm.kvm import abi
from pyvmm.startup.types import IntEnum, Record, name_of


class ExitReason(IntEnum):
    """Reasons why KVM_RUN returned (``kvm_run.exit_reason``)."""

    UNKNOWN = abi.KVM_EXIT_UNKNOWN
    EXCEPTION = abi.KVM_EXIT_EXCEPTION
    IO = abi.KVM_EXIT_IO
    HYPERCALL = abi.KVM_EXIT_HYPERCALL
    DEBUG = abi.KVM_EXIT_DEBUG
    HLT = abi.KVM_EXIT_HLT
    MMIO = abi.KVM_EXIT_MMIO
    IRQ_WINDOW_OPEN = abi.KVM_EXIT_IRQ_WINDOW_OPEN
    SHUTDOWN = abi.KVM_EXIT_SHUTDOWN
    FAIL_ENTRY = abi.KVM_EXIT_FAIL_ENTRY
    INTR = abi.KVM_EXIT_INTR
    SET_TPR = abi.KVM_EXIT_SET_TPR
    TPR_ACCESS = abi.KVM_EXIT_TPR_ACCESS
    NMI = abi.KVM_EXIT_NMI
    INTERNAL_ERROR = abi.KVM_EXIT_INTERNAL_ERROR
    SYSTEM_EVENT = abi.KVM_EXIT_SYSTEM_EVENT
    IOAPIC_EOI = abi.KVM_EXIT_IOAPIC_EOI
    X86_RDMSR = abi.KVM_EXIT_X86_RDMSR
    X86_WRMSR = abi.KVM_EXIT_X86_WRMSR


class Direction(IntEnum):
    """The direction of a port access (``kvm_run.io.direction``)."""

    IN = abi.KVM_EXIT_IO_IN
    OUT = abi.KVM_EXIT_IO_OUT


def _offset(name: str) -> int:
    offset: int = getattr(abi.kvm_run, name).offset
    return offset


_IMMEDIATE_EXIT = _offset("immediate_exit")
_REASON = _offset("exit_reason")
_UNION = _offset("io")  # every member of the exit union starts here
_MMIO_DATA = _UNION + 8

# These mirror abi.kvm_run's members; tests/kvm/test_exits.py compares them.
_IO = struct.Struct("<BBHIQ")
_MMIO = struct.Struct("<QQIB")
_ACCESS = struct.Struct(f"<I{_UNION - _REASON - 4}xQQIB")
_HEAD = struct.Struct("<II")
_U64 = struct.Struct("<Q")
_MAX_DATA = 16

_RING_HEAD_BYTES = ctypes.sizeof(abi.kvm_coalesced_mmio_ring)
_GATHERED = struct.Struct("<QII8s")  # abi.kvm_coalesced_mmio: phys_addr, len, pio, data
RING_CAPACITY = (mmap.PAGESIZE - _RING_HEAD_BYTES) // _GATHERED.size
"""KVM_COALESCED_MMIO_MAX: the ring holds one less."""

_MASK = (1 << 64) - 1
EXIT_REASON_WORD = _REASON // 4
"""The index of the exit reason in ``RunPage.words``."""


class RunPage:
    """Pre-bound access to one vCPU's ``struct kvm_run``; offsets and lengths are in bytes.

    ``buffer`` is the mapping of the vCPU fd; a test may give any bytearray of two pages.
    """

    __slots__ = ("_view", "access", "io", "mmio", "words")

    def __init__(self, buffer: mmap.mmap | bytearray) -> None:
        self._view = memoryview(buffer)
        self.words = self._view.cast("I")
        """The page as 32-bit words."""
        # No functions of ours around these two: a call in Python costs as much again.
        self.io: Callable[[], tuple[int, int, int, int, int]]
        self.io = functools.partial(_IO.unpack_from, self._view, _UNION)
        """A port access: ``(direction, size, port, count, data_offset)``.

        ``count`` items of ``size`` bytes each lie at ``data_offset`` (REP INS/OUTS: count > 1);
        ``get_int`` and ``set_int`` reach them.
        """
        self.mmio: Callable[[], tuple[int, int, int, int]]
        self.mmio = functools.partial(_MMIO.unpack_from, self._view, _UNION)
        """A memory access: ``(address, data, length, is_write)``.

        ``data`` is the eight data bytes as a little-endian integer.  After a write only the low
        ``length`` bytes count, after a read none does.
        """

        self.access: Callable[[], tuple[int, int, int, int, int]]
        self.access = functools.partial(_ACCESS.unpack_from, self._view, _REASON)
        """The exit reason, and the items of ``mmio``, which count only if that is the reason."""

    @property
    def exit_reason(self) -> int:
        """The reason why KVM_RUN returned: an ``ExitReason``, or a number newer than this
        program."""
        return self.words[EXIT_REASON_WORD]

    def set_immediate_exit(self, on: bool) -> None:
        """While on, KVM_RUN returns EINTR at once; safe from another thread or a handler."""
        self._view[_IMMEDIATE_EXIT] = on

    def set_mmio_data(self, value: int) -> None:
        """Answer an MMIO read; KVM takes as many of the low bytes as the guest asked for."""
        _U64.pack_into(self._view, _MMIO_DATA, value & _MASK)

    def get_int(self, offset: int, size: int) -> int:
        """Return the little-endian integer of ``size`` bytes at ``offset``."""
        return int.from_bytes(self._view[offset : offset + size], "little")

    def set_int(self, offset: int, size: int, value: int) -> None:
        """Store the low ``size`` bytes of ``value`` at ``offset``."""
        masked = value & ((1 << (8 * size)) - 1)
        self._view[offset : offset + size] = masked.to_bytes(size, "little")

    def read(self, offset: int, length: int) -> bytes:
        """Return a copy of ``length`` bytes at ``offset``; ValueError outside the page."""
        if offset < 0 or length < 0 or offset + length > len(self._view):
            raise ValueError(f"run page has no {length} bytes at {offset}")
        return bytes(self._view[offset : offset + length])

    def written(self, offset: int, length: int) -> bytes:
        """Return a copy of as many of ``length`` bytes at ``offset`` as the page has."""
        return bytes(self._view[offset : offset + length])

    def union(self, length: int) -> bytes:
        """Return a copy of the exit union's first ``length`` bytes."""
        return self.read(_UNION, length)

    def release(self) -> None:
        """Drop the views, so that the mapping under them can be closed."""
        self.words.release()
        self._view.release()


class CoalescedRing:
    """The writes that KVM gathered in ``view``, a page behind the run page; one for a VM.

    Documentation/virt/kvm/api.rst, 4.116 "KVM_(UN)REGISTER_COALESCED_MMIO".  KVM adds at ``last``,
    one thread at a time takes at ``first``.
    """

    __slots__ = ("_indices", "_view")

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._indices = view[:_RING_HEAD_BYTES].cast("I")  # first, last

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to take."""
        first, last = self._indices
        return first == last

    def take(self) -> list[tuple[int, bytes]]:
        """Take every write that waits, oldest first; return ``(address, data)`` of each."""
        first, last = self._indices
        taken: list[tuple[int, bytes]] = []
        # Even a nonsensical index of KVM's leads no further than the page goes.
        while first != last and len(taken) < RING_CAPACITY:
            address, length, _, data = _GATHERED.unpack_from(
                self._view, _RING_HEAD_BYTES + first * _GATHERED.size
            )
            taken.append((address, data[:length]))
            first = (first + 1) % RING_CAPACITY
        self._indices[0] = first
        return taken

    def release(self) -> None:
        """Drop the views, so that the mapping under them can be closed."""
        self._indices.release()
        self._view.release()


class IoExit(Record, kw_only=False):
    """IN or OUT: ``count`` items of ``size`` bytes at ``data_offset`` of the run page.

    ``data`` are the bytes of all items that OUT writes; empty for IN.
    """

    direction: Direction
    size: int
    port: int
    count: int
    data_offset: int
    data: bytes = b""


class MmioExit(Record, kw_only=False):
    """An access to a physical address without memory; ``data`` has ``length`` bytes."""

    address: int
    length: int
    is_write: bool
    data: bytes


class HltExit(Record, kw_only=False):
    """HLT with no in-kernel interrupt controller to wait for."""

    def __str__(self) -> str:
        return "HLT"


class ShutdownExit(Record, kw_only=False):
    """A triple fault."""

    def __str__(self) -> str:
        return "triple fault"


_SUBERRORS = {
    abi.KVM_INTERNAL_ERROR_EMULATION: "KVM cannot emulate an instruction",
    abi.KVM_INTERNAL_ERROR_SIMUL_EX: "simultaneous exceptions",
    abi.KVM_INTERNAL_ERROR_DELIVERY_EV: "exit while an event was being delivered",
    abi.KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON: "unexpected hardware exit",
}


class InternalErrorExit(Record, kw_only=False):
    """KVM gave up; ``data`` are its reasons in 64-bit words."""

    suberror: int
    data: tuple[int, ...]

    @property
    def instruction(self) -> bytes:
        """The bytes that KVM could not emulate, if it tells; else empty."""
        flag = abi.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
        if self.suberror != abi.KVM_INTERNAL_ERROR_EMULATION or len(self.data) < 3:
            return b""
        if not self.data[0] & flag:
            return b""
        size, *code = struct.pack("<2Q", *self.data[1:3])
        return bytes(code[:size])

    def __str__(self) -> str:
        text = _SUBERRORS.get(self.suberror, "internal error")
        text = f"{text} (suberror {self.suberror})"
        if self.instruction:
            return f"{text}: {self.instruction.hex(' ')}"
        return text + "".join(f" {word:#x}" for word in self.data)


class FailEntryExit(Record, kw_only=False):
    """The hardware refused the vCPU's state; ``hardware_reason`` is its own code."""

    hardware_reason: int
    cpu: int


class SystemEventExit(Record, kw_only=False):
    """KVM_SYSTEM_EVENT_*: the guest asked the kernel for shutdown or reset, or crashed."""

    type: int
    data: tuple[int, ...]


class UnknownExit(Record, kw_only=False):
    """A reason that this program does not handle; ``hardware_reason`` only with
    KVM_EXIT_UNKNOWN."""

    reason: int
    hardware_reason: int = 0

    def __str__(self) -> str:
        known = name_of(ExitReason, self.reason)
        name = f"KVM_EXIT_{known}" if known else "unknown exit"
        hardware = f", hardware reason {self.hardware_reason:#x}" if self.hardware_reason else ""
        return f"{name} ({self.reason}{hardware})"


Exit = (
    IoExit
    | MmioExit
    | HltExit
    | ShutdownExit
    | InternalErrorExit
    | FailEntryExit
    | SystemEventExit
    | UnknownExit
)


def _words(page: RunPage) -> tuple[int, tuple[int, ...]]:
    """Return a code and up to 16 words, of ``internal`` or ``system_event``."""
    union = page.union(_HEAD.size + 8 * _MAX_DATA)
    code, count = _HEAD.unpack_from(union)
    return code, struct.unpack_from(f"<{min(count, _MAX_DATA)}Q", union, _HEAD.size)


def decode(page: RunPage) -> Exit:
    """Return the exit that ``page`` describes; an unknown reason raises nothing."""
    reason = page.exit_reason
    if reason == ExitReason.IO:
        direction, size, port, count, data_offset = page.io()
        written = page.written(data_offset, size * count) if direction == Direction.OUT else b""
        return IoExit(Direction(direction), size, port, count, data_offset, written)
    if reason == ExitReason.MMIO:
        address, data, length, is_write = page.mmio()
        return MmioExit(address, length, bool(is_write), data.to_bytes(8, "little")[:length])
    if reason == ExitReason.HLT:
        return HltExit()
    if reason == ExitReason.SHUTDOWN:
        return ShutdownExit()
    if reason == ExitReason.INTERNAL_ERROR:
        return InternalErrorExit(*_words(page))
    if reason == ExitReason.FAIL_ENTRY:
        return FailEntryExit(*struct.unpack_from("<QI", page.union(12)))
    if reason == ExitReason.SYSTEM_EVENT:
        return SystemEventExit(*_words(page))
    if reason == ExitReason.UNKNOWN:
        return UnknownExit(reason, int.from_bytes(page.union(8), "little"))
    return UnknownExit(reason)
