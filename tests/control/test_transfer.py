"""Copies into the guest and out of it: what is packed, and what a guest can do by its stream."""

from __future__ import annotations

import contextlib
import io
import os
import random
import socket
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvmm.control import unpacking
from pyvmm.control.packing import TransferError, own_name, pack, put_place
from pyvmm.control.unpacking import Unpacker


def unpack(target: Path | str, stream: bytes, **limits: int) -> list[str]:
    """Unpack in pieces of odd sizes; return the lines about what was left out."""
    lengths = random.Random(len(stream))
    with Unpacker(str(target), **limits) as unpacker:
        at = 0
        while at < len(stream):
            length = lengths.choice((1, 100, 511, 512, 513, 70_000))
            unpacker.feed(stream[at : at + length])
            at += length
        unpacker.end()
        return unpacker.skipped


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **given: object) -> (
    tuple[tarfile.TarInfo, bytes]
):
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    for key, value in given.items():
        setattr(info, key, value)
    return info, data


def stream(*members: tuple[tarfile.TarInfo, bytes], style: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=style) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def tree(folder: Path) -> Path:
    source = folder / "tree"
    (source / "inner").mkdir(parents=True)
    (source / "inner" / "data").write_bytes(os.urandom(700_001))
    (source / "empty").write_bytes(b"")
    (source / ("long" * 50)).write_bytes(b"long")
    (source / "ümlaut").write_bytes(b"u")
    os.symlink("inner/data", source / "link")
    os.symlink("../empty", source / "inner" / "up")
    (source / "empty").chmod(0o751)
    os.utime(source / "empty", (1e9, 1e9))
    return source


def shown(folder: Path) -> dict[str, object]:
    """Return the files below ``folder``: content, target, or None of a directory."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        else:
            found[name] = None if path.is_dir() else path.read_bytes()
    return found


def test_a_tree_goes_there_and_back(tmp_path: Path) -> None:
    source = tree(tmp_path)
    skipped: list[str] = []
    packed = b"".join(pack(str(source), "tree", skipped))
    assert skipped == []
    assert unpack(tmp_path / "copy", packed) == []
    assert shown(tmp_path / "copy") == shown(source)
    copy = (tmp_path / "copy" / "empty").stat()
    assert stat.S_IMODE(copy.st_mode) == 0o751
    assert copy.st_mtime == 1e9


def test_the_stream_is_one_that_tar_reads(tmp_path: Path) -> None:
    source = tree(tmp_path)
    packed = b"".join(pack(str(source), "new", []))
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        names = tar.getnames()
        assert {info.uid for info in tar} == {0}
    assert names[0] == "new"
    assert sorted(names) == sorted(
        ["new", *(f"new/{path.relative_to(source)}" for path in source.rglob("*"))]
    )


@pytest.mark.parametrize("style", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_every_style_of_tar_is_read(tmp_path: Path, style: int) -> None:
    name = "d/" + "n" * 90 + ("/" + "m" * 90 if style != tarfile.USTAR_FORMAT else "")
    packed = stream(
        member("d", kind=tarfile.DIRTYPE), member(name, b"data", mtime=5), style=style
    )
    unpack(tmp_path, packed)
    assert (tmp_path / name).read_bytes() == b"data"
    assert (tmp_path / name).stat().st_mtime == 5


@pytest.mark.parametrize(("target", "made"), [
    ("there", "there/f"), ("there/", "there/f"), ("new", "new"), ("there/new", "there/new"),
    (".", "f"), ("old", "old"),
])
def test_the_copy_has_the_name_that_cp_gives_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, made: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "old").write_bytes(b"old and longer")
    unpack(target, stream(member("f", b"data")))
    assert (tmp_path / made).read_bytes() == b"data"


@pytest.mark.parametrize("target", ["missing/", "missing/f", "file/f"])
def test_a_target_that_cannot_be_written_is_named(tmp_path: Path, target: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(TransferError, match=r"missing|file"):
        unpack(f"{tmp_path}/{target}", stream(member("f")))


@pytest.mark.parametrize(("source", "target", "is_directory", "place"), [
    ("a/b.ko", "/tmp/", False, ("/tmp", "b.ko")),
    ("a/b.ko", "/tmp", True, ("/tmp", "b.ko")),
    ("a/b.ko", "/tmp/c.ko", False, ("/tmp", "c.ko")),
    ("a/b/", "/c", False, ("/", "c")),
    ("a/b/", "/", True, ("/", "b")),
])
def test_put_has_the_rules_of_cp(
    source: str, target: str, is_directory: bool, place: tuple[str, str]
) -> None:
    assert put_place(source, target, target_is_directory=is_directory) == place


def test_the_current_directory_has_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert own_name(".") == tmp_path.name


def test_a_source_that_is_not_there_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match="missing: No such file"):
        pack(str(tmp_path / "missing"), "x", [])
    with pytest.raises(TransferError, match="is neither a file nor a directory"):
        pack("/dev/null", "x", [])


def test_sockets_and_unreadable_files_are_left_out_with_a_line(tmp_path: Path) -> None:
    source = tree(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(source / "socket"))
    os.mkfifo(source / "fifo")
    skipped: list[str] = []
    unpack(tmp_path / "copy", b"".join(pack(str(source), "x", skipped)))
    assert len(skipped) == 2
    assert not (tmp_path / "copy" / "socket").exists()


def test_a_file_that_shrinks_meanwhile_keeps_the_stream_whole(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(1_000_000))
    skipped: list[str] = []
    pieces = pack(str(tmp_path / "f"), "f", skipped)
    packed = next(pieces) + next(pieces)
    (tmp_path / "f").write_bytes(b"")
    packed += b"".join(pieces)
    unpack(tmp_path / "copy", packed)
    assert (tmp_path / "copy").stat().st_size == 1_000_000
    assert "ends with zeros" in skipped[0]


# A guest that lies


@pytest.mark.parametrize("members", [
    lambda: [member("../evil", b"x")],
    lambda: [member("/evil", b"x")],
    lambda: [member("d/../../evil", b"x")],
    lambda: [member("d", kind=tarfile.DIRTYPE), member("e/evil", b"x")],
    lambda: [member("d", b"x"), member("d/evil", b"x")],
], ids=["up", "absolute", "inner-up", "another", "below-a-file"])
def test_no_name_leads_out_of_the_copy(
    tmp_path: Path, members: Callable[[], list[tuple[tarfile.TarInfo, bytes]]]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(TransferError):
        unpack(folder, stream(*members()))
    assert os.listdir(tmp_path) == ["folder"]
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("link", [
    "/etc", "..", "../..", "x/../..", "../../x", "inner/../../../y", "",
])
def test_links_that_lead_out_are_left_out(tmp_path: Path, link: str) -> None:
    skipped = unpack(tmp_path, stream(
        member("d", kind=tarfile.DIRTYPE),
        member("d/link", kind=tarfile.SYMTYPE, linkname=link),
        member("d/after", b"x"),
    ))
    assert shown(tmp_path / "d") == {"after": b"x"}
    assert len(skipped) == 1
    assert "leads out of the copy" in skipped[0]


def test_no_link_is_followed_not_even_one_that_was_there(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "copy").mkdir()
    os.symlink(outside, tmp_path / "copy" / "d")
    with pytest.raises(TransferError):
        unpack(tmp_path / "copy", stream(member("d/evil", b"x")))
    (outside / "precious").write_bytes(b"old")
    os.symlink(outside / "precious", tmp_path / "copy" / "f")
    unpack(tmp_path / "copy", stream(member("f", b"new")))
    assert (outside / "precious").read_bytes() == b"old"
    assert (tmp_path / "copy" / "f").read_bytes() == b"new"
    assert os.listdir(outside) == ["precious"]


def test_a_link_of_the_stream_is_not_followed(tmp_path: Path) -> None:
    """Even one that may stay: what is written through it would depend on it."""
    with pytest.raises(TransferError):
        unpack(tmp_path, stream(
            member("d", kind=tarfile.DIRTYPE), member("d/e", kind=tarfile.DIRTYPE),
            member("d/l", kind=tarfile.SYMTYPE, linkname="e"), member("d/l/f", b"x"),
        ))


def test_second_names_are_those_of_files_in_the_stream(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "mine").write_bytes(b"mine")
    skipped = unpack(tmp_path, stream(
        member("d", kind=tarfile.DIRTYPE), member("d/a", b"x"),
        member("d/b", kind=tarfile.LNKTYPE, linkname="d/a"),
        member("d/c", kind=tarfile.LNKTYPE, linkname="d/mine"),
    ))
    assert (tmp_path / "d" / "a").stat().st_nlink == 2
    assert (tmp_path / "d" / "mine").stat().st_nlink == 1
    assert len(skipped) == 1


def test_devices_and_special_bits_do_not_come_along(tmp_path: Path) -> None:
    skipped = unpack(tmp_path, stream(
        member("d", kind=tarfile.DIRTYPE, mode=0o7777),
        member("d/null", kind=tarfile.CHRTYPE, devmajor=1, devminor=3),
        member("d/fifo", kind=tarfile.FIFOTYPE), member("d/su", b"x", mode=0o6777),
    ))
    assert shown(tmp_path / "d") == {"su": b"x"}
    assert len(skipped) == 2
    assert stat.S_IMODE((tmp_path / "d" / "su").stat().st_mode) & 0o7022 == 0
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o755


def test_members_and_bytes_are_bounded(tmp_path: Path) -> None:
    packed = stream(member("d", kind=tarfile.DIRTYPE), *(member(f"d/{n}", b"x" * 100)
                                                         for n in range(20)))
    with pytest.raises(TransferError, match="more than 20 files"):
        unpack(tmp_path, packed, max_members=20)
    with pytest.raises(TransferError, match="more than the limit of bytes"):
        unpack(tmp_path, packed, max_bytes=1999)
    unpack(tmp_path, packed, max_members=21, max_bytes=2000)


def test_directories_are_not_so_deep_that_nobody_can_remove_them(tmp_path: Path) -> None:
    """shutil.rmtree, which tidies up behind tests, recurses."""
    deepest = "/".join(["d"] * unpacking.MAX_DEPTH)
    unpack(tmp_path / "copy", stream(member(deepest, b"x")))
    for kind in (tarfile.REGTYPE, tarfile.DIRTYPE):
        with pytest.raises(TransferError, match=f"more than {unpacking.MAX_DEPTH} deep"):
            unpack(tmp_path / "copy", stream(member(f"{deepest}/d", kind=kind)))


def test_a_header_that_says_it_is_huge_is_refused_before_it_is_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 40
    with pytest.raises(TransferError, match="a header of 1099511627776 bytes"):
        unpack(tmp_path, info.tobuf(tarfile.GNU_FORMAT))


@pytest.mark.parametrize("packed", [
    b"", b"not a tar at all" * 64, bytes(1024), stream(member("f", b"x" * 5000))[:2000],
], ids=["nothing", "noise", "zeros", "cut"])
def test_a_stream_that_is_none_is_an_error(tmp_path: Path, packed: bytes) -> None:
    with pytest.raises(TransferError):
        unpack(tmp_path, packed)


def test_names_of_a_guest_are_escaped_in_messages(tmp_path: Path) -> None:
    with pytest.raises(TransferError) as caught:
        unpack(tmp_path, stream(member("../\x1b[2J", b"x")))
    assert str(caught.value).isprintable()
    skipped = unpack(tmp_path, stream(member("d", kind=tarfile.DIRTYPE),
                                      member("d/\x1b[2J\n", kind=tarfile.FIFOTYPE)))
    assert skipped[0].isprintable()


def test_noise_never_raises_anything_else(tmp_path: Path) -> None:
    base = bytearray(stream(
        member("d", kind=tarfile.DIRTYPE), member("d/" + "n" * 120, b"data" * 200),
        member("d/l", kind=tarfile.SYMTYPE, linkname="x" * 120), style=tarfile.PAX_FORMAT,
    ))
    chance = random.Random(5)
    outside = sorted(os.listdir(tmp_path))
    for turn in range(300):
        packed = bytearray(base)
        for _ in range(chance.randrange(1, 6)):
            at = chance.randrange(len(packed))
            packed[at] = chance.randrange(256)
            block = at - at % 512  # a checksum that is right lets the rest be read
            total = sum(packed[block : block + 148]) + sum(packed[block + 156 : block + 512]) + 256
            if chance.random() < 0.8 and packed[block + 257 : block + 262] == b"ustar":
                packed[block + 148 : block + 156] = b"%06o\0 " % total
        folder = tmp_path / f"t{turn}"
        folder.mkdir()
        with contextlib.suppress(TransferError):
            unpack(folder, bytes(packed))
        outside.append(f"t{turn}")
    assert sorted(os.listdir(tmp_path)) == sorted(outside)
    assert unpacking.MAX_HEADER_BYTES < 1 << 20
