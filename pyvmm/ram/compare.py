"""RAM compared with an image that it is not mapped over: both are read."""

from __future__ import annotations

import bisect
import ctypes
import os
from collections.abc import Iterator, Sequence

from pyvmm.errors import HostError
from pyvmm.memory import PAGE_SIZE, GuestMemory
from pyvmm.ram.image import RamImage
from pyvmm.ram.pages import data_runs, held_runs
from pyvmm.ram.runs import Run, joined, parts_in_regions, union

_BLOCK = 64 << 10


def differing_runs(memory: GuestMemory, image: RamImage) -> list[Run]:
    """Return the pages that differ; nobody may use RAM meanwhile.  OSError, HostError."""
    return list(joined(differences(memory, image, union(held_runs(memory), data_runs(image)))))


def differences(
    memory: GuestMemory, image: RamImage, candidates: Sequence[Run]
) -> Iterator[Run]:
    """Yield the pages of ``candidates`` that differ, one by one.  OSError, HostError."""
    block = bytearray(_BLOCK)
    address = ctypes.addressof(ctypes.c_char.from_buffer(block))
    compare = ctypes.CDLL(None).memcmp
    compare.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    for region, first, size in parts_in_regions(memory, candidates):
        for start in range(first, first + size, _BLOCK):
            length = min(_BLOCK, first + size - start)
            position = region.position + start
            with memoryview(block)[:length] as view:
                _read(image, view, position)
            here = region.host_address + start
            if compare(here, address, length):
                for at in range(0, length, PAGE_SIZE):
                    if compare(here + at, address + at, PAGE_SIZE):
                        yield position + at, PAGE_SIZE


def _read(image: RamImage, view: memoryview, position: int) -> None:
    """Fill ``view`` from ``image``.  Through a mapping, reading holes would use memory."""
    end = position + len(view)
    for layer in image.layers:
        if layer.runs is None:
            _read_layer(layer.fd, view, position)
            continue
        first = max(0, bisect.bisect_right(layer.runs, (position, end)) - 1)
        for offset, length in layer.runs[first:]:
            if offset >= end:
                break
            low, high = max(offset, position), min(offset + length, end)
            if low < high:
                with view[low - position : high - position] as part:
                    _read_layer(layer.fd, part, low)


def _read_layer(fd: int, view: memoryview, position: int) -> None:
    if os.preadv(fd, [view], position) != len(view):
        raise HostError("an image of RAM is cut off")
