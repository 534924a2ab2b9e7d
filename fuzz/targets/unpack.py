"""The tar stream of a guest: whatever it says, files appear below the copy's folder alone."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

from fuzz.target import Target
from pyvmm.control.packing import TransferError
from pyvmm.control.unpacking import Unpacker

_KINDS = (
    (tarfile.DIRTYPE, "", b""), (tarfile.REGTYPE, "", b"data" * 200),
    (tarfile.SYMTYPE, "a/b", b""), (tarfile.LNKTYPE, "d/1", b""), (tarfile.CHRTYPE, "", b""),
)


class UnpackTarget(Target):
    """A stream is unpacked, or is a TransferError; nothing outside changes.

    Checksums are made right first, or nearly every case would end at its first block.
    """

    max_bytes = 16384
    words = (b"../", b"/", b"ustar\0", b"00000000000\0", b"path=", b"linkpath=../..", b"x", b"L")

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="pyvmm-fuzz-"))

    def seeds(self) -> Iterable[bytes]:
        """Return a tree of all kinds of members, in every style of tar."""
        found = []
        for style in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
            out = io.BytesIO()
            with tarfile.open(fileobj=out, mode="w", format=style) as tar:
                for number, (kind, link, data) in enumerate(_KINDS):
                    name = f"d/{number}" if number else "d"
                    info = tarfile.TarInfo(name + ("n" * 90 if style != 0 and number > 2 else ""))
                    info.type, info.linkname, info.size = kind, link, len(data)
                    tar.addfile(info, io.BytesIO(data))
            found.append(out.getvalue()[:8192])
        return found

    def run(self, data: bytes) -> None:
        """Unpack ``data`` below a new folder, and look at what is beside it."""
        target = self._folder / "target"
        target.mkdir()
        try:
            with contextlib.suppress(TransferError), Unpacker(
                str(target), max_members=100, max_bytes=1 << 20
            ) as unpacker:
                stream = _with_checksums(data)
                for at in range(0, len(stream), 700):
                    unpacker.feed(stream[at : at + 700])
                unpacker.end()
            assert os.listdir(self._folder) == ["target"]
            for path in target.rglob("*"):
                if path.is_symlink():
                    assert target in Path(os.path.realpath(path)).parents
                assert not path.lstat().st_mode & 0o7022 or path.is_symlink()
        finally:
            shutil.rmtree(target)

    def close(self) -> None:
        """See ``Target.close``."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _with_checksums(data: bytes) -> bytes:
    """Return ``data`` with a right checksum in each block that looks like a header."""
    stream = bytearray(data)
    for at in range(0, len(stream) - 511, 512):
        if stream[at + 257 : at + 262] == b"ustar":
            total = sum(stream[at : at + 148]) + sum(stream[at + 156 : at + 512]) + 8 * 32
            stream[at + 148 : at + 156] = b"%06o\0 " % total
    return bytes(stream)


def make() -> Target:
    """Return the target."""
    return UnpackTarget()
