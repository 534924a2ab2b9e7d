"""Files of known formats that somebody took for a raw disk or a kernel, told by their magics.

Not on the boot path: ``storage.open`` imports it for a file that may be one of these.
"""

from __future__ import annotations

from pyvmm.startup.types import Record

HEAD_BYTES = 1024
"""Bytes of a file's start for ``kind_of_head``; fewer are fine and tell less."""
TAIL_BYTES = 512
"""Bytes of a file's end for ``kind_of_tail``."""


class ImageKind(Record):
    """The format ``name``.  ``command`` makes the usable file {OUT} of the file {IN}.

    With ``is_likely_raw`` the guest may well be meant to see these very bytes.
    """

    name: str
    command: str = ""
    is_likely_raw: bool = False

    def remedy(self, path: str) -> str:
        """Return the command for ``path``, ready to be typed; "" if there is none."""
        import shlex

        out = path
        for suffix in _SUFFIXES:
            out = out.removesuffix(suffix)
        if out == path or out.endswith("/") or not out:
            out = f"{path}.raw"
        return self.command.format(IN=shlex.quote(path), OUT=shlex.quote(out))


_SUFFIXES = (".gz", ".xz", ".zst", ".bz2", ".lz4", ".lzma", ".lzo", ".Z")


def _virtual(name: str, options: str = "") -> ImageKind:
    command = f"qemu-img convert{options} -O raw {{IN}} {{OUT}}"
    return ImageKind(name=f"a {name} image", command=command)


def _packed(name: str, unpack: str) -> ImageKind:
    return ImageKind(name=f"compressed with {name}", command=f"{unpack} < {{IN}} > {{OUT}}")


def _archive(name: str, unpack: str) -> ImageKind:
    return ImageKind(name=f"a {name} archive", command=unpack)


def _other(name: str, command: str = "") -> ImageKind:
    return ImageKind(name=name, command=command, is_likely_raw=True)


_LZMA = _packed("lzma", "xz -dc --format=lzma")
_VPC = _virtual("VHD (Virtual PC)", " -f vpc")
_HEADS: tuple[tuple[int, bytes, ImageKind], ...] = (
    (0, b"QFI\xfb\0\0\0\x01", _virtual("qcow")),
    (0, b"QFI\xfb", _virtual("qcow2")),
    (0, b"QED\0", _virtual("QED")),
    (0, b"KDMV", _virtual("VMDK")),
    (0, b"COWD", _virtual("VMDK (version 3)")),
    (0, b"# Disk DescriptorFile", _virtual("VMDK (its descriptor)")),
    (0, b"vhdxfile", _virtual("VHDX")),
    (0, b"conectix", _VPC),
    (0x40, b"\x7f\x10\xda\xbe", _virtual("VDI")),
    (0, b"WithoutFreeSpace", _virtual("Parallels")),
    (0, b"WithouFreSpacExt", _virtual("Parallels")),
    (0, b"Bochs Virtual HD Image", _virtual("Bochs")),
    (0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop", _virtual("cloop")),
    (0, b"EVF\x09\x0d\x0a\xff\0", ImageKind(name="an EWF image", command="ewfexport {IN}")),
    (0, b"\x3a\xff\x26\xed",
     ImageKind(name="an Android sparse image", command="simg2img {IN} {OUT}")),
    (0, b"pyvmmcow",
     ImageKind(name="an overlay of pyvmm", command="--disk BASE,overlay={IN}")),
    (0, b"\x1f\x8b\x08", _packed("gzip", "gunzip -c")),
    (0, b"\xfd7zXZ\0", _packed("xz", "xz -dc")),
    (0, b"\x28\xb5\x2f\xfd", _packed("zstd", "zstd -dc")),
    (0, b"BZh", _packed("bzip2", "bzip2 -dc")),
    (0, b"\x04\x22\x4d\x18", _packed("lz4", "lz4 -dc")),
    (0, b"\x02\x21\x4c\x18", _packed("lz4", "lz4 -dc")),
    (0, b"\x89LZO\0\r\n\x1a\n", _packed("lzop", "lzop -dc")),
    (0, b"\x1f\x9d", _packed("compress", "uncompress -c")),
    *((0, b"\x5d" + (1 << bit).to_bytes(4, "little"), _LZMA) for bit in range(16, 31)),
    (0, b"PK\x03\x04", _archive("zip", "unzip {IN}")),
    (0, b"7z\xbc\xaf\x27\x1c", _archive("7z", "7z x {IN}")),
    (0, b"Rar!\x1a\x07", _archive("rar", "unrar x {IN}")),
    (0x101, b"ustar", _other("a tar archive", "tar -xf {IN}")),
    (0, b"070701", _other("an initramfs (cpio)", "--initrd {IN}")),
    (0, b"070702", _other("an initramfs (cpio)", "--initrd {IN}")),
    (0, b"!<arch>\n", _other("an ar archive or Debian package", "dpkg -x {IN} DIRECTORY")),
    (0x202, b"HdrS", _other("a Linux kernel (bzImage)", "--kernel {IN}")),
    (0, b"\x7fELF", _other("an ELF file", "--kernel {IN}")),
    (0, b"version https://git-lfs.github.com/spec/",
     ImageKind(name="a Git LFS pointer to the file that is meant", command="git lfs pull")),
    *((0, start, _other("an HTML page", "head {IN}"))
      for start in (b"<!DOCTYPE html", b"<!doctype html", b"<html", b"<HTML")),
)
_TAILS = (
    (b"conectix", ImageKind(name=_VPC.name, command=_VPC.command, is_likely_raw=True)),
    (b"koly\0\0\0\x04", _virtual("DMG (macOS)", " -f dmg")),
)


def kind_of_head(head: bytes) -> ImageKind | None:
    """Return the format of a file that starts with ``head``; None if it may be a raw disk."""
    for offset, magic, kind in _HEADS:
        if head.startswith(magic, offset):
            return kind
    return None


def kind_of_tail(tail: bytes) -> ImageKind | None:
    """Return the format of a file that ends with ``tail``, TAIL_BYTES long; None if unknown."""
    return next((kind for magic, kind in _TAILS if tail.startswith(magic)), None)
