"""A MachineConfig as a command line: ``pyvmm run`` makes the same RunConfig of it."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest

import pyvmm
from pyvmm import MachineConfig
from pyvmm.cli.run import COMMAND, config_from
from pyvmm.config import DiskConfig, RunConfig
from pyvmm.errors import ConfigError
from pyvmm.launcher.arguments import Arguments, arguments_of
from pyvmm.startup.options import parse_options
from pyvmm.storage.open import DiskSource

VALUES: dict[str, list[Any]] = {
    "kernel": ["build/bzImage", Path("/boot/a kernel,=x"), "-odd"],
    "initrd": [None, "initrd.img", Path("-i")],
    "memory": ["256M", "1G", 300 << 20],
    "cpus": [1, 8],
    "cpu": ["host", "base,-xsave"],
    "append": ["", "quiet pyvmm.run='a  b'", "--cpus=3"],
    "cmdline": [None, "", "console=ttyS0 -- x"],
    "timeout_s": [None, 0.1, 1e-05, 3, 86400.5],
    "mmio": ["mapped", "trapped"],
    "serve": ["thread", "exit"],
    "rtc": ["utc", "none"],
    "discovery": ["both", "acpi", "cmdline"],
    "agent": [False, "image", True],
    "disks": [[], ["a.img"], ["a.img", "b,c.img"]],
}


def config_of(arguments: Arguments) -> RunConfig:
    """The configuration that pyvmm run makes of a launch's command line."""
    return config_from(parse_options(COMMAND, [*arguments.words, "--control-fd=3"]))


def plain(config: RunConfig) -> RunConfig:
    """``config`` with disks that compare, and without what a launch decides itself."""
    disks = []
    for disk in config.disks:
        source = disk.source if isinstance(disk, DiskConfig) else None
        if source is not None and not isinstance(source, DiskSource):
            source = DiskSource(location=source.location, read_only=source.read_only)
        disks.append(disk if source is None else disk.replace(source=source))
    agent = "image" if config.agent == "none" else config.agent
    paths = {
        name: None if getattr(config, name) is None else str(getattr(config, name))
        for name in ("kernel", "initrd")
    }
    return config.replace(disks=tuple(disks), console="none", agent=agent, **paths)


def same_places(config: RunConfig) -> RunConfig:
    """``config`` with the ``./`` taken away that a launch puts before a disk's name."""
    return config.replace(disks=tuple(
        disk.replace(source=disk.source.replace(
            location=disk.source.location.removeprefix("./")
        )) if isinstance(disk, DiskConfig) and isinstance(disk.source, DiskSource) else disk
        for disk in config.disks
    ))


def test_every_field_has_its_values_here() -> None:
    """So that a field that somebody adds is not forgotten on the command line."""
    assert VALUES.keys() == set(MachineConfig._fields)


PAIRS = [
    {first: one, second: other}
    for first, second in itertools.combinations(VALUES, 2)
    for one in VALUES[first] for other in VALUES[second]
]


def test_all_pairs_of_values_come_out_as_they_went_in() -> None:
    for fields in PAIRS:
        config = MachineConfig(**{"kernel": "k", **fields})
        arguments = arguments_of(config)
        arguments.close()
        expected = plain(config.run_config())
        found = same_places(plain(config_of(arguments)))
        assert found == expected, fields


RAW = DiskSource(location="/a.img")
DISKS = [
    (lambda: "/a,b.img", DiskConfig(source=DiskSource(location="/a,b.img"))),
    (lambda: Path("/a.img"), DiskConfig(source=RAW)),
    (lambda: pyvmm.RawDisk("/a.img", read_only=True),
     DiskConfig(source=RAW.replace(read_only=True))),
    (lambda: pyvmm.RawDisk("/a.img", any_format=True), DiskConfig(source=RAW.replace(is_raw=True))),
    (lambda: pyvmm.RawDisk("vhost-user=x"), DiskConfig(source=DiskSource(
        location="./vhost-user=x"))),
    (lambda: pyvmm.RawDisk("http://x"), DiskConfig(source=DiskSource(location="./http://x"))),
    (lambda: pyvmm.NbdDisk("nbd://host/a,b"),
     DiskConfig(source=DiskSource(location="nbd://host/a,b", is_raw=True))),
    (lambda: pyvmm.Overlay("/a.img"), DiskConfig(source=RAW.replace(snapshot=True))),
    (lambda: pyvmm.Overlay("/a.img", "/o,v"),
     DiskConfig(source=RAW.replace(snapshot=True, overlay="/o,v"))),
    (lambda: pyvmm.Overlay(pyvmm.NbdDisk("nbd://h/x")),
     DiskConfig(source=DiskSource(location="nbd://h/x", is_raw=True, snapshot=True))),
    (lambda: pyvmm.VhostUserDisk(socket="/s,ock", queues=3),
     pyvmm.VhostUserDisk(socket="/s,ock", queues=3)),
    (lambda: DiskConfig(source=RAW.replace(read_only=True, faults="/f")),
     DiskConfig(source=RAW.replace(read_only=True, faults="/f"))),
    (lambda: pyvmm.disk("/a.img", serial="a,b", queues=8, writeback=False,
                        rate_limit=pyvmm.RateLimit(ops_per_s=10, ops_burst=3, bytes_per_s=1 << 30)),
     DiskConfig(source=RAW, serial="a,b", queues=8, writeback=False,
                rate_limit=pyvmm.RateLimit(ops_per_s=10, ops_burst=3, bytes_per_s=1 << 30))),
]


@pytest.mark.parametrize(("disk", "expected"), DISKS, ids=range(len(DISKS)))
def test_every_kind_of_disk(disk: Any, expected: object) -> None:
    arguments = arguments_of(MachineConfig(kernel="k", disks=[disk()]))
    assert config_of(arguments).disks == (expected,)
    assert arguments.fds == []


def test_a_script_of_faults_goes_with_the_process() -> None:
    """A file in memory: nothing is left on a disk."""
    script = "write 3: EIO\n"
    disk = pyvmm.FaultyDisk(pyvmm.Overlay("/a.img"), script)
    arguments = arguments_of(MachineConfig(kernel="k", disks=[disk]))
    try:
        (found,) = config_of(arguments).disks
        assert isinstance(found, DiskConfig)
        assert isinstance(found.source, DiskSource)
        assert found.source.snapshot
        assert Path(found.source.faults).read_text() == script
    finally:
        arguments.close()
    assert arguments.fds == []


@pytest.mark.parametrize("disk", [
    pyvmm.MemoryDisk(512),
    pyvmm.Overlay(pyvmm.MemoryDisk(512)),
    pyvmm.FaultyDisk(pyvmm.MemoryDisk(512), ""),
    pyvmm.Overlay(pyvmm.FaultyDisk("/a.img", "")),
    pyvmm.disk(pyvmm.MemoryDisk(512), serial="x"),
])
def test_a_disk_of_this_process_is_refused(disk: Any) -> None:
    with pytest.raises(TypeError, match=r"lives in this process.*pyvmm\.Machine"):
        arguments_of(MachineConfig(kernel="k", disks=[disk]))


def test_a_console_log_is_opened_here_and_appended_to(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("old")
    arguments = arguments_of(MachineConfig(kernel="k"), console_log=log, control="s.sock")
    place = config_of(arguments).console
    assert place == f"/proc/self/fd/{arguments.fds[0]}"
    assert log.read_bytes() == b""
    log.write_text("mark\n")
    os.write(arguments.fds[0], b"guest\n")
    assert log.read_text() == "mark\nguest\n"
    again = arguments_of(MachineConfig(kernel="k"), console_log=arguments.fds[0])
    os.write(again.fds[0], b"more\n")
    assert log.read_text() == "mark\nguest\nmore\n"
    again.close()
    arguments.close()
    assert "--control=s.sock" in arguments.words


def test_mistakes_are_those_of_the_command_line() -> None:
    with pytest.raises(ConfigError, match="--cpus 9"):
        arguments_of(MachineConfig(kernel="k", cpus=9))
    with pytest.raises(ConfigError, match="NUL"):
        arguments_of(MachineConfig(kernel="k"), control="a\0b")
    for log in ("a\0b", "/nowhere/log", "/", 99999):
        with pytest.raises(ConfigError, match="console_log"):
            arguments_of(MachineConfig(kernel="k"), console_log=log)
    with pytest.raises(ConfigError, match="NUL"):
        arguments_of(MachineConfig(kernel="k", disks=[pyvmm.disk("/a", serial="x\0")]))
