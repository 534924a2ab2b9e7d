"""A directory in the place of a kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvmm.errors import ConfigError
from pyvmm.linux.kernel_directory import kernel_in


def touch(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return str(path)


def test_a_built_tree(tmp_path: Path) -> None:
    touch(tmp_path / "Makefile")
    image = touch(tmp_path / "arch/x86/boot/bzImage")
    assert kernel_in(str(tmp_path)) == (image, None)


def test_a_tree_that_is_not_built_says_the_command(tmp_path: Path) -> None:
    touch(tmp_path / "Makefile")
    touch(tmp_path / "arch/x86/Makefile")
    with pytest.raises(ConfigError, match=f"is built; run: pyvmm kernel build {tmp_path}$"):
        kernel_in(str(tmp_path))


def test_what_kernel_build_leaves(tmp_path: Path) -> None:
    image = touch(tmp_path / "bzImage")
    assert kernel_in(str(tmp_path)) == (image, None)


def test_what_kernel_fetch_leaves(tmp_path: Path) -> None:
    image = touch(tmp_path / "vmlinuz-6.1.0")
    touch(tmp_path / "initramfs-6.2.0.cpio.gz")
    assert kernel_in(str(tmp_path)) == (image, None), "another kernel's initramfs"
    initramfs = touch(tmp_path / "initramfs-6.1.0.cpio.gz")
    assert kernel_in(str(tmp_path)) == (image, initramfs)
    touch(tmp_path / "vmlinuz-6.2.0")
    with pytest.raises(ConfigError, match=r"choose one: vmlinuz-6\.1\.0, vmlinuz-6\.2\.0"):
        kernel_in(str(tmp_path))


def test_none_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^{tmp_path}: is a directory with no kernel in it"):
        kernel_in(str(tmp_path))
