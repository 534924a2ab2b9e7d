"""The file state of a snapshot: refused in one way, or plain data that is written back the same"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path

from fuzz.target import Target
from pyvmm.config import DiskConfig, RunConfig
from pyvmm.errors import SnapshotError, StateError
from pyvmm.kvm.cpuid_entry import pack
from pyvmm.snapshot.config_record import restore_config, restore_kernel, save_config
from pyvmm.snapshot.files import layout
from pyvmm.snapshot.files.content import About, Base, SavedDisk, SavedRam, read_disks, read_files
from pyvmm.snapshot.files.host import check_host, host_record, read_host
from pyvmm.snapshot.files.records import MAGIC, decode, encode
from pyvmm.snapshot.files.saved import open_saved
from pyvmm.storage.open import DiskSource

_HEADER_BYTES = 16
_PAGE = 4096
_READERS = (About.read, Base.read, SavedRam.read, read_disks, read_files, restore_kernel)
_SOURCE = DiskSource(location="/disk", snapshot=True)


class StateTarget(Target):
    """A ``state`` as it is, and the same with CRCs that are right, in a directory."""

    max_bytes = 8192
    words = (
        MAGIC, *(name.encode() for name in layout.RECORDS), b"n", b"t", b"f", b"l\2\0\0\0",
        b"d\1\0\0\0", b"s\3\0\0\0", b"b\20\0\0\0", b"i\1\0\0\0\0\0\0\0", b"j\x09",
    )

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="pyvmm-fuzz-")
        self._state = Path(self._folder) / layout.STATE
        with (Path(self._folder) / layout.RAM).open("wb") as file:
            file.truncate(_PAGE)

    def run(self, data: bytes) -> None:
        """Read ``data`` as a file, as a file with right CRCs, and as the content of a record."""
        self._read(data)
        self._read(_mended(data))
        self._read(_sealed({b"machine": data}))
        with contextlib.suppress(SnapshotError):
            value = decode(_sealed({b"x": data}), name="f")["x"]
            for read in _READERS:
                with contextlib.suppress(StateError):
                    read(value)
            for sources in ([], [_SOURCE]):
                with contextlib.suppress(StateError):
                    restore_config(value, sources)
            with contextlib.suppress(SnapshotError):
                host = read_host(value, name="f")
                check_host(host, name="f", supported=pack([]), tsc_khz=1, scales_tsc=False)

    def _read(self, data: bytes) -> None:
        line, state = "", None
        try:
            state = decode(data, name="f", versions=layout.RECORDS)
        except SnapshotError as error:
            line = str(error)
        if state is not None:
            again = encode(state, name="f", versions=layout.RECORDS)
            assert decode(again, name="f") == state, "written back as something else"
        else:
            assert line.startswith("f: "), line
            assert len(line) < 1000, line
        self._state.write_bytes(data)
        before = _next_fd()
        try:
            open_saved(self._folder).close()
        except SnapshotError as error:
            line = str(error)
        else:
            line = self._folder
        assert self._folder in line, line
        assert _next_fd() == before, "a descriptor was left open"

    def seeds(self) -> Iterable[bytes]:
        """Return whole files: full and diff, with few and many records."""
        full = SavedRam(regions=((0, _PAGE),), crcs={0: 1}, held_bytes=9)
        diff = full.replace(runs=((0, _PAGE),))
        disk = SavedDisk(
            index=0, location="/disk", size_bytes=_PAGE, stamp_ns=1, read_only=False,
            overlay_bytes=None,
        )
        about = About(id=bytes(16), made_ns=1, version="1").record()
        host = host_record(supported=[], given=[bytes(8)], tsc_khz=1)
        small: dict[str, object] = {
            "about": about, "ram": full.record(), "disks": [disk.record()], "base": None,
        }
        more = small | {
            "host": host, "machine": {"vcpus": {"vcpu0": {"regs": bytes(144), "n": [1, -1]}}},
            "config": {"memory_bytes": 1 << 64, "x": [True, None, "text"]}, "files": {},
        }
        with_base = small | {
            "ram": diff.record(), "base": Base(path="../base", id=bytes(16)).record(),
        }
        config = save_config(RunConfig(kernel="/bzImage", disks=(DiskConfig(source=_SOURCE),)))
        whole = [encode(one, name="f") for one in (small, more, with_base, {})]
        # A record's payload alone: behind the header, the record's head and its name of one letter.
        parts = [host, config, about, full.record(), disk.record()]
        payloads = [encode({"x": one}, name="f")[_HEADER_BYTES + 4 + 9 : -4] for one in parts]
        return [*whole, *payloads]

    def close(self) -> None:
        """Remove the directory; idempotent."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _next_fd() -> int:
    """Return the number that the next descriptor will have."""
    fd = os.dup(0)
    os.close(fd)
    return fd


def _sealed(payloads: dict[bytes, bytes]) -> bytes:
    """Return a file with these records, all of whose CRCs are right."""
    out = b"".join(
        struct.pack("<BBHI", len(name), 0, 1, len(payload)) + name + payload + bytes(4)
        for name, payload in payloads.items()
    )
    head = struct.pack("<8sHHI", MAGIC, 1, len(payloads), _HEADER_BYTES + 4 + len(out))
    return _mended(head + bytes(4) + out)


def _mended(data: bytes) -> bytes:
    """Return ``data`` with the CRCs that it would need, as far as records can be told."""
    if len(data) < _HEADER_BYTES + 4:
        return data
    out = bytearray(data)
    out[:8] = MAGIC
    out[12:16] = len(out).to_bytes(4, "little")
    crc = zlib.crc32(out[:_HEADER_BYTES])
    out[_HEADER_BYTES : _HEADER_BYTES + 4] = crc.to_bytes(4, "little")
    at = _HEADER_BYTES + 4
    while at + 8 <= len(out):
        end = at + 8 + out[at] + int.from_bytes(out[at + 4 : at + 8], "little")
        if end + 4 > len(out):
            break
        crc = zlib.crc32(out[at:end], crc)
        out[end : end + 4] = crc.to_bytes(4, "little")
        at = end + 4
    return bytes(out)


def make() -> Target:
    """Return the target."""
    return StateTarget()
