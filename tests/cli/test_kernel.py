"""``pyvmm kernel`` as a user meets it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pyvmm.cli.first_look import config_cache_path
from pyvmm.cli.main import main
from pyvmm.linux import debian
from pyvmm.linux.cache import Say
from pyvmm.linux.config_cache import recall
from pyvmm.linux.debian import StockKernel
from tests.support.guest import KERNEL
from tests.support.kernels import COMPLETE_CONFIG as COMPLETE
from tests.support.kernels import bzimage, elf, lacking, note_segment, pvh_note


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of these tests."""
    path = tmp_path / "cache"
    monkeypatch.setenv("PYVMM_CACHE", str(path))
    return path


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "bzImage"
    path.write_bytes(bzimage())
    return path


def inspect(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit status and output of ``pyvmm kernel inspect``."""
    status = main(["kernel", "inspect", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert err == ""
    return status, out


def with_config(kernel: Path, text: str) -> None:
    (kernel.parent / "config-6.1.0-synthetic").write_text(text)


def test_facts_of_a_bzimage(kernel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = inspect(capsys, kernel)
    facts = dict(re.findall(r"^(\w+(?: \w+)*)  +(.*)$", out, re.MULTILINE))
    assert status == 0
    assert facts == {
        "format": "bzImage, 0.0 MiB",
        "version": "6.1.0-synthetic",
        "boot protocol": "2.15",
        "compression": "none",
        "load address": "0x200000",
        "needs RAM": "1.0 MiB, up to 0x300000",
        "entry": "64-bit Linux entry at 0x200200",
        "initrd": "up to 0x7fffffff",
        "command line": "up to 2047 bytes",
        "config": "not known",
        "boots here": "not known: its header says nothing of a payload; "
                      "and no configuration lies beside it (--config FILE)",
    }


def test_the_entry_of_a_vmlinux(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "vmlinux"
    path.write_bytes(elf())
    assert "64-bit Linux entry at 0x200000" in inspect(capsys, path)[1]
    path.write_bytes(elf(note_segment(pvh_note(0x200100)), *[]) + b"")
    assert main(["kernel", "inspect", str(path)]) == 125, "nothing to load"


def test_a_kernel_that_can(kernel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_config(kernel, COMPLETE)
    status, out = inspect(capsys, kernel)
    assert status == 0
    assert "\nboots here     yes, from a disk of ext4, without an initramfs\n" in out
    assert not re.search(r"^(missing|module)", out, re.MULTILINE)


@pytest.mark.slow  # and needs build/bzImage
def test_our_own_kernel_can_and_has_its_configuration_inside(
    capsys: pytest.CaptureFixture[str]
) -> None:
    status, out = inspect(capsys, KERNEL)
    assert status == 0
    assert "\nconfig         in the kernel (IKCONFIG)\n" in out
    assert "\nboots here     yes, from a disk of ext4, without an initramfs\n" in out


@pytest.mark.parametrize("option", [
    "64BIT", "PRINTK", "TTY", "SERIAL_8250", "SERIAL_8250_CONSOLE", "SERIAL_8250_PNP", "BLOCK",
    "VIRTIO_MMIO", "PCI", "VIRTIO_BLK", "EXT4_FS", "BINFMT_ELF",
])
def test_what_every_boot_needs(
    kernel: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    """tests/cli/test_missing_options.py has all the options, and that ``run`` names them."""
    with_config(kernel, lacking(option))
    status, out = inspect(capsys, kernel)
    assert status == 1
    assert re.search(rf"^missing  .* {option} is not set$", out, re.MULTILINE)
    assert re.search(rf"^boots here +no: the kernel lacks CONFIG_{option} ", out, re.MULTILINE)


@pytest.mark.parametrize(("option", "title"), [
    ("BLK_DEV_INITRD", "with an initramfs"), ("RD_XZ", "with an initramfs"),
    ("VIRTIO_CONSOLE", "with console=hvc0"), ("SMP", "with --cpus 2"),
    ("ACPI", "with --discovery acpi"), ("X86_MPPARSE", "with --discovery cmdline or acpi=off"),
    ("EFI_PARTITION", "with the root on a partition"),
    ("XFS_FS", "with the root on another file system"),
])
def test_what_only_one_way_of_booting_needs(
    kernel: Path, capsys: pytest.CaptureFixture[str], option: str, title: str
) -> None:
    with_config(kernel, lacking(option))
    status, out = inspect(capsys, kernel)
    assert status == 0
    parts = dict(re.findall(r"^(.+):\n((?:.+\n)+)", out, re.MULTILINE))
    assert re.search(rf"^missing  .* {option} is not set$", parts[title], re.MULTILINE), out


@pytest.mark.parametrize("option", ["DEVTMPFS", "DEVTMPFS_MOUNT", "BINFMT_SCRIPT"])
def test_what_depends_on_the_image_is_a_note(
    kernel: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    with_config(kernel, lacking(option))
    status, out = inspect(capsys, kernel)
    assert status == 0
    assert re.search(rf"^note  .* {option} is not set$", out, re.MULTILINE)
    assert "\nboots here     yes, from a disk of ext4, without an initramfs\nnote  " in out
    assert re.search(rf"^note +the kernel lacks CONFIG_{option} \(", out, re.MULTILINE)


def test_modules_need_an_initramfs(kernel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    modular = COMPLETE.replace("VIRTIO_BLK=y", "VIRTIO_BLK=m").replace("EXT4_FS=y", "EXT4_FS=m")
    with_config(kernel, modular)
    status, out = inspect(capsys, kernel)
    assert status == 0
    assert "yes, with an initramfs that loads the modules of VIRTIO_BLK, EXT4_FS" in out
    assert re.search(r"^module   virtio-blk +VIRTIO_BLK=m$", out, re.MULTILINE)
    with_config(kernel, modular.replace("CONFIG_BLK_DEV_INITRD=y\n", ""))
    status, out = inspect(capsys, kernel)
    assert status == 1
    assert "boots here     no: the kernel lacks CONFIG_BLK_DEV_INITRD" in out


def test_a_config_can_be_named(
    kernel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "named"
    file.write_text(COMPLETE)
    assert f"config         {file}\n" in inspect(capsys, kernel, "--config", file)[1]
    assert recall(config_cache_path(kernel)) is None, "it may be another kernel's"


@pytest.mark.parametrize(("arguments", "problem"), [
    ([], "kernel: needs inspect, fetch or build"),
    (["look"], "look: is not known to"),
    (["fetch", "debain"], "did you mean debian?"),
    (["inspect"], "kernel inspect: needs FILE"),
    (["inspect", "/etc/passwd"], "/etc/passwd: not a Linux kernel"),
    (["inspect", "/nowhere"], "/nowhere: cannot open: No such file"),
])
def test_mistakes_are_one_line_and_125(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kernel", *arguments]) == 125
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pyvmm: ")
    assert err.count("\n") == 1
    assert problem in err


def test_fetch_prints_where_everything_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYVMM_CACHE", str(tmp_path))
    for name in ("vmlinuz", "vmlinux"):
        (tmp_path / name).write_text(name)
    (tmp_path / "config").write_text(lacking("VIRTIO_BLK"))
    asked: list[tuple[Path, bool, str | None]] = []

    def fetch(
        cache: Path, say: Say, *, backports: bool, version: str | None, with_modules: bool
    ) -> StockKernel:
        assert not with_modules
        asked.append((cache, backports, version))
        say("downloading...")
        return StockKernel(release="6.1", version="6.1-2", vmlinuz=cache / "vmlinuz",
                           vmlinux=cache / "vmlinux", config=cache / "config",
                           initramfs=cache / "initramfs")

    monkeypatch.setattr(debian, "fetch", fetch)
    assert main(["kernel", "fetch", "debian", "--backports", "--version", "6.1-2"]) == 0
    out, err = capsys.readouterr()
    assert asked == [(tmp_path, True, "6.1-2")]
    assert err == "pyvmm: downloading...\n"
    assert out.splitlines() == [
        "version    6.1-2 (Linux 6.1)",
        f"kernel     {tmp_path}/vmlinuz",
        f"vmlinux    {tmp_path}/vmlinux",
        f"config     {tmp_path}/config",
        f"initramfs  {tmp_path}/initramfs",
    ]
    for name in ("vmlinuz", "vmlinux"):
        found = recall(config_cache_path(tmp_path / name))
        assert found is not None
        assert found.state("VIRTIO_BLK") == "n"
