"""The sources of an image's files beside archives: busybox, packages, and what is added."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyvmm.linux.host import tool_path
from pyvmm.linux.images.build import Made, Request, build
from tests.linux.images.test_build import make_tar, of_ext, run
from tests.support.guest import environment
from tests.support.patience import patient


def quiet(line: str) -> None:
    """For those who wait for nothing."""


def made(tmp_path: Path, **fields: object) -> Made:
    return build(Request(out=tmp_path / "out.img", **fields), quiet)  # type: ignore[arg-type]


@pytest.fixture
def mmdebstrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake one, which writes down its arguments; $SLEEP makes it slow."""
    folder = tmp_path / "bin"
    folder.mkdir()
    packed = make_tar(folder / "packed.tar")
    program = folder / "mmdebstrap"
    program.write_text(
        f'#!/bin/sh\necho "$@" >{folder}/asked\n'
        f'if [ -n "$SLEEP" ]; then touch {folder}/begun; sleep "$SLEEP"; fi\n'
        f'for word; do case $word in *.tar) cp {packed} "$word" ;; esac; done\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{tool_path()}")
    monkeypatch.setattr("pyvmm.linux.packages.known_mirror", lambda suite: f"http://m/{suite}")
    return folder


def test_packages_are_installed_from_the_hosts_mirror(mmdebstrap: Path, tmp_path: Path) -> None:
    found = made(tmp_path, suite="bookworm", include=("strace", "udev"))
    assert found.init == "/bin/sh"
    words = (mmdebstrap / "asked").read_text().split()
    assert "--include=systemd-sysv,udev,kmod,strace" in words
    assert words[-3:-2] + words[-1:] == ["bookworm", "http://m/bookworm"]
    image = tmp_path / "out.img"
    assert run("debugfs", "-R", "cat /etc/hostname", image) == "pyvmm\n"
    assert of_ext(image, "etc/hostname") == (0o644, 0, 0)
    assert of_ext(image, "etc/shadow") == (0o640, 0, 42)


def test_a_suite_that_the_host_does_not_know_is_mmdebstraps(
    mmdebstrap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyvmm.linux.packages.known_mirror", lambda suite: "")
    made(tmp_path, suite="noble")
    assert (mmdebstrap / "asked").read_text().split()[-1].endswith("tree.tar")
    made(tmp_path, suite="noble", mirror="http://mine", replaces=True)
    assert (mmdebstrap / "asked").read_text().split()[-1] == "http://mine"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing(
    number: int, status: int, mmdebstrap: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "pyvmm", "image", "build", "--debootstrap", "x", "--mirror", "m",
         "out.img"],
        cwd=work, env=environment() | {"SLEEP": "300"}, stderr=subprocess.DEVNULL,
    )
    end_s = time.monotonic() + patient(30)
    while not (mmdebstrap / "begun").exists() and time.monotonic() < end_s:
        time.sleep(0.02)
    assert len(os.listdir(work)) == 1, "where it works"
    process.send_signal(number)
    assert process.wait(patient(30)) in (status, -number)
    assert os.listdir(work) == []


def test_busybox_has_what_is_added_as_roots(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/one").write_text("1\n")
    (tmp_path / "file").write_text("file\n")
    made(tmp_path, is_busybox=True, programs=(Path(sys.executable).resolve(),), added=(
        (tmp_path / "data", "/srv/data"), (tmp_path / "file", "/root/"),
        (tmp_path / "file", "/etc/hostname"),
    ))
    image = tmp_path / "out.img"
    assert run("debugfs", "-R", "cat /srv/data/one", image) == "1\n"
    assert run("debugfs", "-R", "cat /root/file", image) == "file\n"
    assert run("debugfs", "-R", "cat /etc/hostname", image) == "file\n"
    assert of_ext(image, "srv/data") == (0o755, 0, 0)


def test_what_is_added_to_an_archive_goes_through_its_links(tmp_path: Path) -> None:
    """bin is a link to usr/bin there, and stays one."""
    make_tar(tmp_path / "r.tar")
    (tmp_path / "tool").write_text("tool\n")
    (tmp_path / "tool").chmod(0o700)
    made(tmp_path, tar=str(tmp_path / "r.tar"), added=(
        (tmp_path / "tool", "/bin/tool"), (tmp_path / "tool", "/new/deep/tool")))
    image = tmp_path / "out.img"
    assert of_ext(image, "usr/bin/tool") == (0o700, 0, 0)
    assert 'link dest: "usr/bin"' in run("debugfs", "-R", "stat /bin", image)
    assert of_ext(image, "new/deep") == (0o755, 0, 0)
    assert of_ext(image, "etc/shadow") == (0o640, 0, 42)
    run("e2fsck", "-fn", image)


def test_a_directory_with_additions_keeps_what_it_has(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/secret").write_text("s")
    (tree / "etc/secret").chmod(0o600)
    (tmp_path / "file").write_text("file\n")
    made(tmp_path, directory=tree, added=((tmp_path / "file", "/etc/file"),))
    image = tmp_path / "out.img"
    assert of_ext(image, "etc/secret") == (0o600, 0, 0)
    assert run("debugfs", "-R", "cat /etc/file", image) == "file\n"
    assert not (tree / "etc/file").exists(), "the directory itself is not touched"
