"""Without a KVM that runs Linux: this very command again, in pyvmm's lab."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from pyvmm.errors import ConfigError
from pyvmm.pytest_plugin.kernels import kernel_and_initrd
from pyvmm.pytest_plugin.marker import ArgumentsError, arguments_of
from pyvmm.pytest_plugin.options import AUTO, Options

FILE_OPTIONS = ("xmlpath", "log_file", "htmlpath", "json_report_file", "report_log")
"""Options of pytest and of common plugins, by their ``dest``, that name a file to be written."""
DIRECTORY_OPTIONS = ("allure_report_dir",)
"""The same for directories.  Not --basetemp: the lab's own memory is faster, and takes sockets."""


def problem_of(
    item: pytest.Item, options: Options, *, is_surely_linux: bool = False
) -> str:
    """Return the reason why this host cannot run the machine of a test, on one line; "" if it can.

    A kernel that nobody has named yet is taken for Linux, but not if ``is_surely_linux`` is asked
    for.
    """
    if item.get_closest_marker("skip") is not None:
        return ""
    try:
        kernel = _kernel_of(item, options)
    except ArgumentsError:
        return ""  # it fails, and says so, without a machine
    if kernel is None and is_surely_linux:
        return ""
    return problem(kernel)


def problem(kernel: str | None) -> str:
    """Return the reason why this host cannot run ``kernel``, by default Linux; "" if it can."""
    from pyvmm.lab import INSIDE

    if os.environ.get(INSIDE):
        return ""  # its KVM is complete, and under emulation a trial of it takes seconds
    from pyvmm.testing.usable_kvm import kvm_problem, problem_for

    if kernel is None:
        return kvm_problem()
    try:
        path, _ = kernel_and_initrd(kernel)
    except ConfigError:
        return ""  # the boot will say so
    return problem_for(path)


def _kernel_of(item: pytest.Item, options: Options) -> str | None:
    callspec = getattr(item, "callspec", None)
    found = callspec.params.get("pyvmm_kernel") if callspec is not None else None
    found = found or arguments_of(item).get("kernel")
    if isinstance(found, (list, tuple)):
        found = found[0]
    if isinstance(found, (str, os.PathLike)):
        return str(item.config.rootpath / found)
    return options.kernels[0] if options.kernels else None


def obstacle(options: Options) -> str:
    """Return the reason why this session cannot go on in the lab; "" if it can."""
    from pyvmm.lab import INSIDE

    if options.lab != AUTO:
        return f"--pyvmm-lab {options.lab}"
    if os.environ.get(INSIDE):
        return "this is the lab already"
    if len(sys.orig_argv) < 2:
        return "this Python was not started by a command that could be run again"
    return ""


def command(config: pytest.Config, options: Options) -> list[str]:
    """Return the command that runs this very command in the lab."""
    writable = writable_directories(config, options)
    return [
        sys.executable, "-m", "pyvmm", "lab", "--memory", options.lab_memory,
        *(word for directory in writable for word in ("--rw", str(directory))),
        "--", sys.executable, *sys.orig_argv[1:],
    ]


def writable_directories(config: pytest.Config, options: Options) -> list[Path]:
    """Return the directories that the lab has to write back: the checkout, and those of reports.

    They exist then.
    """
    from pyvmm.lab import default_writable

    here = config.invocation_params.dir
    found = {path.resolve() for path in default_writable(here)}
    for name in FILE_OPTIONS:
        if given := config.getoption(name, None):
            found.add((here / os.path.expandvars(Path(given).expanduser())).resolve().parent)
    for name in DIRECTORY_OPTIONS:
        if given := config.getoption(name, None):
            found.add((here / given).resolve())
    found.update(path.resolve() for path in options.lab_writable)
    if options.logs is not None:
        found.add(options.logs.resolve())
    for path in found:
        with contextlib.suppress(OSError):
            path.mkdir(parents=True, exist_ok=True)
    outermost = [path for path in found if not any(above in found for above in path.parents)]
    return sorted(path for path in outermost if path.is_dir() and path != Path("/"))


def go(
    config: pytest.Config, options: Options, reason: str, write_line: Callable[[str], None]
) -> NoReturn:
    """Become ``pyvmm lab -- COMMAND``: its exit status is this process's.

    Nothing of this session goes on, so no plugin writes a report of a session without tests over
    the one that was written in the lab.
    """
    words = command(config, options)
    write_line(f"pyvmm: {reason}")
    write_line(
        "pyvmm: running this command again in the lab, which is emulated and slow "
        "(--pyvmm-lab never would fail the tests instead)"
    )
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.suspend_global_capture(in_=True)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    environment = {**os.environ, "PYTEST_ADDOPTS": _same_root(config)}
    # A directory of the host's in which no socket can be made is none for temporary files.
    if Path(tempfile.gettempdir()).resolve() in writable_directories(config, options):
        environment["TMPDIR"] = "/run"
    os.chdir(config.invocation_params.dir)
    os.execve(words[0], words, environment)


def _same_root(config: pytest.Config) -> str:
    """Return the value of PYTEST_ADDOPTS that keeps this session's root and configuration file.

    pytest looks for them around every word that is a path: a report's directory, which did not
    exist when this session began, would be one.
    """
    words = [f"--rootdir={config.rootpath}"]
    if config.inipath is not None:
        words += ["-c", str(config.inipath)]
    return f"{os.environ.get('PYTEST_ADDOPTS', '')} {shlex.join(words)}".strip()


def refuse(reason: str, why_no_lab: str) -> NoReturn:
    """Fail the test that needs a virtual machine."""
    pytest.fail(
        f"no virtual machine: {reason}; and no lab: {why_no_lab}. To run there by hand: "
        "pyvmm lab -- pytest ...",
        pytrace=False,
    )


class Note:
    """A file in memory by which a worker of pytest-xdist tells its controller to go to the lab.

    Workers collect the tests, but only the controller can run the command again.  ``path`` leads
    workers on this host to it.
    """

    def __init__(self) -> None:
        self._fd = os.memfd_create("pyvmm-note", os.MFD_CLOEXEC)
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"

    def read(self) -> str:
        """Return the reason that a worker has written; "" if none has."""
        return os.pread(self._fd, 4096, 0).decode("utf-8", "replace")

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def write_note(path: str, reason: str) -> bool:
    """Write ``reason`` to the controller's note; False if that cannot be."""
    try:
        Path(path).write_text(reason, encoding="utf-8")
    except OSError:
        return False
    return True

