"""The entries of a matrix's axes, each read from its part of the file."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable

from pyvmm.config import AnyDiskConfig, DiskConfig
from pyvmm.errors import ConfigError
from pyvmm.linux.kernel_directory import kernel_in
from pyvmm.matrix.runs import Order
from pyvmm.matrix.toml_table import Table, kind_of, quoted
from pyvmm.startup.types import Record
from pyvmm.storage.open import DiskSource
from pyvmm.testing.fail_on import FailOn, check_pattern

MAX_S = 7 * 86400.0
"""The longest time limit of a run: a week."""
MAX_ARGUMENTS = 1000
KERNEL_KEYS = ("file", "initrd", "append")
DISK_KEYS = ("disks", "append")
COMMAND_KEYS = ("run", "expect", "fail-on", "no-fail-on", "allow", "put", "get", "env", "cwd",
                 "timeout", "boot-timeout")


class Files(Record):
    """The files that a matrix names: relative to ``folder``, disks as ``parse_disk`` reads them."""

    folder: str
    parse_disk: Callable[[str], AnyDiskConfig]

    def path(self, name: str) -> str:
        """Return ``name`` as an absolute path."""
        return os.path.normpath(os.path.join(self.folder, name))


class KernelEntry(Record):
    """An entry of ``[kernels]``: absolute paths, and words for the kernel's command line."""

    kernel: str
    initrd: str = ""
    append: str = ""


class DiskEntry(Record):
    """An entry of ``[disks]``: the disks of a guest, and words for its kernel's command line."""

    disks: tuple[DiskConfig, ...] = ()
    append: str = ""


def read_kernel(table: Table, name: str, files: Files) -> KernelEntry:
    """Return entry ``name`` of the table ``[kernels]``."""
    value = table[name]
    if isinstance(value, str):
        kernel, initrd = _kernel(table, name, files)
        return KernelEntry(kernel=kernel, initrd=initrd)
    if not isinstance(value, dict):
        table.fail(name, f"must be a kernel's file or a table, not {kind_of(value)}")
    entry = table.table(name)
    entry.only(KERNEL_KEYS)
    if "file" not in entry:
        entry.fail("", "has no file: write file = \"bzImage\"")
    kernel, initrd = _kernel(entry, "file", files)
    if own := entry.text("initrd"):
        initrd = files.path(own)
    return KernelEntry(kernel=kernel, initrd=initrd, append=read_append(entry))


def read_disk(table: Table, name: str, files: Files) -> DiskEntry:
    """Return entry ``name`` of the table ``[disks]``."""
    value = table[name]
    if isinstance(value, str):
        return DiskEntry(disks=_disks(table, name, table.texts(name), files))
    if isinstance(value, list):
        return DiskEntry(disks=_disks(table, name, table.list_of_texts(name), files))
    if not isinstance(value, dict):
        table.fail(name, f"must be a disk, a list of disks or a table, not {kind_of(value)}")
    entry = table.table(name)
    entry.only(DISK_KEYS)
    return DiskEntry(
        disks=_disks(entry, "disks", entry.texts("disks"), files), append=read_append(entry)
    )


def read_command(table: Table, name: str, files: Files, defaults: Order) -> Order:
    """Return entry ``name`` of the table ``[commands]``, with ``defaults`` for the rest."""
    value = table[name]
    if isinstance(value, str):
        words = ", ".join(f'"{word}"' for word in _words(value))
        table.fail(name, f"must be a list of words: write [{words}], or [\"sh\", \"-c\", ...] "
                   "for a shell")
    if isinstance(value, list):
        return defaults.replace(argv=_argv(table, name))
    if not isinstance(value, dict):
        table.fail(name, f"must be a list of words or a table, not {kind_of(value)}")
    entry = table.table(name)
    entry.only(COMMAND_KEYS)
    if "run" not in entry:
        entry.fail("", "has no run: write run = [\"uname\", \"-r\"]")
    return defaults.replace(
        argv=_argv(entry, "run"),
        expect=_patterns(entry, "expect"),
        fail_on=read_fail_on(entry, defaults.fail_on),
        puts=tuple(_put(entry, text, files) for text in entry.texts("put")),
        gets=tuple(_get(entry, text) for text in entry.texts("get")),
        env=_env(entry.table("env")),
        cwd=entry.text("cwd"),
        timeout_s=entry.seconds("timeout", defaults.timeout_s, MAX_S),
        boot_timeout_s=entry.seconds("boot-timeout", defaults.boot_timeout_s, MAX_S),
    )


def read_fail_on(table: Table, start: FailOn) -> FailOn:
    """Return ``start`` changed by ``fail-on``, ``no-fail-on`` and ``allow`` of ``table``."""
    place = f"{table.file}: {table.place}." if table.place else f"{table.file}: "
    return FailOn.parse(
        start=start, add=table.texts("fail-on"), without=table.texts("no-fail-on"),
        allow=table.texts("allow"),
        names=(f"{place}fail-on", f"{place}no-fail-on", f"{place}allow"),
    )


def _patterns(table: Table, key: str) -> tuple[str, ...]:
    """Return the regular expressions at ``key``."""
    found = table.texts(key)
    for pattern in found:
        check_pattern(f"{table.file}: {table.place}.{key}", pattern)
    return found


def read_append(table: Table) -> str:
    """Return the words at ``append``, for a kernel's command line."""
    text = table.text("append")
    if not text.isascii():
        table.fail("append", f"{quoted(text)} is not ASCII; a kernel takes nothing else")
    return text


def _kernel(table: Table, key: str, files: Files) -> tuple[str, str]:
    """Return kernel and initramfs at ``key``, which may be a directory as ``--kernel`` takes."""
    path = files.path(table.text(key))
    if not os.path.isdir(path):
        return path, ""
    try:
        kernel, initramfs = kernel_in(path)
    except ConfigError as error:
        table.fail(key, str(error))
    return kernel, initramfs or ""


def _disks(table: Table, key: str, texts: tuple[str, ...], files: Files) -> tuple[DiskConfig, ...]:
    return tuple(_disk(table, key, text, files) for text in texts)


def _disk(table: Table, key: str, text: str, files: Files) -> DiskConfig:
    """Return disk ``text``, written as for ``--disk``: its writes are thrown away after the run."""
    try:
        disk = files.parse_disk(text)
    except ConfigError as error:
        table.fail(key, f"{quoted(text)} {error.problem}")
    if not isinstance(disk, DiskConfig) or not isinstance(disk.source, DiskSource):
        table.fail(key, f"{quoted(text)} cannot be in a matrix: its back end serves one guest")
    source = disk.source
    if source.overlay:
        table.fail(key, f"{quoted(text)} has an overlay, which all runs would write to; each run "
                   "has a snapshot of its own anyway")
    location = source.location if "://" in source.location else files.path(source.location)
    return disk.replace(source=source.replace(
        location=location, snapshot=not source.read_only,
        faults=files.path(source.faults) if source.faults else "",
    ))


def _argv(table: Table, key: str) -> tuple[str, ...]:
    """Return the words of a command at ``key``; all but the first may be empty."""
    value = table[key]
    if not isinstance(value, list) or not value:
        table.fail(key, "must be a list of words, the first of which names a program")
    if len(value) > MAX_ARGUMENTS:
        table.fail(key, f"has {len(value)} words; the limit is {MAX_ARGUMENTS}")
    for at, word in enumerate(value):
        if not isinstance(word, str) or "\0" in word or not (at or word):
            table.fail(f"{key}[{at}]", f"must be a text without NUL, not {quoted(word)}")
    return tuple(value)


def _put(table: Table, text: str, files: Files) -> tuple[str, str]:
    source, colon, target = text.rpartition(":")
    if not (colon and source and target):
        table.fail("put", f"{quoted(text)} is not SOURCE:TARGET")
    if not target.startswith("/"):
        table.fail("put", f"{quoted(text)}: the path in the guest must begin with /")
    path = files.path(source)
    return f"{path}/" if source.endswith("/") else path, target


def _get(table: Table, text: str) -> tuple[str, str]:
    source, colon, target = text.partition(":")
    if not source.startswith("/"):
        table.fail("get", f"{quoted(text)}: the path in the guest must begin with /")
    target = target if colon else "./"
    if target.startswith("/") or ".." in target.split("/") or not target:
        table.fail("get", f"{quoted(text)}: the path behind the colon must be below the run's own "
                   "files: a relative one without ..")
    return source, target


def _env(table: Table) -> tuple[tuple[str, str], ...]:
    found = []
    for name in table.names:
        value = table[name]
        if not isinstance(value, str) or "\0" in value:
            table.fail(name, f"must be a text without NUL, not {kind_of(value)}")
        if not name or "=" in name or "\0" in name:
            table.fail(name, "is no name of a variable")
        found.append((name, value))
    return tuple(found)


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text) or ["uname"]
    except ValueError:
        return text.split() or ["uname"]
