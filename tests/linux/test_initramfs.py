"""The initramfs for a distribution's kernel, and the shell text in it."""

from __future__ import annotations

import gzip
import re
import struct
import subprocess
import uuid
from pathlib import Path
from typing import Any

import pytest

from pyvmm.linux import initramfs
from tests.support.cpio import unpack
from tests.support.roots import find_tool

TEXT = initramfs.INIT.read_text()


def parse(command_line: str) -> dict[str, str]:
    """What ``parse_cmdline`` makes of a kernel command line."""
    names = ("ROOT", "TYPE", "FLAGS", "MODE", "INIT", "WAIT_S", "FOREVER")
    shown = "\n".join(f'echo "{name} ${name}"' for name in names)
    script = TEXT + f'\nread -r line\nparse_cmdline "$line"\n{shown}\n'
    done = subprocess.run(
        ["busybox", "sh", "-c", script], input=command_line + "\n", capture_output=True, text=True,
        check=True, cwd="/",
    )
    assert done.stderr == ""
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


DEFAULTS = {"ROOT": "/dev/vda", "TYPE": "", "FLAGS": "", "MODE": "ro", "INIT": "", "WAIT_S": "10",
            "FOREVER": ""}


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
        ("rootwait root=/dev/vda1", {"ROOT": "/dev/vda1", "FOREVER": "1"}),
        ("rootdelay=3 rootwait=7 rootwait= rootwait=x", {"WAIT_S": "7"}),
        ('root="PARTLABEL=my root" rw', {"ROOT": "PARTLABEL=my root", "MODE": "rw"}),
        ('"root=LABEL=my root" rw', {"ROOT": "LABEL=my root", "MODE": "rw"}),
        ('root=LABEL="my root"', {"ROOT": "LABEL=my root"}),
        ("  root=a\t\trw  ", {"ROOT": "a", "MODE": "rw"}),
        ('rw x="-- ro', {"MODE": "rw"}),
    ],
)
def test_the_kernel_command_line(command_line: str, expected: dict[str, str]) -> None:
    assert parse(command_line) == DEFAULTS | expected


def test_the_archive_holds_init_busybox_and_modules_in_order() -> None:
    files = unpack(gzip.decompress(initramfs.pack(
        b"BUSYBOX", [("b", b"1"), ("a", b"2")], {"xfs": [("c", b"3")], "f2fs": []})))
    assert files["init"] == (0o100755, initramfs.INIT.read_bytes())
    assert files["bin/busybox"] == (0o100755, b"BUSYBOX")
    assert files["bin/mount"] == (0o120777, b"busybox")
    assert files["modules/00-b.ko"] == (0o100644, b"1")
    assert files["modules/01-a.ko"] == (0o100644, b"2")
    assert gzip.decompress(files["file-systems/xfs/00-c.ko.gz"][1]) == b"3"
    assert {"dev", "proc", "sys", "root"} <= files.keys()


def test_two_runs_pack_the_same() -> None:
    assert initramfs.pack(b"x", [], {}) == initramfs.pack(b"x", [], {})


def test_init_finds_every_command_it_runs() -> None:
    subprocess.run(["sh", "-n", initramfs.INIT], check=True)
    code = re.sub(r"^ *#.*|  # .*", "", TEXT, flags=re.MULTILINE)
    listed = subprocess.run(["busybox", "--list"], capture_output=True, text=True, check=True)
    words = set(re.findall(r"(?<![\w=/.-])[a-z_]+(?![\w=/.-])", code))
    assert words & set(listed.stdout.split()) - {"echo", "printf"} == set(initramfs.APPLETS)


def test_busybox_has_every_applet(tmp_path: Path) -> None:
    listed = subprocess.run(["busybox", "--list"], capture_output=True, text=True, check=True)
    assert set(initramfs.APPLETS) <= set(listed.stdout.split())


GUIDS = [f"0fc63daf-8483-4772-8e79-3d69d847{number:02x}{letter}" for number, letter in
         ((1, "e4"), (2, "ab"), (3, "00"))]
TABLES = {
    "gpt": "label: gpt\n" + "\n".join(
        f'size=1MiB, uuid={guid}, name="root {number}"' for number, guid in enumerate(GUIDS, 1)
    ),
    "dos": "label: dos\nlabel-id: 0x0000beef\n1: size=1MiB\n2: size=4MiB, type=5\n5: size=1MiB\n",
}


def find(
    folder: Path, root: str, table: str, *, block: int = 512, uevent: bool = False,
    spoil: int | None = None,
) -> str:
    """What ``find_device`` prints for ``root`` with two disks, an empty one and one with ``table``.

    ``uevent``: as Linux 6.9 and later, which say themselves what a partition's PARTUUID is.
    """
    (folder / "dev").mkdir()
    numbers = (1, 2, 5) if table == "dos" else (1, 2, 3)
    for disk in ("vda", "vdb"):
        image = folder / "dev" / disk
        with image.open("wb") as file:
            file.truncate(16 << 20)
        at = folder / "sys" / "block" / disk
        (at / "queue").mkdir(parents=True)
        (at / "queue" / "logical_block_size").write_text(f"{block}\n")
        (at / "size").write_text(f"{(16 << 20) // 512}\n")
        for number in numbers if disk == "vdb" else ():
            name = f"{disk}{number}"
            (at / name).mkdir()
            (at / name / "partition").write_text(f"{number}\n")
            said = [f"DEVNAME={name}", "DEVTYPE=partition", f"PARTN={number}"]
            if table == "gpt":
                said += [f"PARTNAME=root {number}"] + [f"PARTUUID={GUIDS[number - 1]}"] * uevent
            (at / name / "uevent").write_text("\n".join([*said, ""]))
            shown = folder / "sys" / "class" / "block" / name
            shown.mkdir(parents=True)
            (shown / "dev").write_text(f"254:{16 + number}\n")
    if block != 512:
        write_gpt(image, block)
    elif not uevent:
        tool = [find_tool("sfdisk"), "-q", "--no-reread", "--no-tell-kernel", str(image)]
        subprocess.run(tool, input=TABLES[table], text=True, check=True)
    if spoil is not None:
        with image.open("r+b") as file:
            file.seek(spoil)
            file.write(bytes(8))
    script = f'{TEXT}\nSYS={folder}/sys DEV={folder}/dev\nread -r root\nfind_device "$root"\n'
    done = subprocess.run(
        ["busybox", "sh", "-c", script], input=root + "\n", capture_output=True, text=True, cwd="/",
    )
    assert done.stderr == ""
    assert (done.returncode == 0) == bool(done.stdout)
    return done.stdout.strip()


def write_gpt(image: Path, block: int) -> None:
    """A GPT for a disk with blocks of ``block`` bytes, as much of it as tells partitions apart."""
    entries = b"".join(
        (bytes(16) + uuid.UUID(guid).bytes_le).ljust(128, b"\0") for guid in GUIDS
    )
    header = b"EFI PART".ljust(72, b"\0") + struct.pack("<QII", 2, len(GUIDS), 128)
    with image.open("r+b") as file:
        for at, data in enumerate((bytes(450) + b"\xee", header, entries)):
            file.seek(at * block)
            file.write(data)


@pytest.mark.parametrize("options", [
    {}, {"uevent": True}, {"block": 4096}, {"spoil": 512},
], ids=["table", "uevent", "4 KiB blocks", "first header lost"])
@pytest.mark.parametrize(("root", "found"), [
    (f"PARTUUID={GUIDS[0]}", "/dev/vdb1"),
    (f"PARTUUID={GUIDS[2].upper()}", "/dev/vdb3"),
    (f"PARTUUID={GUIDS[0]}/PARTNROFF=2", "/dev/vdb3"),
    (f"PARTUUID={GUIDS[1]}/PARTNROFF=-1", "/dev/vdb1"),
    (f"PARTUUID={GUIDS[1]}/PARTNROFF=-2", "/dev/vdb"),
    (f"PARTUUID={GUIDS[1]}/PARTNROFF=0", "/dev/vdb2"),
    (f"PARTUUID={GUIDS[1]}/PARTNROFF=7", ""),
    (f"PARTUUID={GUIDS[1]}/PARTNROFF=x", ""),
    (f"PARTUUID={GUIDS[1]}/PARTNROFF=", ""),
    (f"PARTUUID={GUIDS[1]}/PARTNROFF=08", ""),
    ("PARTUUID=", ""), ("PARTUUID=-", ""), ("PARTUUID=*", ""), (f"PARTUUID={GUIDS[0]}0", ""),
    ("PARTLABEL=root 2", "/dev/vdb2"), ("PARTLABEL=ROOT 2", ""), ("PARTLABEL=root", ""),
    ("254:18", "/dev/vdb2"), ("fe12", "/dev/vdb2"), ("FE12", "/dev/vdb2"), ("254:1", ""),
    ("254:", ""), ("xyz", ""), ("", ""), ("123456789", ""), ("/dev/nothing", ""), ("/dev", ""),
])
def test_fault_45_a_partition_is_found(
    root: str, found: str, options: dict[str, Any], tmp_path: Path
) -> None:
    assert find(tmp_path, root, "gpt", **options) == found


@pytest.mark.parametrize(("root", "found"), [
    ("PARTUUID=0000beef-01", "/dev/vdb1"), ("PARTUUID=0000BEEF-05", "/dev/vdb5"),
    ("PARTUUID=0000beef-01/PARTNROFF=4", "/dev/vdb5"), ("PARTUUID=0000beef-5", ""),
    ("PARTUUID=00000000-01", ""), ("PARTLABEL=", ""),
])
def test_fault_45_so_is_one_of_an_mbr(root: str, found: str, tmp_path: Path) -> None:
    assert find(tmp_path, root, "dos") == found
