"""What is on a disk: file systems, partition tables, where root= is, images of another kind."""

from __future__ import annotations

import struct
from collections.abc import Iterable

from fuzz.source import Source
from fuzz.target import Target
from pyvmm.linux import file_systems, partitions
from pyvmm.linux.root import find_root
from pyvmm.storage import image_kinds

_ROOTS = (
    "/dev/vda", "/dev/vda1", "/dev/vdb", "/dev/", "UUID=", "LABEL=", "PARTUUID=", "PARTLABEL=",
    "PARTUUID=00000000-01", "PARTUUID=00000000-01/PARTNROFF=", "/dev/disk/by-uuid/", "",
    "PARTUUID=65707974-0000-0000-0000-000000000000/PARTNROFF=-", "/dev/disk/by-partlabel/",
)
_MOST_READS = 200
_DISK_BYTES = 256 << 9
_PLACES = (0, 20, 446, 510, 512, 584, 1024, 1080, 0x400, 0x45C, 0x8000, 0x8001, 0x10040)


class DiskHeadTarget(Target):
    """Any disk is judged, without an exception.

    A case is a list of patches of an empty disk: where, how long, the bytes.
    """

    max_bytes = 12 << 10
    is_structured = True
    words = (b"EFI PART", b"\x55\xaa", b"\x53\xef", b"hsqs", b"XFSB", b"_BHRfS_M", b"CD001")

    def seeds(self) -> Iterable[bytes]:
        """Return a GPT, MBRs, an ext4 and a squashfs."""
        entry = struct.pack("<16s16sQQ", b"type", b"unique", 2048, 4095)
        gpt = [(512, b"EFI PART"), (584, struct.pack("<QII", 2, 128, 128)), (1024, entry)]
        mbr = [(446, b"\x80\0\0\0\x83\0\0\0\0\x08\0\0\0\x10\0\0"), (510, b"\x55\xaa")]
        ext4 = [(0x438, b"\x53\xef"), (0x45C, struct.pack("<II", 4, 0x40))]
        squashfs = [(0, b"hsqs"), (20, b"\6\0")]
        # A chain of tables, each with the place of the next, and no partition in any.
        chain = [(446, b"\0\0\0\0\5\0\0\0\1\0\0\0\0\1\0\0"), (510, b"\x55\xaa")]
        for sector in range(1, 230):
            link = b"\0\0\0\0\5\0\0\0" + struct.pack("<II", sector, 256)
            chain += [(512 * sector + 446, link), (512 * sector + 510, b"\x55\xaa")]
        disks = (gpt, mbr, ext4, squashfs, chain)
        return [bytes(3) + b"".join(_patch(*one) for one in disk) for disk in disks]

    def run(self, data: bytes) -> None:
        """Judge the disk that ``data`` describes."""
        source = Source(data)
        root, has_initrd = _root(source), source.chance(128)
        head = bytearray()
        while source.more:
            kind = source.bits(8)
            at = _PLACES[kind - 1] if 1 <= kind <= len(_PLACES) else source.bits(17)
            at = min(at, _DISK_BYTES)
            piece = source.take(source.bits(8))
            head.extend(bytes(max(0, at + len(piece) - len(head))))
            head[at : at + len(piece)] = piece
        _judge(bytes(head), root, has_initrd=has_initrd)


def _judge(disk: bytes, root: str, *, has_initrd: bool) -> None:
    head = disk[: file_systems.HEAD_BYTES]
    kind = file_systems.detect(head)
    file_systems.squashfs_compressor(head)
    file_systems.other_content(head)
    file_systems.identity(head, kind or "ext4")
    file_systems.unknown_ext_features(head)
    assert 0 <= file_systems.block_bytes(head, kind or "ext4") < 1 << 64
    image_kinds.kind_of_head(head)
    image_kinds.kind_of_tail(disk[-image_kinds.TAIL_BYTES :])
    reads: list[int] = []

    def read(at: int) -> bytes:
        reads.append(at)
        assert at >= 0
        return disk[at : at + file_systems.HEAD_BYTES]

    found = partitions.read_partitions(read)
    assert len(reads) <= _MOST_READS, f"{len(reads)} reads for a partition table"
    assert len(found) < partitions.MAX_PARTITIONS + 4
    for partition in found:
        assert partition.number >= 1
        assert partition.offset > 0
        assert partition.length >= 0
    for version in ("", "6.1.0-x", "6.19.3"):
        find_root(root, 2, lambda index, at: read(at) if index == 0 else b"",
                  has_initrd=has_initrd, version=version)
    find_root(root, 1, lambda index, at: read(at), has_initrd=has_initrd)


def _root(source: Source) -> str:
    """What ``root=`` says: of a form that means something, mostly."""
    form = source.pick(_ROOTS)
    return form + source.take(source.bits(4)).decode("utf-8", "surrogateescape")


def _patch(at: int, piece: bytes) -> bytes:
    return b"\0" + at.to_bytes(3, "little") + bytes([len(piece)]) + piece


def make() -> Target:
    """Return the target."""
    return DiskHeadTarget()
