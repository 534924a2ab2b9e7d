"""Images of every kind: owners, modes and devices as they should be, with root and without.

The programs that read an image back are those of each file system.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError, HostError
from pyvmm.linux.host import tool_path
from pyvmm.linux.images.build import Made, Request, build
from pyvmm.linux.images.kinds import KINDS, MIB
from tests.support.guest import ROOT

NOBODY = 65534
FILES = {"etc/shadow": (0o640, 0, 42), "usr/bin/su": (0o4755, 0, 0), "var/mail/x": (0o600, 8, 8)}
DIRECTORIES = {"etc": 0o755, "usr": 0o755, "usr/bin": 0o755, "tmp": 0o1777, "secret": 0,
               "dev": 0o755, "var": 0o755, "var/mail": 0o2775}


def quiet(line: str) -> None:
    """For those who wait for nothing."""


def make_tar(path: Path, mode: str = "w") -> Path:
    """A root as docker and mmdebstrap pack it: devices, other owners, a link as a directory."""
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        def add(name: str, kind: bytes = tarfile.REGTYPE, **fields: object) -> None:
            entry = tarfile.TarInfo(f"./{name}")
            entry.type, entry.mtime = kind, 1_600_000_000
            content = b"contents" if kind == tarfile.REGTYPE else b""
            entry.size = len(content)
            for field, value in fields.items():
                setattr(entry, field, value)
            tar.addfile(entry, io.BytesIO(content))

        for name, bits in DIRECTORIES.items():
            owner = 8 if name == "var/mail" else 0
            add(name, tarfile.DIRTYPE, mode=bits, uid=owner, gid=owner)
        add("bin", tarfile.SYMTYPE, linkname="usr/bin")
        for name, (bits, uid, gid) in FILES.items():
            add(name, mode=bits, uid=uid, gid=gid)
        add("bin/sh", mode=0o755)
        add("usr/hard", tarfile.LNKTYPE, linkname="usr/bin/su")
        add("dev/null", tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666)
        add("dev/pipe", tarfile.FIFOTYPE, mode=0o600)
    return path


AS_USER = """
import os, sys
from pyvmm.cli.image import image_main
from pyvmm.errors import PyvmmError
if os.geteuid() == 0:  # after the imports: the interpreter itself may be root's alone
    user = int(sys.argv[1])
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
try:
    sys.exit(image_main(sys.argv[2:]))
except PyvmmError as error:
    sys.exit(str(error))
"""


def as_user(uid: int, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``pyvmm image build`` as the user ``uid``, in ``folder``."""
    return subprocess.run(
        [sys.executable, "-c", AS_USER, str(uid), "build", *arguments], check=False,
        capture_output=True, text=True, cwd=folder,
        env={"PATH": tool_path(), "PYTHONPATH": str(ROOT), "HOME": str(folder)},
    )


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory where anybody may write, below none that is closed to them."""
    folder = Path("/tmp") / f"pyvmm-test-{os.getpid()}-{os.urandom(4).hex()}"
    folder.mkdir()
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def run(tool: str, *arguments: str | Path) -> str:
    """The output of a program."""
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=False,
                          env={**os.environ, "PATH": tool_path()})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def of_ext(image: Path, name: str) -> tuple[int, int, int]:
    """Mode, owner and group in an ext file system, as debugfs reads them."""
    said = run("debugfs", "-R", f'stat "/{name}"', image)
    found = re.search(r"(?s)Mode: +(\d+).*?User: +(\d+) +Group: +(\d+)", said)
    assert found is not None, said
    return int(found[1], 8), int(found[2]), int(found[3])


def of_squashfs(image: Path, name: str) -> tuple[int, int, int]:
    for line in run("unsquashfs", "-lln", image).splitlines():
        words = line.split()
        if words and f" squashfs-root/{name}" in line and words[-1].endswith(name):
            bits = 0
            for at, letter in enumerate(words[0][1:]):
                bits |= (letter not in "-ST") << (8 - at)
                bits |= (letter in "sStT") << (11 - at // 3)
            uid, gid = words[1].split("/")
            return bits, int(uid), int(gid)
    raise AssertionError(f"no {name}")


def of_xfs(image: Path, name: str) -> tuple[int, int, int]:
    said = run("xfs_db", "-r", "-c", f"path /{name}", "-c", "print core.mode core.uid core.gid",
               image)
    mode, uid, gid = (line.split(" = ")[1] for line in said.splitlines())
    return int(mode, 8) & 0o7777, int(uid), int(gid)


def of_erofs(image: Path, name: str) -> tuple[int, int, int]:
    said = run("dump.erofs", f"--path=/{name}", image)
    found = re.search(r"Uid: (\d+) +Gid: (\d+) +Access: (\d+)/", said)
    assert found is not None, said
    return int(found[3], 8), int(found[1]), int(found[2])


READERS = {"ext4": of_ext, "ext2": of_ext, "squashfs": of_squashfs, "xfs": of_xfs,
           "erofs": of_erofs}
CHECKS = {"ext4": ["e2fsck", "-fn"], "ext2": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n", "-f"],
          "btrfs": ["btrfs", "check"], "erofs": ["fsck.erofs"], "squashfs": ["unsquashfs", "-s"]}


@pytest.mark.parametrize("kind", ["ext4", "ext2", "squashfs", "erofs", "xfs", "btrfs"])
@pytest.mark.parametrize("uid", [0, NOBODY], ids=["root", "nobody"])
def test_an_archive_keeps_owners_modes_and_devices(kind: str, uid: int, place: Path) -> None:
    make_tar(place / "r.tar")
    done = as_user(uid, place, "--from-tar", "r.tar", "--fs", kind, "root.img")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("image      root.img\n")
    image = place / "root.img"
    run(*CHECKS[kind], image)
    if kind == "btrfs":
        listed = run("btrfs", "inspect-internal", "dump-tree", "-t", "5", image)
        assert "mode 100640 links 1 uid 0 gid 42" in listed
        assert "mode 20666 links 1 uid 0 gid 0" in listed
        return
    for name, (bits, user, group) in FILES.items():
        seen = bits & 0o777 if kind == "erofs" else bits  # dump.erofs shows no more
        assert READERS[kind](image, name) == (seen, user, group), name
    if kind != "erofs":
        assert READERS[kind](image, "tmp") == (0o1777, 0, 0)
        assert READERS[kind](image, "dev/null") == (0o666, 0, 0)
        assert READERS[kind](image, "var/mail") == (0o2775, 8, 8)
    assert sorted(os.listdir(place)) == ["r.tar", "root.img"], "nothing is left over"


@pytest.mark.parametrize("uid", [0, NOBODY], ids=["root", "nobody"])
def test_files_of_a_directory_that_are_yours_become_roots(uid: int, place: Path) -> None:
    tree = place / "tree"
    (tree / "sbin").mkdir(parents=True)
    (tree / "sbin/init").write_text("#!/bin/sh\n")
    (tree / "sbin/init").chmod(0o750)
    if os.geteuid() == 0:
        for path in (tree, *tree.rglob("*")):
            os.chown(path, uid, uid)
    done = as_user(uid, place, "--from-dir", "tree", "root.img")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[2:] == [
        "init       /sbin/init", "boot it    pyvmm run --kernel KERNEL --disk root.img"]
    assert of_ext(place / "root.img", "sbin/init") == (0o750, 0, 0)
    assert of_ext(place / "root.img", "") == (0o755, 0, 0)


def request(tmp_path: Path, **fields: object) -> Request:
    return Request(out=tmp_path / "out.img", **fields)  # type: ignore[arg-type]


def made(tmp_path: Path, **fields: object) -> Made:
    return build(request(tmp_path, **fields), quiet)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A directory without a system in it."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a file").write_bytes(os.urandom(100_000))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_size_is_chosen_from_the_contents(kind: str, data: Path, tmp_path: Path) -> None:
    if kind == "xfs":
        (data / "a file").rename(data / "a-file")
    found = made(tmp_path, directory=data, kind=kind)
    assert found.init == ""
    assert found.files == 1
    assert found.content_bytes == 25 * 4096
    assert found.size_bytes == (tmp_path / "out.img").stat().st_size
    if KINDS[kind].is_read_only:
        assert 100_000 < found.size_bytes < 2 * MIB
    else:
        assert found.size_bytes == max(KINDS[kind].least_bytes, 33 * MIB)


@pytest.mark.parametrize("kind", [kind for kind, what in KINDS.items() if what.label_bytes])
def test_a_label_is_in_the_image(kind: str, tmp_path: Path) -> None:
    label = "pyvmm-label-16-b"[: min(16, KINDS[kind].label_bytes)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/file").touch()
    made(tmp_path, directory=tmp_path / "data", kind=kind, label=label)
    assert label.encode() in (tmp_path / "out.img").read_bytes()[: 1 << 17]


def test_contents_larger_than_the_spare_room_fit(tmp_path: Path, data: Path) -> None:
    (data / "large").write_bytes(os.urandom(150 * MIB))
    found = made(tmp_path, directory=data)
    assert found.size_bytes > 187 * MIB
    run("e2fsck", "-fn", tmp_path / "out.img")


@pytest.mark.parametrize(("fields", "words"), [
    ({"kind": "squashfs", "size_bytes": 64 * MIB}, "squashfs is as large as its contents"),
    ({"kind": "xfs", "size_bytes": 64 * MIB}, "must be at least 320M for xfs"),
    ({"size_bytes": 64 * MIB + 1}, "a multiple of 4096 bytes; it is 67108865"),
    ({"kind": "squashfs", "label": "x"}, "--label: squashfs has none; leave it away"),
    ({"label": "x" * 17}, "is longer than the 16 bytes of ext4"),
    ({"kind": "ntfs"}, "--fs ntfs: is not known; there are ext4, "),
    ({"kind": "xfs"}, "a file: mkfs.xfs takes no name with a space"),
    ({"added": ((Path("/nowhere"), "/x"),)}, "--add /nowhere:/x: /nowhere: no such file"),
    ({"programs": (Path("/nowhere"),)}, "--with-program /nowhere: no such file"),
])
def test_requests_that_cannot_be_met(
    fields: dict[str, object], words: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        made(tmp_path, directory=data, **fields)
    assert words in str(caught.value)
    assert os.listdir(tmp_path) == ["data"]


def test_contents_that_do_not_fit_leave_nothing(data: Path, tmp_path: Path) -> None:
    (data / "large").write_bytes(os.urandom(9 * MIB))
    with pytest.raises(HostError, match="mke2fs: "):
        made(tmp_path, directory=data, size_bytes=8 * MIB)
    assert os.listdir(tmp_path) == ["data"]


def test_an_image_that_is_there_is_not_lost(data: Path, tmp_path: Path) -> None:
    (tmp_path / "out.img").write_text("precious")
    with pytest.raises(ConfigError, match=r"is there already; --force replaces it"):
        made(tmp_path, directory=data)
    assert (tmp_path / "out.img").read_text() == "precious"
    made(tmp_path, directory=data, replaces=True)
    run("e2fsck", "-fn", tmp_path / "out.img")


def test_an_image_is_not_put_into_itself(data: Path) -> None:
    with pytest.raises(ConfigError, match="would be in the image: it is below"):
        made(data, directory=data)


def test_the_mask_of_the_caller_counts_for_the_image_and_not_in_it(tmp_path: Path) -> None:
    make_tar(tmp_path / "r.tar")
    before = os.umask(0o077)
    try:
        made(tmp_path, tar=str(tmp_path / "r.tar"))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out.img").stat().st_mode) == 0o600
    assert of_ext(tmp_path / "out.img", "") == (0o755, 0, 0)


@pytest.mark.parametrize("packing", ["w:gz", "w:xz", "w:bz2", "zstd", "-"])
def test_archives_of_every_packing(
    packing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_tar(tmp_path / "r.tar", packing if packing[:2] == "w:" else "w")
    name, stdin = str(path), contextlib.ExitStack()
    if packing == "zstd":
        run("zstd", "-q", "--rm", path)
        name += ".zst"
    elif packing == "-":
        monkeypatch.setattr(sys, "stdin", stdin.enter_context(path.open()))
        name = "-"
    with stdin:
        found = made(tmp_path, tar=name, kind="initramfs")
    assert found.files == 16
    assert found.init == "/bin/sh"


@pytest.mark.parametrize(("name", "kind", "link"), [
    ("../evil", tarfile.REGTYPE, ""), ("a/../../evil", tarfile.REGTYPE, ""),
    ("hard", tarfile.LNKTYPE, "../../etc/passwd"), ("hard", tarfile.LNKTYPE, "/etc/passwd"),
])
def test_an_archive_stays_where_it_is_unpacked(
    name: str, kind: bytes, link: str, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "r.tar", "w") as tar:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = kind, link
        tar.addfile(entry)
    with pytest.raises(ConfigError, match=r"r\.tar: '.*' (would be outside|is a hard link to)"):
        made(tmp_path, tar=str(tmp_path / "r.tar"))
    assert os.listdir(tmp_path) == ["r.tar"]


def test_a_link_out_of_the_archive_is_followed_inside(tmp_path: Path) -> None:
    """As in a container: /etc is the image's own."""
    outside = tmp_path / "outside"
    outside.mkdir()
    with tarfile.open(tmp_path / "r.tar", "w") as tar:
        for name, target in (("up", "../../../.."), ("abs", str(outside))):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            tar.addfile(entry)
        for name in ("up/one", "abs/two"):
            tar.addfile(tarfile.TarInfo(name))
    made(tmp_path, tar=str(tmp_path / "r.tar"))
    assert os.listdir(outside) == []
    listed = run("debugfs", "-R", "ls -p /", tmp_path / "out.img")
    assert "/one/" in listed
    assert "/two/" in run("debugfs", "-R", f"ls -p {outside}", tmp_path / "out.img")


@pytest.mark.parametrize("content", [b"", b"x" * 2000, b"\x1f\x8b\x08 no gzip", bytes(10240)])
def test_what_is_no_archive(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "r.tar").write_bytes(content)
    with pytest.raises(ConfigError, match=r"r\.tar: (is no tar archive|has no files)"):
        made(tmp_path, tar=str(tmp_path / "r.tar"))


def test_missing_tools_are_one_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyvmm.linux.host.tool_path", lambda: "/nowhere")
    for kind, package in (("ext4", "e2fsprogs"), ("btrfs", "btrfs-progs")):
        with pytest.raises(HostError, match=f" is missing; run: .*apt-get install .* {package}$"):
            made(tmp_path, directory=data, kind=kind)
    with pytest.raises(HostError, match=r"mmdebstrap is missing \(--debootstrap installs by it\)"):
        made(tmp_path, suite="bookworm")
