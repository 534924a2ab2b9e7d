"""What a run asks of its kernel, read from the command line as Linux reads it."""

from __future__ import annotations

import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.linux.formats import Compression
from pyvmm.linux.guest import Boot, Guest, describe
from pyvmm.linux.options import KernelConfig
from tests.support import disk_heads

DEVICES = "virtio_mmio.device=4K@0xd0000000:5"
EXT4 = disk_heads.file_system("ext4")


def guest_of(
    command_line: str = "root=/dev/vda", *disks: bytes, config: KernelConfig | None = None,
    acpi: bool = True, cpus: int = 1, initrd: bytes | None = None,
) -> Guest:
    """The guest with ``disks`` (one of ext4 if none are given) and its devices announced."""
    contents = disks or (EXT4,)
    return describe(
        Boot(
            command_line=f"{DEVICES} {command_line}", acpi=acpi, cpus=cpus, initrd=initrd,
            disks=len(contents), read_disk=lambda disk, at: contents[disk][at : at + 0x11000],
        ),
        config,
    )


def config(**options: str) -> KernelConfig:
    return KernelConfig(options, "test")


@pytest.mark.parametrize(("words", "console"), [
    ("", "ttyS0"), ("console=ttyS0", "ttyS0"), ("console=ttyS0,115200n8", "ttyS0"),
    ("console=ttyS0 console=hvc0", "hvc0"), ("console=hvc0 console=ttyS0", "ttyS0"),
    ("console=hvc0 console=tty1", "hvc0"), ("console=tty1", ""), ("console=ttyS1", ""),
    ("console=uart8250,io,0x3f8", "ttyS0"), ("console=", ""),
])
def test_the_console_that_counts(words: str, console: str) -> None:
    assert guest_of(f"root=/dev/vda {words}").console == console


@pytest.mark.parametrize(("words", "cpus"), [
    ("", 4), ("nosmp", 1), ("nolapic", 1), ("maxcpus=2", 2), ("maxcpus=0", 1), ("nr_cpus=8", 4),
    ("possible_cpus=3 maxcpus=2", 2), ("maxcpus=many", 4), ("maxcpus=" + "9" * 5000, 4),
])
def test_the_vcpus_that_the_kernel_is_to_use(words: str, cpus: int) -> None:
    assert guest_of(f"root=/dev/vda {words}", cpus=4).cpus == cpus


def test_acpi_and_the_command_line() -> None:
    assert (guest_of().acpi, guest_of().cmdline_devices) == (True, True)
    assert not guest_of("root=/dev/vda acpi=off").acpi
    assert guest_of("root=/dev/vda acpi=force").acpi
    assert not guest_of(acpi=False).acpi
    by_acpi = describe(Boot(command_line="root=/dev/vda"), None)
    assert (by_acpi.acpi, by_acpi.cmdline_devices, by_acpi.mistakes) == (True, False, ())


@pytest.mark.parametrize(("words", "disks"), [("root=/dev/vda", 1), ("console=hvc0", 0)])
def test_devices_that_are_not_announced_at_all(words: str, disks: int) -> None:
    guest = describe(Boot(command_line=f"{words} acpi=off", disks=disks), None)
    assert guest.mistakes == (
        "nothing tells the kernel of its devices: ACPI is off, and they are not on its command "
        "line (--discovery)",
    )


@pytest.mark.parametrize("name", ["ext2", "ext3", "ext4", "xfs", "btrfs", "iso9660", "squashfs"])
def test_the_roots_file_system_is_what_is_on_the_disk(name: str) -> None:
    head = disk_heads.file_system(name, "ZSTD")
    guest = guest_of("root=/dev/vdb", EXT4, head)
    assert (guest.file_system, guest.partitions, guest.mistakes) == (name, "", ())
    assert guest.squashfs == ("ZSTD" if name == "squashfs" else "")


def test_the_roots_file_system_may_be_named() -> None:
    assert guest_of("root=/dev/vda rootfstype=xfs").file_system == "xfs"
    assert guest_of("root=/dev/vda rootfstype=xfs,ext4").file_system == "ext4"
    assert guest_of("root=/dev/vda", b"").file_system is None


@pytest.mark.parametrize("words", ["root=/dev/nfs", "root=254:0", "root=fe00", "root=/dev/md0"])
def test_of_other_roots_nothing_is_known(words: str) -> None:
    guest = guest_of(words)
    assert (guest.file_system, guest.partitions, guest.mistakes) == (None, "", ())


@pytest.mark.parametrize(("disk", "table"), [
    (disk_heads.dos_disk(2, 2048, disk_heads.file_system("xfs")), "dos"),
    (disk_heads.gpt_disk(2, 2048, disk_heads.file_system("xfs")), "gpt"),
])
def test_a_root_on_a_partition(disk: bytes, table: str) -> None:
    guest = guest_of("root=/dev/vda2", disk)
    assert (guest.partitions, guest.file_system) == (table, "xfs")
    assert guest_of("root=/dev/vda3", disk).file_system is None


def test_a_root_on_a_partition_of_a_disk_that_cannot_be_looked_into() -> None:
    guest = guest_of("root=/dev/vda1", b"")
    assert (guest.partitions, guest.file_system, guest.mistakes) == ("any", None, ())


@pytest.mark.parametrize(("root", "table"), [
    ("PARTUUID=4f68bce3-e8cd-4db1-96e7-fbcaf984b709", "gpt"),
    ("PARTUUID=4f68bce3-e8cd-4db1-96e7-fbcaf984b709/PARTNROFF=1", "gpt"),
    ("PARTUUID=6c1b2c8d-02", "dos"), ('"PARTLABEL=my root"', "gpt"),
])
def test_a_partition_by_its_name(root: str, table: str) -> None:
    guest = guest_of(f"root={root}", b"")
    assert (guest.partitions, guest.mistakes) == (table, ())


@pytest.mark.parametrize("root", ["UUID=0a-1b", "LABEL=root"])
def test_what_only_an_initramfs_finds(root: str) -> None:
    (mistake,) = guest_of(f"root={root}").mistakes
    assert "is for an initramfs to find" in mistake
    assert guest_of(f"root={root}", b"", initrd=b"070701").mistakes == ()


def test_no_root_at_all() -> None:
    (mistake,) = guest_of("ro").mistakes
    assert mistake.startswith("the command line has no root=")
    assert guest_of("ro", initrd=b"070701").mistakes == ()
    assert describe(Boot(disks=0), None).mistakes == ()


@pytest.mark.parametrize("root", ["/dev/vdb", "/dev/vdz", "/dev/vdaa", "/dev/vd", "/dev/vdA"])
def test_a_root_that_is_none_of_the_disks(root: str) -> None:
    (mistake,) = guest_of(f"root={root}").mistakes
    assert mistake == f"root={root} is not there: root= and --disk must name it (vda)"


def test_the_last_root_counts() -> None:
    assert guest_of("root=/dev/vdz root=/dev/vda").mistakes == ()
    assert guest_of("root=/dev/vda -- root=/dev/vdz").mistakes == ()


@pytest.mark.parametrize(("initrd", "compression", "is_ram_disk"), [
    (None, None, False),
    (b"070701", Compression.NONE, False),
    (gzip.compress(b"070701", mtime=0), Compression.GZIP, False),
    (disk_heads.file_system("squashfs"), Compression.NONE, True),
    (disk_heads.file_system("ext2"), Compression.NONE, True),
    (b"", Compression.NONE, False),
])
def test_the_initrd(initrd: bytes | None, compression: Compression, is_ram_disk: bool) -> None:
    guest = guest_of(initrd=initrd)
    assert (guest.initrd_compression, guest.is_ram_disk) == (compression, is_ram_disk)


def test_an_initramfs_that_is_built_in() -> None:
    built_in = guest_of("ro", config=config(INITRAMFS_SOURCE='"/src/initramfs.cpio"'))
    assert (built_in.initrd_compression, built_in.mistakes) == (Compression.NONE, ())
    none = guest_of("ro", config=config(INITRAMFS_SOURCE='""'))
    assert none.initrd_compression is None


def test_a_command_line_that_is_built_in() -> None:
    text = '"root=/dev/vda acpi=off"'
    assert guest_of("ro", config=config(CMDLINE_BOOL="y", CMDLINE=text)).mistakes == ()
    assert not guest_of("ro", config=config(CMDLINE_BOOL="y", CMDLINE=text)).acpi
    assert guest_of("ro acpi=on", config=config(CMDLINE_BOOL="y", CMDLINE=text)).acpi
    assert guest_of("root=/dev/vda", config=config(CMDLINE=text)).acpi
    alone = config(CMDLINE_BOOL="y", CMDLINE=text, CMDLINE_OVERRIDE="y")
    assert not guest_of("acpi=on", config=alone).acpi
    (mistake,) = guest_of("acpi=on", config=alone).mistakes
    assert mistake.startswith("nothing tells the kernel of its devices")


def test_devtmpfs() -> None:
    assert guest_of("root=/dev/vda devtmpfs.mount=1").mounts_devtmpfs
    assert not guest_of("root=/dev/vda devtmpfs.mount=0").mounts_devtmpfs
    assert not guest_of().mounts_devtmpfs


@given(st.text(max_size=80), st.binary(max_size=700), st.sampled_from(["root=/dev/vda", "root="]))
def test_nothing_is_too_odd(text: str, disk: bytes, root: str) -> None:
    guest_of(f"{root}{text}", bytes(510) + b"\x55\xaaEFI PART" + disk)
    guest_of(text, config=config(CMDLINE_BOOL="y", CMDLINE=f'"{text}"'))


@pytest.mark.parametrize(("words", "is_named"), [
    ("console=hvc0 console=ttyS0", True), ("console=hvc0", True), ("console=ttyS0", False),
    ("", False), ("hvc0", False),
])
def test_whether_hvc0_is_named(words: str, is_named: bool) -> None:
    assert guest_of(f"root=/dev/vda {words}").names_hvc0 is is_named
