"""The initramfs for a distribution's kernel, and the shell text in it."""

from __future__ import annotations

import gzip
import re
import subprocess
from pathlib import Path

import pytest

from pyvmm.linux import initramfs
from tests.support.cpio import unpack

TEXT = initramfs.INIT.read_text()


def parse(command_line: str) -> dict[str, str]:
    """What ``parse_cmdline`` makes of a kernel command line."""
    names = ("ROOT", "TYPE", "FLAGS", "MODE", "INIT", "WAIT_S")
    shown = "\n".join(f'echo "{name} ${name}"' for name in names)
    script = TEXT + f'\nread -r line\nparse_cmdline "$line"\n{shown}\n'
    done = subprocess.run(
        ["busybox", "sh", "-c", script], input=command_line + "\n", capture_output=True, text=True,
        check=True, cwd="/",
    )
    assert done.stderr == ""
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


DEFAULTS = {"ROOT": "/dev/vda", "TYPE": "", "FLAGS": "", "MODE": "ro", "INIT": "", "WAIT_S": "10"}


@pytest.mark.parametrize(
    ("command_line", "expected"),
    [
        ("", {}),
        ("console=ttyS0 quiet", {}),
        ("root=/dev/vdb1 rw", {"ROOT": "/dev/vdb1", "MODE": "rw"}),
        ("rw root=/dev/vda root=LABEL=x ro", {"ROOT": "LABEL=x", "MODE": "ro"}),
        ("rootfstype=ext4 rootflags=noatime,data=journal", {"TYPE": "ext4",
                                                            "FLAGS": "noatime,data=journal"}),
        ("init=/bin/sh rootdelay=3", {"INIT": "/bin/sh", "WAIT_S": "3"}),
        ("rootdelay=x rootdelay=", {}),
        ('rw pyvmm.run="mount -o ro root=/dev/x init=/y" quiet', {"MODE": "rw"}),
        ('a="one word" b="two words" root=/dev/vdc', {"ROOT": "/dev/vdc"}),
        ('a="word" root=/dev/vdc', {"ROOT": "/dev/vdc"}),
        ("rw -- ro root=/dev/x", {"MODE": "rw"}),
        ("root=/dev/* x=$(touch /x) `y`", {"ROOT": "/dev/*"}),
    ],
)
def test_the_kernel_command_line(command_line: str, expected: dict[str, str]) -> None:
    assert parse(command_line) == DEFAULTS | expected


def test_the_archive_holds_init_busybox_and_modules_in_order() -> None:
    files = unpack(gzip.decompress(initramfs.pack(b"BUSYBOX", [("b", b"1"), ("a", b"2")])))
    assert files["init"] == (0o100755, initramfs.INIT.read_bytes())
    assert files["bin/busybox"] == (0o100755, b"BUSYBOX")
    assert files["bin/mount"] == (0o120777, b"busybox")
    assert files["modules/00-b.ko"] == (0o100644, b"1")
    assert files["modules/01-a.ko"] == (0o100644, b"2")
    assert {"dev", "proc", "sys", "root"} <= files.keys()


def test_two_runs_pack_the_same() -> None:
    assert initramfs.pack(b"x", []) == initramfs.pack(b"x", [])


def test_init_finds_every_command_it_runs() -> None:
    subprocess.run(["sh", "-n", initramfs.INIT], check=True)
    code = re.sub(r"^ *#.*|  # .*", "", TEXT, flags=re.MULTILINE)
    listed = subprocess.run(["busybox", "--list"], capture_output=True, text=True, check=True)
    words = set(re.findall(r"(?<![\w=/.-])[a-z_]+(?![\w=/.-])", code))
    assert words & set(listed.stdout.split()) - {"echo"} == set(initramfs.APPLETS)


def test_busybox_has_every_applet(tmp_path: Path) -> None:
    listed = subprocess.run(["busybox", "--list"], capture_output=True, text=True, check=True)
    assert set(initramfs.APPLETS) <= set(listed.stdout.split())
