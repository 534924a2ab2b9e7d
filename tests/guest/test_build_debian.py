"""The Debian image: built from an archive of packages, which a fake mmdebstrap makes here."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from guest import build_debian
from pyvmm.errors import HostError
from pyvmm.linux.debian import StockKernel
from pyvmm.linux.host import tool_path

FILES = {"etc/shadow": (0o640, 0, 42), "usr/bin/su": (0o4755, 0, 0), "var/mail/x y": (0o600, 8, 8)}


def stock(folder: Path) -> StockKernel:
    return StockKernel(
        release="6.1.0-9", version="6.1-1", vmlinuz=folder, vmlinux=folder, config=folder,
        initramfs=folder,
    )


def archive(path: Path) -> Path:
    """A root as mmdebstrap packs it, with a device that nobody without root can unpack."""
    with tarfile.open(path, "w") as tar:
        for name in ("etc", "usr", "usr/bin", "var", "var/mail", "dev"):
            entry = tarfile.TarInfo(f"./{name}")
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        device = tarfile.TarInfo("./dev/null")
        device.type, device.devmajor, device.devminor = tarfile.CHRTYPE, 1, 3
        tar.addfile(device)
        for name, (mode, uid, gid) in FILES.items():
            entry = tarfile.TarInfo(f"./{name}")
            content = b"root:*:1::::::\n" if name == "etc/shadow" else b"x"
            entry.mode, entry.uid, entry.gid, entry.size = mode, uid, gid, len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def in_image(image: Path, command: str) -> str:
    return subprocess.run(
        ["debugfs", "-R", command, str(image)], capture_output=True, text=True, check=True,
        env={**os.environ, "PATH": tool_path()},
    ).stdout


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake mmdebstrap and depmod in front of this host's tools."""
    made = archive(tmp_path / "made.tar")
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, script in {
        "mmdebstrap": f'for word; do case $word in *.tar) cp {made} "$word"; esac; done',
        "depmod": ": >\"$2/usr/lib/modules/$3/modules.dep\"",
    }.items():
        (folder / name).write_text(f"#!/bin/sh\nset -e\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{tool_path()}")
    monkeypatch.setattr("pyvmm.linux.packages.known_mirror", lambda _: "http://mirror/")

    def unpack(_apt: object, _package: object, work: Path, _say: object) -> Path:
        module = work / "package/lib/modules/6.1.0-9/kernel/aesni.ko"
        module.parent.mkdir(parents=True)
        module.write_bytes(b"module")
        return work / "package"

    monkeypatch.setattr("pyvmm.linux.debian.unpack_image", unpack)
    monkeypatch.setattr("pyvmm.linux.packages.Apt.find", lambda *_: None)
    return folder


def test_the_image_has_what_is_in_the_archive_and_the_modules(tools: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    build_debian.build("bookworm", stock(tmp_path), work)
    assert [path.name for path in work.iterdir()] == ["debian.img"]
    image = work / "debian.img"
    for name, (mode, uid, gid) in FILES.items():
        said = in_image(image, f'stat "/{name}"')
        found = re.search(r"(?s)Mode: +(\d+).*?User: +(\d+) +Group: +(\d+)", said)
        assert found is not None, said
        assert [int(found[1], 8), int(found[2]), int(found[3])] == [mode, uid, gid], name
    assert in_image(image, "cat /etc/shadow").startswith("root::")
    assert in_image(image, "cat /etc/hostname") == "pyvmm\n"
    modules = in_image(image, "ls -p /usr/lib/modules/6.1.0-9")
    assert "modules.dep" in modules
    assert "kernel" in modules


def test_missing_packages_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyvmm.linux.host.tool_path", lambda: str(tmp_path))
    with pytest.raises(HostError, match=r"mke2fs is missing; run: .*apt-get install .* e2fsprogs"):
        build_debian.build("bookworm", stock(tmp_path), tmp_path)


def test_it_runs_as_a_script_without_an_installed_pyvmm() -> None:
    script = Path(build_debian.__file__)
    done = subprocess.run(
        [sys.executable, "-I", str(script), "--help"], capture_output=True, text=True, check=True
    )
    assert "Debian and systemd" in done.stdout
