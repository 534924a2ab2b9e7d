"""Kernel configurations: inside a kernel that comes in pieces, as text, as what is remembered."""

from __future__ import annotations

import gzip
from collections.abc import Iterable

from fuzz.files import MemoryFile
from fuzz.source import Source
from fuzz.target import Target
from pyvmm.linux import config, config_cache
from pyvmm.linux.guest import Guest
from pyvmm.linux.requirements import every_guest, judge, notes, problems
from pyvmm.linux.scan import Scan, scan


class ConfigTarget(Target):
    """A kernel says the same of itself however it is cut into pieces."""

    max_bytes = 8 << 10
    words = (b"IKCFG_ST", b"IKCFG_ED", b"Linux version ", b"CONFIG_", b"=y\n", b" is not set\n",
             b"pyvmm: a kernel's configuration\n-\n-\n")

    def __init__(self) -> None:
        self._guests: list[Guest] = list(every_guest())
        self._file = MemoryFile()

    def seeds(self) -> Iterable[bytes]:
        """Return a kernel with its configuration, and the text of one."""
        text = b"CONFIG_64BIT=y\n# CONFIG_SMP is not set\nCONFIG_NR_CPUS=8\nCONFIG_ACPI=m\n"
        inside = b"IKCFG_ST" + gzip.compress(text) + b"IKCFG_ED"
        banner = b"Linux version 6.1.0 (who@where) #1 SMP\0"
        return [b"\x10\0\x20\0" + b"\x7fELF" + bytes(40) + banner + inside, b"\0" + text,
                b"\0pyvmm: a kernel's configuration\n-\n-\n64BIT=y\n"]

    def run(self, data: bytes) -> None:
        """Scan ``data``, whole and in pieces; read it as text, too."""
        source = Source(data)
        cuts = [source.bits(10) for _ in range(source.bits(3))]
        kernel = source.rest()
        pieces, at = [], 0
        for cut in cuts:
            pieces.append(kernel[at : at + cut])
            at += cut
        whole, cut_up = scan([kernel]), scan([*pieces, kernel[at:]])
        assert _said(whole) == _said(cut_up), "it depends on the pieces"
        found = whole.config or config.parse(kernel.decode("utf-8", "replace"), "text")
        if found is not None:
            for guest in self._guests[:: max(1, len(self._guests) // 3)]:
                judge(found, guest)
                problems(found, guest)
                notes(found, guest)
        old = config_cache.recall(self._file.put(kernel))
        if old is not None:
            config_cache.covers(old, self._guests[0])

    def close(self) -> None:
        """See ``Target.close``."""
        self._file.close()


def _said(found: Scan) -> tuple[object, ...]:
    options = found.config.options if found.config is not None else None
    return found.version, found.size_bytes, found.is_elf, options


def make() -> Target:
    """Return the target."""
    return ConfigTarget()
