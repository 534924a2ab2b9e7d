"""What ``pyvmm run`` says of a root before the boot, of kernels of which nothing is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvmm.cli.main import main
from tests.support.disk_heads import file_system, gpt_disk
from tests.support.kernels import bzimage

EXT4 = file_system("ext4")


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYVMM_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "bzImage"
    path.write_bytes(bzimage())
    return path


def said(
    capfd: pytest.CaptureFixture[str], kernel: Path, disk: bytes, *options: str,
    disk_options: str = ",ro",
) -> str:
    """What a run says before its guest, which is no real kernel, does something or other."""
    image = kernel.with_name("disk.img")
    image.write_bytes(disk)
    main(["run", "--kernel", str(kernel), "--disk", f"{image}{disk_options}", "--console", "none",
          "--timeout", "1", *options])
    text = capfd.readouterr().err
    if "/dev/kvm" in text:
        pytest.skip("what is said before a boot needs a /dev/kvm")
    return text


@pytest.mark.bare
def test_fault_22_the_default_root_of_a_partitioned_image(
    capfd: pytest.CaptureFixture[str], kernel: Path
) -> None:
    disk = gpt_disk(1, 2048, EXT4)
    line = ("pyvmm: root=/dev/vda is a disk with partitions (vda1 (ext4)): its root is likely "
            "root=/dev/vda1\n")
    for options in ((), ("--append", "quiet")):
        for disk_options in (",ro", ",snapshot", ",ro,format=raw"):
            text = said(capfd, kernel, disk, *options, disk_options=disk_options)
            assert text.startswith(line), text
    for options in (("--append", "root=/dev/vda1"), ("--cmdline", "root=/dev/vda1")):
        assert "root=" not in said(capfd, kernel, disk, *options)
    assert "root=/dev/vda2 is not there: vda has vda1 (ext4)" in said(
        capfd, kernel, disk, "--append", "root=/dev/vda2"
    )


@pytest.mark.bare
def test_fault_27_a_root_that_is_on_no_disk(
    capfd: pytest.CaptureFixture[str], kernel: Path
) -> None:
    text = said(capfd, kernel, gpt_disk(1, 2048, EXT4), "--append", "root=PARTUUID=6c1b2c8d-02")
    assert "root=PARTUUID=6c1b2c8d-02 is on none of the disks; there are: vda1 13121110-" in text


@pytest.mark.bare
def test_fault_27_a_root_with_large_blocks(
    capfd: pytest.CaptureFixture[str], kernel: Path
) -> None:
    head = bytearray(EXT4)
    head[0x418] = 6
    assert "is ext4 with blocks of 65536 bytes; before Linux 6.19" in said(
        capfd, kernel, bytes(head)
    )
    assert "root=" not in said(capfd, kernel, EXT4)


@pytest.mark.bare
def test_fault_26_what_is_not_linux_is_not_told_of_roots(
    capfd: pytest.CaptureFixture[str], kernel: Path
) -> None:
    kernel.write_bytes(bzimage(version_text=b"Memtest86+ v6.10"))
    assert "root" not in said(capfd, kernel, gpt_disk(1, 2048, EXT4))


