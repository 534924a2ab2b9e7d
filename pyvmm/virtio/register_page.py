"""The page of registers and configuration space that a driver reads (4.2.2, 2.5)."""

from __future__ import annotations

import mmap
import threading

from pyvmm.memory import PAGE_SIZE, replace_page
from pyvmm.virtio.spec import MAGIC, MMIO_VERSION, Register

VENDOR_ID = int.from_bytes(b"PVMM", "little")
CONFIG = int(Register.CONFIG)
CONFIG_BYTES = PAGE_SIZE - CONFIG
_GENERATION = int(Register.CONFIG_GENERATION)
_ONES = 0xFFFF_FFFF


class RegisterPage:
    """4 KiB of memory, ``bytes``, in which register ``r`` is word ``words[r // 4]``.

    The guest may have it mapped, and read it at any time.  ``page`` is a page of the caller's, all
    zero and shared memory; without one it makes its own.
    """

    def __init__(self, device_type: int, page: memoryview | None = None) -> None:
        self.bytes: mmap.mmap | memoryview = mmap.mmap(-1, PAGE_SIZE) if page is None else page
        self.is_closed = False
        self.words = memoryview(self.bytes).cast("I")
        self.show(Register.MAGIC_VALUE, MAGIC)
        self.show(Register.VERSION, MMIO_VERSION)
        self.show(Register.DEVICE_ID, device_type)
        self.show(Register.VENDOR_ID, VENDOR_ID)
        # No shared memory regions: "Reading from a non-existent region [...] results in a length
        # of -1", and in the same base address.
        for register in (
            Register.SHM_LEN_LOW,
            Register.SHM_LEN_HIGH,
            Register.SHM_BASE_LOW,
            Register.SHM_BASE_HIGH,
        ):
            self.show(register, _ONES)

    def show(self, register: Register, value: int) -> None:
        """Let ``register`` read as ``value``."""
        self.words[register // 4] = value

    @property
    def generation(self) -> int:
        """ConfigGeneration, 32 bits."""
        return self.words[_GENERATION // 4]

    def set_space(self, space: bytes, generation: int) -> None:
        """Show the configuration space ``space``, while no driver reads."""
        self.bytes[CONFIG:] = space
        self.words[_GENERATION // 4] = generation

    def change_space(self, space: bytes, lock: threading.Lock) -> None:
        """Show ``space`` together with a new generation; nothing if it is shown already.

        Not in any order of stores: a driver reads a mapped page at any time, and between the
        store that changes the space and the one that changes the generation it would find the
        same generation twice, and half of the space old (2.5.1 "Driver Requirements: Device
        Configuration Space" has it compare the two).  ``lock`` keeps InterruptStatus unchanged.
        """
        if self.bytes[CONFIG:] == space:
            return
        with lock:
            page = bytearray(self.bytes)
            page[CONFIG:] = space
            generation = self.generation + 1 & _ONES
            page[_GENERATION : _GENERATION + 4] = generation.to_bytes(4, "little")
            try:
                replace_page(self.bytes, bytes(page))
            except OSError:  # then the driver hears of it by an interrupt, and reads again
                self.set_space(space, generation)

    def close(self) -> None:
        """Free the page, or give the caller's up; once."""
        self.is_closed = True
        self.words.release()
        if isinstance(self.bytes, memoryview):
            self.bytes.release()
        else:
            self.bytes.close()
