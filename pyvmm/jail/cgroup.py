"""A control group for the machine, with limits of memory, CPU time and processes (``--cgroup``).

Only version 2.  Source: Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import contextlib
import errno
import os

from pyvmm.errors import ConfigError
from pyvmm.numerals import decimal_number, shown, size_in_bytes, whole_number
from pyvmm.startup.types import Record

_PERIOD_US = 100_000
_LEAST_CPUS, _MOST_CPUS = 0.01, 8192.0
_LEAST_MEMORY, _MOST_MEMORY = 1 << 24, 1 << 50
_MOST_PIDS = 1 << 22


class Cgroup(Record):
    """A directory of cgroup v2, which is made if it is missing, and its limits; None is none.

    ``cpus`` is a number of CPUs' time, as 1.5.  The directory stays after the end: its
    ``memory.peak`` and ``cpu.stat`` tell of the run.
    """

    directory: str
    memory_bytes: int | None = None
    cpus: float | None = None
    pids: int | None = None

    def join(self) -> None:
        """Set the limits and move this process there, all its threads; ConfigError.

        Memory that is in use already counts for the group in which it was taken into use.
        """
        made = self._make()
        try:
            for name, value in self._limits().items():
                self._write(name, value)
            self._write("cgroup.procs", "0")
        except ConfigError:
            if made:
                self._remove()
            raise

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            os.rmdir(self.directory)

    def _make(self) -> bool:
        """Make the directory unless it is there; True if it was made."""
        try:
            os.mkdir(self.directory, 0o755)
        except FileExistsError:
            made = False
        except OSError as error:
            raise self._error(f"cannot be made: {error.strerror}") from error
        else:
            made = True
        if not os.path.exists(f"{self.directory}/cgroup.controllers"):
            if made:
                self._remove()
            raise self._error("is no directory of cgroup v2, as /sys/fs/cgroup/NAME is")
        return made

    def _limits(self) -> dict[str, str]:
        limits = {}
        if self.memory_bytes is not None:
            limits["memory.max"] = str(self.memory_bytes)
        if self.cpus is not None:
            limits["cpu.max"] = f"{round(self.cpus * _PERIOD_US)} {_PERIOD_US}"
        if self.pids is not None:
            limits["pids.max"] = str(self.pids)
        return limits

    def _write(self, name: str, value: str) -> None:
        try:
            fd = os.open(f"{self.directory}/{name}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, value.encode())
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno == errno.ENOENT:
                above, controller = os.path.dirname(self.directory), name.partition(".")[0]
                raise self._error(
                    f"has no {name}: write +{controller} to {above}/cgroup.subtree_control"
                ) from error
            raise self._error(f"{name} cannot be set to {value}: {error.strerror}") from error

    def _error(self, problem: str) -> ConfigError:
        return ConfigError(f"--cgroup {self.directory}", problem)


def parse_cgroup(text: str) -> Cgroup:
    """Return the group of ``DIR[,memory=SIZE][,cpu=N][,pids=N]``; ConfigError."""
    directory, *limits = text.split(",")
    if not directory.startswith("/"):
        raise ConfigError(
            f"--cgroup {shown(text)}", "must begin with a whole path, as /sys/fs/cgroup/NAME"
        )
    values: dict[str, int | float] = {}
    for limit in limits:
        name, equals, value = limit.partition("=")
        if name not in _LIMITS or not equals:
            raise ConfigError(
                f"--cgroup {shown(text)}",
                f"{shown(limit)!r} is no limit; there are memory=SIZE, cpu=N and pids=N",
            )
        field, meant = _LIMITS[name]
        if field in values:
            raise ConfigError(f"--cgroup {shown(text)}", f"{name} is given twice")
        found = _number(name, value)
        if found is None:
            raise ConfigError(f"--cgroup {shown(text)}", f"{name}={shown(value)} is not {meant}")
        values[field] = found
    return Cgroup(directory=os.path.normpath(directory), **values)  # type: ignore[arg-type]


def _number(name: str, value: str) -> int | float | None:
    if name == "cpu":
        return decimal_number(value, _LEAST_CPUS, _MOST_CPUS)
    if name == "pids":
        return whole_number(value, 1, _MOST_PIDS)
    size = size_in_bytes(value, _MOST_MEMORY)
    return size if size is not None and size >= _LEAST_MEMORY else None


_LIMITS = {
    "memory": ("memory_bytes", "a size from 16M to 1024T; write 512M or 2G"),
    "cpu": ("cpus", "a number of CPUs, from 0.01 to 8192"),
    "pids": ("pids", "a number of threads, from 1 to 4194304"),
}
