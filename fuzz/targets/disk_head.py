"""The first bytes of a disk: file systems, partition tables"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from fuzz.source import Source
from fuzz.target import Target
from pyvmm.linux import file_systems, partitions, root

_PLACES = (0, 20, 446, 510, 512, 584, 1024, 1080, 0x400, 0x45C, 0x8000, 0x8001, 0x10040)


class DiskHeadTarget(Target):
    """Any disk is judged, without an exception.

    A case is a list of patches of an empty disk: where, how long, the bytes.
    """

    max_bytes = 2048
    is_structured = True
    words = (b"EFI PART", b"\x55\xaa", b"\x53\xef", b"hsqs", b"XFSB", b"_BHRfS_M", b"CD001")

    def seeds(self) -> Iterable[bytes]:
        """Return a GPT, an MBR, an ext4 and a squashfs."""
        entry = struct.pack("<16s16sQQ", b"type", b"unique", 2048, 4095)
        gpt = [(512, b"EFI PART"), (584, struct.pack("<QII", 2, 128, 128)), (1024, entry)]
        mbr = [(446, b"\x80\0\0\0\x83\0\0\0\0\x08\0\0\0\x10\0\0"), (510, b"\x55\xaa")]
        ext4 = [(0x438, b"\x53\xef"), (0x45C, struct.pack("<II", 4, 0x40))]
        squashfs = [(0, b"hsqs"), (20, b"\6\0")]
        return [b"".join(_patch(*one) for one in disk) for disk in (gpt, mbr, ext4, squashfs)]

    def run(self, data: bytes) -> None:
        """Judge the disk that ``data`` describes."""
        source = Source(data)
        head = bytearray()
        while source.more:
            kind = source.bits(8)
            at = _PLACES[kind - 1] if 1 <= kind <= len(_PLACES) else source.bits(17)
            piece = source.take(source.bits(8))
            head.extend(bytes(max(0, at + len(piece) - len(head))))
            head[at : at + len(piece)] = piece
        _judge(bytes(head))


_ROOTS = (
    "/dev/vda", "/dev/vda1", "/dev/vdb128", "UUID=0", "LABEL=x", "PARTUUID=00000000-01",
    "PARTUUID=00000000-0000-0000-0000-000000000000/PARTNROFF=1", "PARTLABEL=x",
)


def _judge(disk: bytes) -> None:
    def read(offset: int) -> bytes:
        return disk[offset : offset + file_systems.HEAD_BYTES]

    head = read(0)
    kind = file_systems.detect(head) or "ext4"
    file_systems.squashfs_compressor(head)
    file_systems.other_content(head)
    file_systems.identity(head, kind)
    assert file_systems.block_bytes(head, kind) >= 0
    file_systems.unknown_ext_features(head)
    partitions.table_kind(head)
    assert len(partitions.read_partitions(read)) < 1000
    for text in _ROOTS:
        for has_initrd in (False, True):
            root.find_root(text, 2, lambda _disk, offset: read(offset), has_initrd=has_initrd)


def _patch(at: int, piece: bytes) -> bytes:
    return b"\0" + at.to_bytes(3, "little") + bytes([len(piece)]) + piece


def make() -> Target:
    """Return the target."""
    return DiskHeadTarget()
