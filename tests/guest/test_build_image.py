"""guest/build_image.py: an ext4 image that e2fsck accepts, and an initramfs of the same tree."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from guest import build_image
from guest.exit import build as exit_programs
from pyvmm.errors import ConfigError
from pyvmm.linux.host import tool_path
from pyvmm.linux.images import additions, busybox_tree


def e2fs(tool: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a program of e2fsprogs."""
    path = shutil.which(tool, path=tool_path())
    assert path is not None
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=False)


def debugfs(image: Path, request: str) -> str:
    return e2fs("debugfs", "-R", request, image).stdout


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with a program of this machine, a file and a directory added."""
    base = tmp_path_factory.mktemp("image")
    extra = base / "extra"
    (extra / "deep").mkdir(parents=True)
    (extra / "deep/file").write_text("deep\n")
    (base / "one").write_text("one\n")
    if os.geteuid() == 0:
        os.chown(base / "one", 1000, 1000)
    out = base / "root.img"
    python = str(Path(sys.executable).resolve())
    assert build_image.main(["--out", str(out), "--add", f"{base / 'one'}:/data/one",
                             "--add", f"{extra}:/data", "--with-program", python]) == 0
    return out


def test_e2fsck_accepts_it(image: Path) -> None:
    check = e2fs("e2fsck", "-fn", image)
    assert check.returncode == 0, check.stdout


def test_has_the_default_size_and_is_sparse(image: Path) -> None:
    status = image.stat()
    assert status.st_size == 64 << 20
    assert status.st_blocks * 512 < status.st_size


def test_holds_init_busybox_and_its_applets(image: Path) -> None:
    assert debugfs(image, "cat /sbin/init") == busybox_tree.INIT.read_text()
    assert "Mode:  0755" in debugfs(image, "stat /sbin/init")
    assert 'Fast link dest: "/bin/busybox"' in debugfs(image, "stat /bin/sh")
    assert 'Fast link dest: "sbin/init"' in debugfs(image, "stat /init")
    assert "Mode:  01777" in debugfs(image, "stat /tmp")
    assert "root:x:0:0" in debugfs(image, "cat /etc/passwd")


@pytest.mark.parametrize("name", ["pyvmm-exit", "pyvmm-mark", "pyvmm-warm"])
def test_the_programs_for_our_ports_need_no_library(
    name: str, image: Path, tmp_path: Path
) -> None:
    program = tmp_path / name
    debugfs(image, f"dump /sbin/{name} {program}")
    assert program.read_bytes()[:4] == b"\x7fELF"
    assert program.stat().st_size < 4096
    assert additions.libraries_of(program) == []


def test_added_files_are_there_and_belong_to_root(image: Path) -> None:
    assert debugfs(image, "cat /data/one") == "one\n"
    assert debugfs(image, "cat /data/deep/file") == "deep\n"
    assert re.search(r"User: +0 +Group: +0", debugfs(image, "stat /data/one"))


def test_a_program_comes_with_its_libraries(image: Path) -> None:
    program = Path(sys.executable).resolve()
    libraries = additions.libraries_of(program)
    assert libraries
    for path in (program, *libraries):
        assert "Type: regular" in debugfs(image, f"stat {path}"), path


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert build_image.main(["--out", str(tmp_path / f"{name}.img"), "--size", "16M",
                                 "--initrd", str(tmp_path / f"{name}.gz")]) == 0
    assert (tmp_path / "a.img").read_bytes() == (tmp_path / "b.img").read_bytes()
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()


def test_times_follow_source_date_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1234567890")
    out = tmp_path / "root.img"
    assert build_image.main(["--out", str(out), "--size", "16M"]) == 0
    assert f"mtime: {1234567890:#x}" in debugfs(out, "stat /sbin/init")


def test_initramfs_has_the_tree_and_a_console(tmp_path: Path) -> None:
    out = tmp_path / "initramfs.cpio.gz"
    assert build_image.main(["--initrd", str(out)]) == 0
    archive = gzip.decompress(out.read_bytes())
    listed = subprocess.run(["busybox", "cpio", "-tv"], input=archive, capture_output=True,
                            check=True).stdout.decode()
    assert re.search(r"^crw------- .* dev/console$", listed, re.MULTILINE)
    assert re.search(r"^-rwxr-xr-x .* sbin/init$", listed, re.MULTILINE)
    assert re.search(r"^lrwxrwxrwx .* init -> sbin/init$", listed, re.MULTILINE)
    at = archive.index(b"dev/console\0") - 110  # the header: a magic and 13 fields of 8 digits
    assert [int(archive[at + 6 + 8 * field:][:8], 16) for field in (9, 10)] == [5, 1]
    unpacked = subprocess.run(["busybox", "cpio", "-i", "--to-stdout", "sbin/init"],
                              input=archive, capture_output=True, check=True).stdout
    assert unpacked == busybox_tree.INIT.read_bytes()


def test_a_failed_build_leaves_the_old_image_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "root.img"
    out.write_text("old")
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.write(os.urandom(9 << 20))
    assert build_image.main(["--out", str(out), "--size", "8M", "--add", f"{large}:/large"]) == 1
    assert out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "root.img"]
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("option", ["--add", "--with-program"])
def test_a_missing_file_is_named_in_one_line(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = f"{tmp_path}/absent" + (":/absent" if option == "--add" else "")
    assert build_image.main(["--out", str(tmp_path / "x"), option, value]) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path}/absent" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("text", ["file", "file:relative", ":/dst", "a:/../up"])
def test_what_is_added_is_a_pair(text: str) -> None:
    with pytest.raises(ConfigError, match="is not SRC:DST with an absolute DST"):
        additions.parse_added(text)


def test_the_programs_in_the_package_are_those_of_the_source(tmp_path: Path) -> None:
    """Byte for byte, if this host has the compiler that made them."""
    exit_programs.build(tmp_path)
    version = subprocess.run(["gcc", "--version"], capture_output=True, text=True, check=True)
    for program in busybox_tree.PROGRAMS:
        built = (tmp_path / program.name).read_bytes()
        assert built[:4] == b"\x7fELF"
        if version.stdout.startswith(f"{exit_programs.COMPILER}\n"):
            assert built == program.read_bytes(), f"run {exit_programs.__file__}"
