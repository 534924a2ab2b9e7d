"""The plugin's options: on pytest's command line, or in its configuration file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

AUTO, NEVER = "auto", "never"
MAX_KERNELS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options that the user gave; paths are absolute.

    ``disks`` are texts, FILE or URI with an optional ``,ro`` or ``,rw``.  ``logs`` is None if
    nobody asked for logs.  ``lab_writable`` are further directories for the lab to write back.
    """

    kernels: tuple[str, ...]
    disks: tuple[str, ...]
    logs: Path | None
    lab: str
    lab_memory: str
    lab_writable: tuple[Path, ...]


def add_options(parser: pytest.Parser) -> None:
    """Add the options and the settings to pytest's."""
    group = parser.getgroup("pyvmm", "pyvmm: virtual machines as fixtures")
    group.addoption(
        "--pyvmm-kernel", metavar="K", action="append", dest="pyvmm_kernels",
        help="a Linux kernel for the tests' virtual machines; repeat to run them with each",
    )
    group.addoption(
        "--pyvmm-disk", metavar="FILE[,ro|,rw]", action="append", dest="pyvmm_disks",
        help="a disk image: each boot has its own snapshot, FILE is not written (,rw: it is; ,ro: "
        "nor can the guest write); repeat for several",
    )
    group.addoption(
        "--pyvmm-logs", metavar="DIR", dest="pyvmm_logs",
        help="keep the console of every test in a file of its own below DIR",
    )
    group.addoption(
        "--pyvmm-lab", choices=(AUTO, NEVER), dest="pyvmm_lab",
        help="without a KVM that runs Linux: auto (the default) runs this very command in pyvmm's "
        "lab, an emulated host; never fails the tests that need one",
    )
    group.addoption(
        "--pyvmm-lab-memory", metavar="SIZE", dest="pyvmm_lab_memory",
        help="the memory of that lab (2G)",
    )
    group.addoption(
        "--pyvmm-lab-rw", metavar="DIR", action="append", dest="pyvmm_lab_rw",
        help="a further directory in which the lab may write; repeat for several",
    )
    parser.addini("pyvmm_kernel", "as --pyvmm-kernel, one a line", type="paths", default=[])
    parser.addini("pyvmm_disk", "as --pyvmm-disk, one a line", type="linelist", default=[])
    parser.addini("pyvmm_logs", "as --pyvmm-logs", default="")
    parser.addini("pyvmm_lab", "as --pyvmm-lab", default=AUTO)
    parser.addini("pyvmm_lab_memory", "as --pyvmm-lab-memory", default="2G")
    parser.addini("pyvmm_lab_rw", "as --pyvmm-lab-rw, one a line", type="paths", default=[])


def read_options(config: pytest.Config) -> Options:
    """Return the options of this session; pytest.UsageError names one that cannot be.

    Paths on the command line are relative to the directory in which pytest was started, those of
    the configuration file to its own.
    """
    here, root = config.invocation_params.dir, _directory_of_settings(config)
    kernels = [str(here / text) for text in _given(config, "pyvmm_kernels")]
    for kernel in kernels:
        if not Path(kernel).exists():
            raise pytest.UsageError(f"--pyvmm-kernel {kernel}: there is no such file")
    if not kernels:
        # One of these may not be built yet, and concerns only the tests that boot it.
        kernels = [str(path) for path in config.getini("pyvmm_kernel")]
    if len(kernels) > MAX_KERNELS:
        raise pytest.UsageError(f"--pyvmm-kernel: {len(kernels)} kernels; at most {MAX_KERNELS}")
    if repeated := [kernel for kernel in kernels if kernels.count(kernel) > 1]:
        raise pytest.UsageError(f"--pyvmm-kernel {repeated[0]}: given more than once")
    disks = [_absolute(text, here) for text in _given(config, "pyvmm_disks")]
    for disk in disks:
        place, _ = place_and_way(disk)
        if "://" not in place and not Path(place).exists():
            raise pytest.UsageError(f"--pyvmm-disk {disk}: there is no such file")
    if not disks:
        disks = [_absolute(text, root) for text in config.getini("pyvmm_disk")]
    lab = config.getoption("pyvmm_lab") or config.getini("pyvmm_lab")
    if lab not in (AUTO, NEVER):
        raise pytest.UsageError(f"pyvmm_lab = {lab}: must be {AUTO} or {NEVER}")
    writable = [here / text for text in _given(config, "pyvmm_lab_rw")]
    return Options(
        kernels=tuple(kernels),
        disks=tuple(disks),
        logs=_logs(config, here, root),
        lab=lab,
        lab_memory=config.getoption("pyvmm_lab_memory") or config.getini("pyvmm_lab_memory"),
        lab_writable=tuple(writable or config.getini("pyvmm_lab_rw")),
    )


def place_and_way(disk: str) -> tuple[str, str]:
    """Return the file or URI of the text ``disk``, and how it is used: ro, rw or snapshot."""
    place, comma, way = disk.rpartition(",")
    if comma and way in ("ro", "rw", "snapshot"):
        return place, way
    return disk, "snapshot"


def _given(config: pytest.Config, name: str) -> Sequence[str]:
    values: Sequence[str] | None = config.getoption(name)
    return values or ()


def _directory_of_settings(config: pytest.Config) -> Path:
    return config.inipath.parent if config.inipath else config.rootpath


def _logs(config: pytest.Config, here: Path, root: Path) -> Path | None:
    given: str | None = config.getoption("pyvmm_logs")
    if given:
        return here / given
    setting: str = config.getini("pyvmm_logs")
    return root / setting if setting else None


def _absolute(text: str, start: Path) -> str:
    """Return the disk ``text`` with its path made absolute; a URI stays as it is."""
    return text if "://" in text else os.path.join(start, text)
