"""Images of ``pyvmm image build`` as guests see them: what is in them, and who owns it."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from pyvmm.linux.busybox import find_busybox
from pyvmm.linux.images.build import Request, build
from tests.support.guest import USER_SPACE, boot
from tests.support.stock import STABLE, boot_stock

pytestmark = pytest.mark.kvm

INIT = """\
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox echo "root is $(/bin/busybox grep ' / ' /proc/mounts)"
/bin/busybox mkdir -p /mnt
/bin/busybox mount -o ro -t ext4 /dev/vdb /mnt && cd /mnt || exit 1
/bin/busybox stat -c 'seen %n %a %u:%g %t,%T' shadow su null mail .
/bin/busybox poweroff -f
"""


def quiet(line: str) -> None:
    """For those who wait for nothing."""


def make_tar(path: Path) -> str:
    with tarfile.open(path, "w:gz") as tar:
        for name, kind, mode, uid, gid in (
            ("shadow", tarfile.REGTYPE, 0o640, 0, 42), ("su", tarfile.REGTYPE, 0o4755, 0, 0),
            ("null", tarfile.CHRTYPE, 0o666, 0, 0), ("mail", tarfile.DIRTYPE, 0o2775, 8, 8),
        ):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode, entry.uid, entry.gid = kind, mode, uid, gid
            entry.devmajor, entry.devminor = 1, 3
            tar.addfile(entry, io.BytesIO())
    return str(path)


def test_a_directory_boots_and_an_archive_is_as_it_was_packed(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in ("bin", "sbin", "dev", "proc"):
        (tree / name).mkdir(parents=True)
    (tree / "bin/busybox").write_bytes(find_busybox(tmp_path, quiet))
    (tree / "sbin/init").write_text(INIT)
    for name in ("bin/busybox", "sbin/init"):
        (tree / name).chmod(0o755)
    root, data = tmp_path / "root.img", tmp_path / "data.img"
    build(Request(out=root, directory=tree), quiet)
    build(Request(out=data, tar=make_tar(tmp_path / "r.tar.gz")), quiet)
    run = boot("--disk", root, "--disk", f"{data},ro")
    assert run.lines("root is ") == ["/dev/root / ext4 rw,relatime 0 0"], run.console + run.messages
    assert run.lines("seen ") == [
        "shadow 640 0:42 0,0", "su 4755 0:0 0,0", "null 666 0:0 1,3", "mail 2775 8:8 0,0",
        ". 755 0:0 0,0",
    ]
    assert run.status == 0


@pytest.mark.parametrize(("kind", "options"), [("xfs", ""), ("squashfs", ",ro")])
def test_busybox_on_another_file_system(kind: str, options: str, tmp_path: Path) -> None:
    image = tmp_path / "root.img"
    build(Request(out=image, is_busybox=True, kind=kind), quiet)
    run = boot_stock(STABLE, "stat -c 'tmp %a %u:%g' /tmp; exit 7", root=f"{image}{options}")
    assert run.status == 7, run.console + run.messages
    assert run.lines(USER_SPACE)
    assert run.lines("pyvmm-init: root ")[0].split()[1] == kind
    assert run.lines("tmp ") == ["1777 0:0"]
