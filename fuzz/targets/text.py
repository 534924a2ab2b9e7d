"""Texts that people give us: options, disks, URIs, fault scripts, CPU models, apt's answers."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fuzz.files import MemoryFile
from fuzz.source import Source
from fuzz.target import Target
from pyvmm import config
from pyvmm.cli import parse
from pyvmm.cli import run as cli_run
from pyvmm.errors import ConfigError
from pyvmm.linux.packages import Apt, AptError
from pyvmm.startup.options import parse_options
from pyvmm.storage.fault_script import parse_script
from pyvmm.storage.nbd_uri import is_nbd_uri, parse_nbd_uri
from pyvmm.x86.cpu_model import parse_cpu_option
from pyvmm.x86.cpu_template import read_template


class TextTarget(Target):
    """A text is understood, or is a ConfigError: an exception of no other kind.

    The first byte says what the rest is read as.
    """

    max_bytes = 2048
    words = (
        b"ro", b"snapshot", b"overlay=", b"serial=", b"queues=", b"iops=", b"bps=", b"faults=",
        b"vhost-user=", b"nbd://", b"nbd+unix:///", b"?socket=", b"%00", b"[::1]", b":65536", b",,",
        b"write 3: EIO", b"read any: delay 5", b"flush ", b"torn ", b"short ", b"any *: ",
        b"host", b"base", b",-avx", b",+aes", b"0x", b"1e309", b"nan", b"inf", b"256M", b"1_0",
        b'{"cpuid_modifiers": [', b'{"leaf": "0x1", "subleaf": "0x0", "flags": 0, "modifiers": [',
        b'{"register": "eax", "bitmap": "0b', b"--disk", b"--memory", b"--cpus", b"--append",
        b"--timeout", b"--help", b"Version: ", b"Size: ", b"Depends: linux-image-",
    )

    def __init__(self) -> None:
        self._file = MemoryFile()
        self._readers: list[Callable[[str], object]] = [
            parse.parse_disk,
            lambda text: parse_script(text, "faults"),
            parse_cpu_option,
            self._read_template,
            _read_uri,
            lambda text: parse.parse_size("--memory", text),
            lambda text: parse.parse_seconds("--timeout", text),
            parse.parse_cpus,
            _read_options,
            _read_run,
            _read_packages,
        ]

    def seeds(self) -> Iterable[bytes]:
        """Return a good text of every kind."""
        texts = [
            "disk,,1.img,ro,serial=ab,queues=2,iops=100:200,bps=1M,faults=f",
            "write 3: EIO\nread any: delay 5\nflush 1-3: ENOSPC # why\n",
            "host,-avx,+aes",
            '{"cpuid_modifiers": [{"leaf": "0x1", "subleaf": "0x0", "flags": 0, "modifiers": '
            '[{"register": "ecx", "bitmap": "0bxxxx1"}]}]}',
            "nbd+unix:///export?socket=%2Frun%2Fnbd", "256M", "2.5", "4",
            "--kernel\0bzImage\0--disk\0a.img,ro\0--memory=1G\0-v",
            "console=ttyS0 quiet\0root=/dev/vda1",
            "Package: x\nDepends: a, linux-image-6.1 (= 6.1.2-1), b\nVersion: 6.1.2-1\nSize: 70\n",
        ]
        return [bytes([number]) + text.encode() for number, text in enumerate(texts)]

    def run(self, data: bytes) -> None:
        """Read a text; ConfigError and AptError are answers."""
        source = Source(data)
        reader = self._readers[source.bits(8) % len(self._readers)]
        text = source.rest().decode("utf-8", "surrogateescape")
        try:
            reader(text)
        except (ConfigError, AptError):
            return

    def _read_template(self, text: str) -> None:
        read_template(self._file.put(text.encode("utf-8", "surrogateescape")))

    def close(self) -> None:
        """See ``Target.close``."""
        self._file.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class _FakeApt(Apt):
    """apt whose answer to everything is ``said``."""

    said: str

    def _show(self, name: str, version: str | None) -> str:
        return self.said


def _read_packages(text: str) -> None:
    apt = _FakeApt(said=text)
    apt.find("x")
    apt.find_image("linux-image-cloud-amd64")


def _read_uri(text: str) -> None:
    if is_nbd_uri(text):
        parse_nbd_uri(text)


def _read_options(text: str) -> None:
    """The options of ``pyvmm run``, separated by NUL, which no argument has in it."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        parse_options(cli_run.COMMAND, text.split("\0"))


def _read_run(text: str) -> None:
    """A whole run: its command line and what it is appended by."""
    cmdline, _, append = text.partition("\0")
    run = config.RunConfig(kernel="bzImage", cmdline=cmdline, append=append)
    run.kernel_command_line()
    assert isinstance(run.console_is_virtio, bool)


def make() -> Target:
    """Return the target."""
    return TextTarget()
