"""Code for tiny guests (``tiny_guests.py``) that drives disks, without a look at what they say."""

from __future__ import annotations

import struct

from pyvmm.virtio.spec import Feature, Register, Status
from pyvmm.x86 import layout

_RINGS = 0x400000
_RING_STRIDE = 0x10000
_AVAIL, _USED, _HEADER, _DATA, _STATUS_BYTE = 0x1000, 0x2000, 0x3000, 0x4000, 0x5000
_SIZE = 8
_NEXT, _WRITE = 1, 2
_ACKNOWLEDGED = int(Status.ACKNOWLEDGE | Status.DRIVER)


def starts_disk(index: int) -> bytes:
    """Code that brings device ``index`` to DRIVER_OK, with one split queue."""
    ring = _RINGS + index * _RING_STRIDE
    return _stores(
        layout.virtio_slot(index)[0],
        (Register.STATUS, 0),
        (Register.STATUS, int(Status.ACKNOWLEDGE)),
        (Register.STATUS, _ACKNOWLEDGED),
        (Register.DRIVER_FEATURES_SEL, 1),
        (Register.DRIVER_FEATURES, int(Feature.VERSION_1) >> 32),
        (Register.STATUS, _ACKNOWLEDGED | int(Status.FEATURES_OK)),
        (Register.QUEUE_SEL, 0),
        (Register.QUEUE_NUM, _SIZE),
        (Register.QUEUE_DESC_LOW, ring),
        (Register.QUEUE_DRIVER_LOW, ring + _AVAIL),
        (Register.QUEUE_DEVICE_LOW, ring + _USED),
        (Register.QUEUE_READY, 1),
        (Register.STATUS, _ACKNOWLEDGED | int(Status.FEATURES_OK | Status.DRIVER_OK)),
    )


def reads_a_sector(index: int) -> bytes:
    """Code that has disk ``index``, which was started, read its first sector; once."""
    ring = _RINGS + index * _RING_STRIDE
    chain = b"".join([
        struct.pack("<QIHH", ring + _HEADER, 16, _NEXT, 1),
        struct.pack("<QIHH", ring + _DATA, 512, _NEXT | _WRITE, 2),
        struct.pack("<QIHH", ring + _STATUS_BYTE, 1, _WRITE, 0),
    ])
    words = struct.unpack(f"<{len(chain) // 4}I", chain)
    # The header is zeros: VIRTIO_BLK_T_IN of sector 0.  So is the ring's first entry.
    return (
        _stores(ring, *((place * 4, word) for place, word in enumerate(words)))
        + _stores(ring + _AVAIL, (0, 1 << 16))
        + _stores(layout.virtio_slot(index)[0], (Register.QUEUE_NOTIFY, 0))
    )


def resets_disk(index: int) -> bytes:
    """Code that resets device ``index``."""
    return _stores(layout.virtio_slot(index)[0], (Register.STATUS, 0))


def _stores(base: int, *words: tuple[int, int]) -> bytes:
    """Code that stores each word at its offset from ``base``."""
    code = b"\xbb" + struct.pack("<I", base)  # mov ebx, base
    for offset, word in words:
        code += b"\xc7\x83" + struct.pack("<II", offset, word)  # mov dword [rbx + offset], word
    return code
