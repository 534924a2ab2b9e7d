"""Plain chains: the usual shape of a disk's request, as tuples that cost little to make."""

from __future__ import annotations

from collections.abc import Sequence

from pyvmm.virtio.block.request import HEADER_SIZE, STATUS_SIZE
from pyvmm.virtio.ring.packed import SLOTS_SHIFT
from pyvmm.virtio.ring.queue import DESCRIPTOR_WORK, Buffer, Chain

PlainChain = tuple[int, int, int, int, int, int, Sequence[Buffer]]
"""``(token, header, data, length, writes, status, pieces)``.

Its descriptors are, in a row: a readable one of 16 bytes at GPA ``header``; one or more of data,
``length`` bytes in all, writable if ``writes`` is not 0, else readable; a writable one of 1 byte
at GPA ``status``.  None is empty.  ``data`` is the GPA of the first data buffer.  ``pieces`` holds
all data buffers if there are several, else nothing.  ``token`` is for ``FastRing.push_plain``; its
low 16 bits are the head, the others ``Chain.slots`` of a packed ring.

A lone chain (``FastRing.take_lone``) may also have no data at all: then ``length`` is 0.
"""
TOKEN_BITS = 32
"""How wide a token is: ``token | written << TOKEN_BITS`` is what ``push_plain`` takes."""
PLAIN_MAX_BYTES = 64 << 20
"""A chain of more data than this is not called plain."""
PLAIN_FRAME_BYTES = HEADER_SIZE + STATUS_SIZE
PLAIN_WORK = PLAIN_FRAME_BYTES + 3 * DESCRIPTOR_WORK
"""``plain_work`` of a chain with one data buffer, but for its length."""
_HEAD_MASK = (1 << SLOTS_SHIFT) - 1


def chain_of(plain: PlainChain) -> Chain:
    """Return ``plain`` as any other chain."""
    token, header, data, length, writes, status, pieces = plain
    readable, writable = [(header, HEADER_SIZE)], [(status, STATUS_SIZE)]
    if length:
        buffers = list(pieces) or [(data, length)]
        if writes:
            writable[:0] = buffers
        else:
            readable += buffers
    return Chain(token & _HEAD_MASK, readable, writable, token >> SLOTS_SHIFT or 1)


def plain_work(plain: PlainChain) -> int:
    """Return the work of ``plain`` in a pass, the same as ``chain_work(chain_of(plain))``."""
    descriptors = 2 + (len(plain[6]) or bool(plain[3]))
    return plain[3] + PLAIN_FRAME_BYTES + descriptors * DESCRIPTOR_WORK
