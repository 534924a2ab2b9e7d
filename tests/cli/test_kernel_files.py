"""``pyvmm kernel fetch`` of files, what ``--out`` leaves, and how ``run`` takes it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyvmm.cli.main import main
from tests.support import deb_packages
from tests.support.deb_packages import RELEASE, VERSION
from tests.support.kernels import bzimage


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ubuntu's package of a kernel, its modules beside it."""
    monkeypatch.setenv("PYVMM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "debs").mkdir()
    return [deb_packages.build(found, tmp_path / "debs") for found in deb_packages.ubuntu()][1]


def test_out_has_all_that_run_needs(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "kernel"
    assert main(["kernel", "fetch", str(package), "--out", str(out), "--modules"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"version    {VERSION} (Linux {RELEASE})",
        f"kernel     {out}/vmlinuz-{RELEASE}",
        f"vmlinux    {out}/vmlinux-{RELEASE}",
        f"config     {out}/config-{RELEASE}",
        f"initramfs  {out}/initramfs-{RELEASE}.cpio.gz",
        f"modules    {out}/lib/modules/{RELEASE}",
        f"boot it    pyvmm run --kernel {out} --disk root.img",
    ]
    assert (out / f"lib/modules/{RELEASE}/modules.dep").exists()
    again = sorted(os.listdir(out))
    assert main(["kernel", "fetch", str(package), "--out", str(out)]) == 0
    assert sorted(os.listdir(out)) == again
    # Its kernel is none, but the initramfs beside it was found.
    assert main(["run", "--kernel", str(out)]) == 125
    err = capsys.readouterr().err.splitlines()
    assert err[-2] == (f"pyvmm: --kernel {out}: booting {out}/vmlinuz-{RELEASE} with "
                       f"{out}/initramfs-{RELEASE}.cpio.gz")


def test_out_with_another_kernel_is_refused(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "vmlinuz-5.0").touch()
    assert main(["kernel", "fetch", str(package), "--out", str(tmp_path)]) == 125
    assert f"--out {tmp_path}: has another kernel, vmlinuz-5.0; " in capsys.readouterr().err


@pytest.mark.parametrize(("argv", "words"), [
    (["ubuntu", "--backports"], "--backports: is for debian"),
    (["FILE", "--version", "1"], "--version: is for debian, ubuntu or a directory"),
])
def test_options_that_do_not_fit(
    argv: list[str], words: str, package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(package) if word == "FILE" else word for word in argv]
    assert main(["kernel", "fetch", *argv]) == 125
    assert words in capsys.readouterr().err


def test_run_in_a_kernel_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "arch/x86/boot").mkdir(parents=True)
    (tmp_path / "Makefile").touch()
    assert main(["run", "--kernel", "."]) == 125
    assert capsys.readouterr().err == (
        "pyvmm: .: is a kernel tree in which no arch/x86/boot/bzImage is built; run: "
        "pyvmm kernel build .\n"
    )
    (tmp_path / "arch/x86/boot/bzImage").write_bytes(bzimage())
    assert main(["run", "--kernel", ".", "--initrd", "none"]) == 125
    assert capsys.readouterr().err.splitlines() == [
        "pyvmm: --kernel .: booting ./arch/x86/boot/bzImage", "pyvmm: none: cannot open: "
        "No such file or directory",
    ]


@pytest.mark.parametrize(("release", "word"), [
    ({"ID": "debian"}, "debian"), ({"ID": "ubuntu", "ID_LIKE": "debian"}, "ubuntu"),
    ({"ID": "linuxmint", "ID_LIKE": "ubuntu debian"}, "ubuntu"), ({"ID": "fedora"}, "FILE.deb"),
])
def test_run_without_a_word_says_how_to_begin(
    release: dict[str, str], word: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("platform.freedesktop_os_release", lambda: release)
    assert main(["run"]) == 125
    lines = capsys.readouterr().err.splitlines()
    assert lines[1:4] == [
        f"  pyvmm kernel fetch {word} --out kernel",
        "  pyvmm image build --busybox root.img",
        "  pyvmm run --kernel kernel --disk root.img --append pyvmm.shell",
    ]
