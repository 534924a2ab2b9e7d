"""From a Debian package to a kernel in the cache, without a network: apt and dpkg are scripts."""

from __future__ import annotations

import gzip
import lzma
import os
import stat
import struct
import threading
from pathlib import Path

import pytest

from pyvmm.errors import HostError
from pyvmm.lab import kernel

ELF = b"\x7fELF" + bytes(range(200))
NAME = "linux-image-6.1.0-1-amd64"

APT_CACHE = f"""\
#!/bin/sh
[ -e "$TOOLS/known" ] || exit 0
case $1 in
  depends) echo linux-image-amd64; echo "  Depends: {NAME}" ;;
  show) printf 'Package: {NAME}\\nVersion: 6.1.1-2\\nSize: 70000000\\n' ;;
esac
"""
APT_GET = """\
#!/bin/sh
echo "$*" >>"$TOOLS/log"
case $1 in
  update) touch "$TOOLS/known" "$TOOLS/fresh" ;;
  download) [ -e "$TOOLS/fresh" ] || { echo "E: 404  Not Found" >&2; exit 100; }; echo >p.deb ;;
esac
"""
DPKG = """\
#!/bin/sh
cp -r "$TOOLS/package" "$3"
"""


def bz_image(payload: bytes) -> bytes:
    """The least that has a payload: one boot sector, one setup sector, 8 bytes of code."""
    image = bytearray(1024)
    image[0x1F1] = 1
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", image, 0x248, 8, len(payload))
    return bytes(image) + bytes(8) + payload


def module(depends: str) -> bytes:
    return b"\x7fELF...\0license=GPL\0depends=" + depends.encode() + b"\0name=x\0"


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of scripts named as apt and dpkg; touch ``known`` and ``fresh`` in it."""
    directory = tmp_path / "tools"
    root = directory / "package"
    (root / "boot").mkdir(parents=True)
    (root / "boot" / "vmlinuz-6.1.0-1-amd64").write_bytes(bz_image(lzma.compress(ELF)))
    for path, depends in {
        "fs/9p/9p.ko": "9pnet,netfs",
        "fs/netfs/netfs.ko": "",
        "net/9p/9pnet.ko": "",
        "net/9p/9pnet_virtio.ko": "9pnet",
        "arch/x86/kvm/kvm-amd.ko": "kvm",
        "arch/x86/kvm/kvm.ko": "irqbypass",
        "virt/lib/irqbypass.ko": "",
        "drivers/char/virtio_console.ko": "",
        "drivers/net/unrelated.ko": "",
    }.items():
        file = root / "lib/modules/6.1.0-1-amd64/kernel" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(module(depends))
    for name, text in (("apt-cache", APT_CACHE), ("apt-get", APT_GET), ("dpkg", DPKG)):
        (directory / name).write_text(text)
        (directory / name).chmod(0o755)
    monkeypatch.setenv("TOOLS", str(directory))
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return directory


def apt_log(tools: Path) -> list[str]:
    log = tools / "log"
    return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []


def as_user(monkeypatch: pytest.MonkeyPatch, uid: int) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)


def test_builds_vmlinux_and_modules_in_load_order(tools: Path, tmp_path: Path) -> None:
    (tools / "known").touch()
    (tools / "fresh").touch()
    said: list[str] = []
    built = kernel.obtain(tmp_path / "cache", said.append)
    assert built.vmlinux.read_bytes() == ELF
    names = [path.name[3:-3] for path in built.modules]
    assert sorted(names) == sorted(
        ["virtio_console", "9pnet", "9pnet_virtio", "netfs", "9p", "irqbypass", "kvm", "kvm_amd"]
    )
    for first, then in (("9pnet", "9pnet_virtio"), ("netfs", "9p"), ("kvm", "kvm_amd")):
        assert names.index(first) < names.index(then)
    assert said[0] == f"downloading {NAME} 6.1.1-2 (70 MB)..."
    assert apt_log(tools) == ["download"]
    again = kernel.obtain(tmp_path / "cache", said.append)
    assert again == built
    assert apt_log(tools) == ["download"], "the second use takes it from the cache"
    kept = {path.name for path in (tmp_path / "cache").iterdir()}
    assert kept == {"lab.lock", built.vmlinux.parent.name}
    assert {path.name for path in built.vmlinux.parent.iterdir()} == {"vmlinux", "modules"}
    assert stat.S_IMODE(built.vmlinux.parent.stat().st_mode) == 0o755


def test_root_refreshes_absent_lists(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_user(monkeypatch, 0)
    said: list[str] = []
    kernel.obtain(tmp_path / "cache", said.append)
    assert apt_log(tools) == ["update", "download"]
    assert "running apt-get update" in said[0]


def test_root_refreshes_lists_that_point_to_a_package_long_gone(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_user(monkeypatch, 0)
    (tools / "known").touch()
    kernel.obtain(tmp_path / "cache", lambda line: None)
    assert apt_log(tools) == ["download", "update", "download"]


def test_others_are_told_the_command_for_absent_lists(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_user(monkeypatch, 1000)
    with pytest.raises(HostError, match=r"no package linux-image-amd64; run: sudo apt-get update"):
        kernel.obtain(tmp_path / "cache", lambda line: None)
    assert apt_log(tools) == []


def test_a_failed_download_says_why_and_leaves_nothing(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_user(monkeypatch, 1000)
    (tools / "known").touch()
    with pytest.raises(HostError, match=r"E: 404  Not Found; .*run: sudo apt-get update"):
        kernel.obtain(tmp_path / "cache", lambda line: None)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["lab.lock"]


def test_without_apt_it_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_user(monkeypatch, 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="apt-get is missing"):
        kernel.obtain(tmp_path / "cache", lambda line: None)


def test_racing_runs_build_once_and_all_succeed(tmp_path: Path) -> None:
    builds: list[str] = []
    first_is_building = threading.Event()
    finish = threading.Event()

    def build(work: Path, say: kernel.Say) -> str:
        builds.append(work.name)
        first_is_building.set()
        assert finish.wait(30)
        (work / "vmlinux").write_bytes(ELF)
        (work / "modules").mkdir()
        return "1.0"

    got: list[kernel.Kernel] = []
    waiting = threading.Event()

    def second_says(line: str) -> None:
        assert "waiting" in line
        waiting.set()

    first = threading.Thread(
        target=lambda: got.append(kernel.obtain(tmp_path, lambda line: None, build))
    )
    second = threading.Thread(
        target=lambda: got.append(kernel.obtain(tmp_path, second_says, build))
    )
    first.start()
    assert first_is_building.wait(30)
    second.start()
    assert waiting.wait(30)
    finish.set()
    first.join()
    second.join()
    assert len(builds) == 1
    assert got[0] == got[1]
    assert got[0].vmlinux.read_bytes() == ELF


def test_a_failed_build_leaves_the_cache_usable_and_clears_what_a_killed_one_left(
    tmp_path: Path,
) -> None:
    (tmp_path / "lab-building-killed" / "deep").mkdir(parents=True)

    def fails(work: Path, say: kernel.Say) -> str:
        (work / "half").touch()
        raise HostError("no")

    with pytest.raises(HostError, match="no"):
        kernel.obtain(tmp_path, lambda line: None, fails)
    assert [path.name for path in tmp_path.iterdir()] == ["lab.lock"]


def test_an_unusable_cache_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match=rf"cannot build its kernel in {tmp_path}/file/cache"):
        kernel.obtain(tmp_path / "file" / "cache", lambda line: None)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"PYVMM_CACHE": "/c"}, "/c"),
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/pyvmm"),
        ({"HOME": "/h"}, "/h/.cache/pyvmm"),
    ],
)
def test_cache_directory(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYVMM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert kernel.cache_directory() == Path(expected)


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, bytes])
def test_extracts_the_elf_kernel(pack: type[bytes]) -> None:
    # The build appends the unpacked length to what it compressed.
    assert kernel.extract_vmlinux(bz_image(pack(ELF) + struct.pack("<I", 204)))[:204] == ELF


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        (b"", "not a bzImage"),
        (bytes(4096), "not a bzImage"),
        (bz_image(b"MZ something else"), "no ELF image"),
    ],
)
def test_refuses_what_is_no_kernel(image: bytes, problem: str) -> None:
    with pytest.raises(HostError, match=problem):
        kernel.extract_vmlinux(image)


def test_packed_modules_need_their_tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    as_user(monkeypatch, 1000)
    with pytest.raises(
        HostError,
        match=r"zstd is missing; run: sudo apt-get install -y --no-install-recommends zstd",
    ):
        kernel.decompress(b"\x28\xb5\x2f\xfd....")
