"""A run's demands on its kernel, as far as the run and the kernel's command line tell them.

This is read the way Linux reads it: init/do_mounts.c for ``root=``.
"""

from __future__ import annotations

from collections.abc import Callable

from pyvmm.linux import file_systems
from pyvmm.linux.command_line import consoles_of, words_of
from pyvmm.linux.formats import Compression, detect
from pyvmm.linux.options import KernelConfig
from pyvmm.linux.root import find_root
from pyvmm.numerals import whole_number
from pyvmm.startup.types import Record

ONE_CPU_WORDS = ("nosmp", "nolapic", "disableapic")
_CPU_LIMITS = ("maxcpus", "nr_cpus", "possible_cpus")
_MAX_NUMBER = 999_999_999


class Boot(Record):
    """A run as its kernel meets it.

    ``version`` is the kernel's own text, "" if it is not known.  ``acpi`` is True if there are
    tables, ``disks`` counts the disks; ``initrd`` is the start of that file, None without.
    ``agent_port`` is True if there is a port for an agent.
    ``read_disk`` gives up to ``file_systems.HEAD_BYTES`` of disk ``index`` from a byte on, nothing
    if the disk cannot be read.
    """

    command_line: str = ""
    version: str = ""
    cpus: int = 1
    acpi: bool = True
    disks: int = 1
    initrd: bytes | None = None
    agent_port: bool = False
    read_disk: Callable[[int, int], bytes] = lambda index, offset: b""


class Guest(Record):
    """The demands on the kernel.

    It must use ``cpus``.  ``acpi`` is True if it must read tables, ``cmdline_devices`` if the
    command line announces virtio-mmio devices.  ``console`` is the last of the consoles, the one
    that counts: ``ttyS0``, ``hvc0``, or "" if none of the two is asked for.  ``names_hvc0`` is True
    if ``hvc0`` is one of them.

    ``initrd_compression`` is None without an initrd, which is a file or built in; ``is_ram_disk``
    is True if it is a file system rather than an archive.

    ``file_system`` is the root's, on a disk, None if it is not known; ``squashfs`` its compression,
    if it has one.  ``partitions`` is the kind of table by which the root is found: ``gpt``,
    ``dos``, ``any`` of the two, "" for none.  ``mounts_devtmpfs`` is True if the command line has
    the kernel mount it.  ``agent_port`` is True if the kernel must find the port of an agent.

    ``mistakes`` are reasons, in words, for which no kernel boots so.
    """

    cpus: int = 1
    acpi: bool = True
    cmdline_devices: bool = True
    console: str = "ttyS0"
    names_hvc0: bool = False
    has_disk: bool = True
    initrd_compression: Compression | None = None
    is_ram_disk: bool = False
    file_system: str | None = "ext4"
    squashfs: str = ""
    partitions: str = ""
    mounts_devtmpfs: bool = False
    agent_port: bool = False
    mistakes: tuple[str, ...] = ()


def describe(boot: Boot, config: KernelConfig | None) -> Guest:
    """Return the demands of ``boot`` on a kernel built with ``config``, None if that is unknown.

    The configuration matters because a command line and an initramfs may be built in.
    """
    words = words_of(_command_line(boot, config))
    values = dict(words)  # the last of each counts
    names = {name for name, _ in words}
    compression = detect(boot.initrd) if boot.initrd is not None else None
    if compression is None and config is not None and config.text("INITRAMFS_SOURCE"):
        compression = Compression.NONE
    guest = Guest(
        cpus=_cpus(boot.cpus, values),
        acpi=boot.acpi and values.get("acpi") != "off",
        cmdline_devices="virtio_mmio.device" in names,
        console=_console(words),
        names_hvc0="hvc0" in consoles_of(words),
        has_disk=boot.disks > 0,
        initrd_compression=compression,
        is_ram_disk=boot.initrd is not None and file_systems.detect(boot.initrd) is not None,
        file_system=None,
        mounts_devtmpfs=values.get("devtmpfs.mount", "0") != "0",
        agent_port=boot.agent_port,
    )
    mistakes = []
    needs_devices = guest.has_disk or guest.console == "hvc0" or guest.agent_port
    if needs_devices and not guest.acpi and not guest.cmdline_devices:
        mistakes.append("nothing tells the kernel of its devices: ACPI is off, and they are not on "
                        "its command line (--discovery)")
    if guest.has_disk:
        guest, mistake = _with_root(guest, boot, values)
        mistakes += [mistake] if mistake else []
    return guest.replace(mistakes=tuple(mistakes))


def _command_line(boot: Boot, config: KernelConfig | None) -> str:
    """Return the command line that the kernel reads: built-in text and ours, or only one of
    them."""
    built_in = config.text("CMDLINE") if config is not None else ""
    if config is None or not built_in or config.state("CMDLINE_BOOL") != "y":
        return boot.command_line
    if config.state("CMDLINE_OVERRIDE") == "y":
        return built_in
    return f"{built_in} {boot.command_line}"


def _cpus(cpus: int, values: dict[str, str]) -> int:
    if any(word in values for word in ONE_CPU_WORDS):
        return 1
    limits = [_number(values.get(name, ""), cpus) for name in _CPU_LIMITS]
    return max(1, min([cpus, *limits]))


def _console(words: list[tuple[str, str]]) -> str:
    """Return the last console of ours; if none at all is named, Linux takes the serial port."""
    if ours := consoles_of(words):
        return ours[-1]
    return "" if any(name == "console" for name, _ in words) else "ttyS0"


def _with_root(guest: Guest, boot: Boot, values: dict[str, str]) -> tuple[Guest, str]:
    """Return ``guest`` with the demands of mounting ``root=``, and the mistake in it or ""."""
    name = values.get("root", "")
    has_initrd = guest.initrd_compression is not None
    if not name:
        return guest, "" if has_initrd else (
            "the command line has no root=: without an initramfs there is none to mount"
        )
    root = find_root(
        name, boot.disks, boot.read_disk, has_initrd=has_initrd, version=boot.version
    )
    if has_initrd:  # it may have its own way to mount the root
        return guest, root.mistake
    head = root.place.head if root.place is not None else b""
    found = file_systems.detect(head)
    named = values.get("rootfstype", "")
    return guest.replace(
        partitions=root.table,
        file_system=named if named and "," not in named else found,
        squashfs=file_systems.squashfs_compressor(head) if found == "squashfs" else "",
    ), root.mistake


def _number(text: str, otherwise: int) -> int:
    """Return ``text`` as a number, ``otherwise`` if it is none that fits."""
    number = whole_number(text, 0, _MAX_NUMBER)
    return otherwise if number is None else number
