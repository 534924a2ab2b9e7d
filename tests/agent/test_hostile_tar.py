"""Archives that want more than to be unpacked: the agent stays below the target, and alive."""

from __future__ import annotations

import os
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.agent.link import JobEnd
from tests.agent.test_transfers import make_tree, pack
from tests.support.agent_rig import AgentRig, agent_rig, member, tar_of
from tests.support.checked_agent import build_checked_agent

BLOCK = 512


@pytest.fixture(scope="module")
def checked_agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checked_agent(tmp_path_factory.mktemp("agent"))


@pytest.fixture
def rig(checked_agent: Path, tmp_path: Path) -> Iterator[AgentRig]:
    with agent_rig(checked_agent, tmp_path) as rig:
        yield rig


def symlink(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, tarfile.SYMTYPE, linkname=target), b""


@pytest.mark.parametrize(("members", "reason"), [
    ([(member("../escaped"), b"x")], "../escaped: leads out of the target"),
    ([(member("a/../../escaped"), b"x")], "a/../../escaped: leads out of the target"),
    ([(member("a/.."), b"x")], "a/..: leads out of the target"),
    ([symlink("up", ".."), (member("up/escaped"), b"x")], "up/escaped: leads out of the target"),
    ([symlink("abs", "/tmp"), (member("abs/escaped"), b"x")],
     "abs/escaped: a symbolic link leads out of the target"),
    ([symlink("a", "b"), symlink("b", "a"), (member("a/escaped"), b"x")],
     "a/escaped: Too many levels of symbolic links"),
    ([symlink("up", ".."), (member("up/new", tarfile.DIRTYPE), b"")],
     "up/new/: leads out of the target"),
    ([symlink("up", ".."), (member("hard", tarfile.LNKTYPE, linkname="up/beside"), b"")],
     "up/beside: leads out of the target"),
    ([(member("hard", tarfile.LNKTYPE, linkname="../beside"), b"")],
     "../beside: leads out of the target"),
    ([symlink("up", ".."), (member("up", tarfile.DIRTYPE), b"")], "up/.: leads out of the target"),
    ([(member("f"), b""), (member("f/g"), b"")], "f/g: Not a directory"),
    ([(member("d", tarfile.DIRTYPE), b""), (member("d"), b"")], "d: Is a directory"),
    ([(member("."), b"x")], "the tar stream has a member without a name"),
    ([(member("hard", tarfile.LNKTYPE, linkname="none"), b"")],
     "hard: No such file or directory"),
])
def test_nothing_leaves_the_target(
    rig: AgentRig, tmp_path: Path, members: list[tuple[tarfile.TarInfo, bytes]], reason: str
) -> None:
    (tmp_path / "beside").write_text("mine")
    result = rig.put(tmp_path / "target", tar_of(*members))
    assert (result.kind, result.reason) == (JobEnd.FAILED, reason)
    assert not list(tmp_path.rglob("escaped"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["beside", "target"]
    assert (tmp_path / "beside").stat().st_nlink == 1


def test_links_within_the_target_are_followed(rig: AgentRig, tmp_path: Path) -> None:
    """As /lib is a link to usr/lib, and an archive has lib/modules."""
    (tmp_path / "target/usr/lib").mkdir(parents=True)
    (tmp_path / "target/lib").symlink_to("usr/lib")
    archive = tar_of(
        (member("lib", tarfile.DIRTYPE), b""), (member("lib/modules/file"), b"m"),
        symlink("usr/back", "../lib"), (member("usr/back/second"), b"2"),
        (member("/absolute"), b"a"), (member("./usr//lib/./third"), b"3"),
    )
    assert rig.put(tmp_path / "target", archive).reason == ""
    lib = tmp_path / "target/usr/lib"
    assert (lib / "modules/file").read_text() == "m"
    assert (lib / "second").read_text() == "2"
    assert (lib / "third").read_text() == "3"
    assert (tmp_path / "target/lib").is_symlink()
    assert (tmp_path / "target/absolute").read_text() == "a"


def test_a_symbolic_link_at_a_files_place_is_replaced_not_followed(
    rig: AgentRig, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    archive = tar_of(symlink("x", str(victim)), (member("x"), b"theirs"))
    assert rig.put(tmp_path / "target", archive).reason == ""
    assert victim.read_text() == "mine"
    assert (tmp_path / "target/x").read_text() == "theirs"


def changed(archive: bytes, at: int, data: bytes) -> bytes:
    """Return ``archive`` with other bytes in its first header, whose checksum is right."""
    header = bytearray(archive[:BLOCK])
    header[at : at + len(data)] = data
    header[148:156] = b" " * 8
    header[148:155] = b"%06o\0" % sum(header)
    return bytes(header) + archive[BLOCK:]


PLAIN = tar_of((member("name"), b"data"), kind=tarfile.GNU_FORMAT)


@pytest.mark.parametrize(("archive", "reason"), [
    (b"", "the tar stream ends too early"),
    (PLAIN[:300], "the tar stream ends too early"),
    (PLAIN[:BLOCK], "the tar stream ends too early"),
    (PLAIN[: BLOCK + 2], "the tar stream ends too early"),
    (PLAIN[: 2 * BLOCK], "the tar stream ends too early"),
    (b"no archive at all" * 100, "what came is no tar stream"),
    (bytes([1]) + PLAIN[1:], "what came is no tar stream"),
    (changed(PLAIN, 124, b"12x"), "the tar stream has a number that is none"),
    (changed(PLAIN, 124, b"\xff" * 12), "the tar stream has a member of -1 bytes"),
    (changed(PLAIN, 124, b"\x80" + b"\xff" * 11), "the tar stream has a member of -1 bytes"),
    (changed(PLAIN, 124, b"\x80\0\0\0\x7f" + b"\xff" * 7),
     f"the tar stream has a member of {(1 << 63) - 1} bytes"),
    (changed(PLAIN, 156, b"S"), "name: a tar member of type 'S'"),
    (changed(PLAIN, 156, b"L") + PLAIN, ""),
    (changed(changed(PLAIN, 156, b"L"), 124, b"00000077777\0"),
     "the tar stream has a name of 32767 bytes"),
    (changed(changed(PLAIN, 156, b"K"), 124, b"00000000000\0"),
     "the tar stream has a name of 0 bytes"),
    (changed(changed(PLAIN, 156, b"x"), 124, b"00077777777\0"),
     "the tar stream has an extended header of 16777215 bytes"),
    (changed(PLAIN, 156, b"x"), "the tar stream has a damaged extended header"),
])
def test_a_damaged_archive_says_what_is_wrong(
    rig: AgentRig, tmp_path: Path, archive: bytes, reason: str
) -> None:
    result = rig.put(tmp_path / "target", archive)
    assert result.reason == reason
    assert result.kind is (JobEnd.FAILED if reason else JobEnd.EXITED)


def test_a_sparse_member_is_refused_by_name(rig: AgentRig, tmp_path: Path) -> None:
    info = member("s", pax_headers={"GNU.sparse.major": "1"})
    result = rig.put(tmp_path / "target", tar_of((info, b"")))
    assert result.reason == "the tar stream has a sparse member, which is not supported"


@pytest.mark.parametrize("record", [
    b"5 a=\n", b"0 a=b\n", b"99999999999999999999 a=b\n", b"6 ab=\n", b"x", b"7 size=\n",
    b"12 size=-7x\n", b"8 mtime\n", b"20 path=" + b"x" * 10 + b"\n\n", b" 6 a=b\n", b"-6 a=b\n",
    b"15 mtime=1e999\n", b"16 size=00000-1\n", b"6 a=b\n" * 3000,
])
def test_a_damaged_extended_header_is_survived(
    rig: AgentRig, tmp_path: Path, record: bytes
) -> None:
    plain = changed(PLAIN, 156, b"x")
    header = changed(plain, 124, b"%011o\0" % len(record))[:BLOCK]
    result = rig.put(tmp_path / "t", header + record + bytes(-len(record) % BLOCK) + PLAIN)
    assert result.kind in (JobEnd.EXITED, JobEnd.FAILED)
    assert "process died" not in result.reason


def test_archives_damaged_at_random_never_crash_it(rig: AgentRig, tmp_path: Path) -> None:
    make_tree(tmp_path / "tree")
    for large in ("plain", "sparse"):
        (tmp_path / "tree" / large).write_bytes(b"x" * 1000)
    seeds = [pack(tmp_path / "tree", kind) for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
    noise = random.Random(5)
    for number in range(150):
        archive = bytearray(noise.choice(seeds))
        for _ in range(noise.choice([1, 3, 30])):
            # Mostly in headers, whose checksums are then made right again.
            at = noise.randrange(len(archive) // BLOCK) * BLOCK
            field = noise.choice([0, 100, 124, 136, 156, 157, 257, 345])
            archive[at + field + noise.randrange(9)] = noise.choice(b"\0\x80\xff/.09L x123567KS")
            archive[at + 148 : at + 156] = b" " * 8
            archive[at + 148 : at + 155] = b"%06o\0" % sum(archive[at : at + BLOCK])
        length = noise.randrange(len(archive))
        result = rig.put(tmp_path / f"out-{number}", bytes(archive[:length]))
        assert result.kind in (JobEnd.EXITED, JobEnd.FAILED)
        assert "process died" not in result.reason, result.reason
    names = {path.name for path in tmp_path.iterdir()}
    assert {name for name in names if not name.startswith("out-")} == {"tree"}
    assert not os.path.lexists("/escaped")


@pytest.mark.parametrize("key", ["uid", "gid"])
@pytest.mark.parametrize("value", ["-1", "4294967295", "4294967296"])
def test_an_owner_that_no_file_can_have_is_refused(
    rig: AgentRig, tmp_path: Path, key: str, value: str
) -> None:
    """Cut to 32 bits, 4294967296 would be root."""
    info = member("file", pax_headers={key: value})
    result = rig.put(tmp_path / "target", tar_of((info, b"x")))
    assert result.reason == "file: the tar stream has an owner that is none"
    assert not (tmp_path / "target/file").exists()


@pytest.mark.parametrize("value", ["-9223372036854775808.5", "-99999999999999999999.5"])
def test_a_time_before_all_times_is_no_overflow(
    rig: AgentRig, tmp_path: Path, value: str
) -> None:
    info = member("file", pax_headers={"mtime": value})
    assert rig.put(tmp_path / "target", tar_of((info, b"x"))).reason in (
        "", "the tar stream has a number that is none"
    )


def test_a_long_name_may_lack_its_zero_byte(rig: AgentRig, tmp_path: Path) -> None:
    long = changed(changed(PLAIN, 156, b"L"), 124, b"00000000004\0")
    assert rig.put(tmp_path / "target", long[: 2 * BLOCK] + PLAIN).reason == ""
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["data"]
