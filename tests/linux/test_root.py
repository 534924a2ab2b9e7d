"""Where root= points, and what is said of a root that is not there or not mounted."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.linux.file_systems import HEAD_BYTES
from pyvmm.linux.root import Root, find_root
from tests.support import disk_heads
from tests.support.disk_heads import file_system, put

EXT4, XFS = file_system("ext4"), file_system("xfs")
UUID = "0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9"
PARTUUID = "10111213-1415-1617-1819-1a1b1c1d1e1f"
"""Of every partition of ``gpt``, as a table of 16 times 0x10 to 0x1f, in that order, says it."""
ROOT_TYPE = bytes.fromhex("e3bc684fcde8b14d96e7fbcaf984b709")


def named(head: bytes, uuid: str = UUID, label: str = "my root") -> bytes:
    """An ext4 with a name."""
    data = bytearray(head)
    put(data, 0x468, bytes.fromhex(uuid.replace("-", "")))
    put(data, 0x478, label.encode().ljust(16, b"\0"))
    return bytes(data)


def gpt(*contents: bytes, root_type: int = 0, names: tuple[str, ...] = ()) -> bytes:
    """A disk whose partitions, of 1 MiB and one after the other, are ``contents``."""
    head = bytearray(disk_heads.gpt_disk(1, 2048))
    put(head, 1024, bytes(128 * 4))
    for index, _ in enumerate(contents):
        kind = ROOT_TYPE if index + 1 == root_type else bytes(range(16))
        uuid = bytes.fromhex("13121110151417161819") + bytes([0x1A, 0x1B, 0x1C, 0x1D, 0x1E])
        first = 2048 * (index + 1)
        name = (names[index] if index < len(names) else "").encode("utf-16-le")
        put(head, 1024 + 128 * index,
            kind + uuid + bytes([0x1F + index]) + first.to_bytes(8, "little")
            + (first + 2047).to_bytes(8, "little") + bytes(8) + name.ljust(72, b"\0"))
    disk = bytes(head)
    for index, content in enumerate(contents):
        disk = disk.ljust(2048 * 512 * (index + 1), b"\0") + content
    return disk.ljust(2048 * 512 * (len(contents) + 1), b"\0")


def root_of(root: str, *disks: bytes, has_initrd: bool = False, version: str = "") -> Root:
    return find_root(
        root, len(disks), lambda disk, at: disks[disk][at : at + HEAD_BYTES],
        has_initrd=has_initrd, version=version,
    )


def mistake_of(root: str, *disks: bytes, has_initrd: bool = False, version: str = "") -> str:
    return root_of(root, *disks, has_initrd=has_initrd, version=version).mistake


LVM = bytes(512) + b"LABELONE".ljust(24, b"\0") + b"LVM2 001"
SWAP = bytes(0xFF6) + b"SWAPSPACE2"
VFAT = b"\xeb\x58\x90mkfs.fat".ljust(0x52) + b"FAT32   "


@pytest.mark.parametrize("has_initrd", [False, True])
@pytest.mark.parametrize(("disk", "said"), [
    (gpt(VFAT, EXT4), "(vda1 (vfat), vda2 (ext4)): its root is likely root=/dev/vda2"),
    (gpt(EXT4, EXT4, XFS, root_type=2), "its root is likely root=/dev/vda2"),
    (gpt(VFAT, LVM), "is a disk with partitions: vda1 (vfat), vda2 (LVM)"),
    (disk_heads.dos_disk(1, 2048, EXT4), "(vda1 (ext4)): its root is likely root=/dev/vda1"),
    (disk_heads.dos_disk(3, 2048, SWAP), "is a disk with partitions: vda3 (swap)"),
])
def test_fault_22_a_partitioned_disk_is_no_root(disk: bytes, said: str, has_initrd: bool) -> None:
    mistake = mistake_of("/dev/vda", disk, has_initrd=has_initrd)
    assert mistake.startswith("root=/dev/vda is a disk with partitions")
    assert said in mistake


@pytest.mark.parametrize(("root", "disk", "said"), [
    ("/dev/vda3", gpt(VFAT, EXT4), "root=/dev/vda3 is not there: vda has vda1 (vfat), vda2 (ext4)"),
    ("/dev/vda1", EXT4, "vda has no partitions, it is all ext4 (root=/dev/vda)"),
    ("/dev/vda1", bytes(1 << 20), "root=/dev/vda1 is not there: vda has no partition table"),
    ("/dev/vda9" * 1, gpt(*[EXT4] * 3), "vda1 (ext4), vda2 (ext4), vda3 (ext4)"),
    ("/dev/vdb1", gpt(EXT4), "root=/dev/vdb1 is not there: root= and --disk must name it (vda)"),
    ("/dev/vda99999999999999999999", gpt(EXT4), "is not there: vda has vda1 (ext4)"),
])
def test_fault_22_a_partition_that_the_table_lacks(root: str, disk: bytes, said: str) -> None:
    for has_initrd in (False, True):
        assert said in mistake_of(root, disk, has_initrd=has_initrd)


@pytest.mark.parametrize("root", [f"PARTUUID={PARTUUID}", f"PARTUUID={PARTUUID.upper()}",
                                  "PARTLABEL=first", "/dev/vda1",
                                  f"PARTUUID={PARTUUID[:-2]}20/PARTNROFF=-1"])
def test_a_partition_is_found_by_every_name_of_it(root: str) -> None:
    found = root_of(root, gpt(XFS, EXT4, names=("first", "second")))
    assert found.place is not None
    assert (found.place.name, found.place.content, found.table) == ("vda1", "xfs", "gpt")
    assert found.mistake == ""


def test_a_dos_partition_is_found_by_its_uuid() -> None:
    disk = bytearray(disk_heads.dos_disk(2, 2048, XFS))
    put(disk, 440, bytes.fromhex("8d2c1b6c"))
    found = root_of("PARTUUID=6C1B2C8D-02", bytes(disk))
    assert found.place is not None
    assert (found.place.content, found.table) == ("xfs", "dos")
    assert "vda2 6c1b2c8d-02" in mistake_of("PARTUUID=6c1b2c8d-01", bytes(disk))


@pytest.mark.parametrize(("root", "said"), [
    ("PARTUUID=4f68bce3-e8cd-4db1-96e7-fbcaf984b709",
     f"is on none of the disks; there are: vda1 {PARTUUID}, vda2 {PARTUUID[:-2]}20"),
    ("PARTUUID=6c1b2c8d-02", "is on none of the disks"),
    ("PARTUUID=", "is on none of the disks"),
    ("PARTLABEL=root", "is on none of the disks; there are: vda1 first, vda2 second"),
    (f"PARTUUID={PARTUUID}/PARTNROFF=2", "vda has no partition 3"),
    (f"PARTUUID={PARTUUID}/PARTNROFF=x", "PARTNROFF= is not a number"),
])
def test_fault_27_a_partition_that_is_on_no_disk(root: str, said: str) -> None:
    disk = gpt(XFS, EXT4, names=("first", "second"))
    for has_initrd in (False, True):
        assert said in mistake_of(root, disk, has_initrd=has_initrd)
        assert mistake_of(root, disk, b"", has_initrd=has_initrd).count("none of the disks") == 0, \
            "a disk that cannot be looked into may have it"
    assert "vda, without a partition table" in mistake_of("PARTUUID=1-1", EXT4)


@pytest.mark.parametrize(("root", "said"), [
    (f"UUID={UUID[:-1]}0", f"is on none of the disks; there are: vda1 {UUID}, vda2"),
    ("LABEL=other", "is on none of the disks; there are: vda1 my root, vda2"),
    (f"/dev/disk/by-uuid/{UUID[:-1]}0", "is on none of the disks"),
    (f"UUID={UUID}", ""), (f"UUID={UUID.upper()}", ""), ("LABEL=my root", ""),
    ("UUID=ABCD-1234", ""),  # of a vfat, an ISO 9660: not read here
])
def test_fault_27_a_file_system_that_is_on_no_disk(root: str, said: str) -> None:
    disk = gpt(named(EXT4), SWAP)
    mistake = mistake_of(root, disk, has_initrd=True)
    assert (said in mistake) if said else (mistake == "")
    assert "is for an initramfs to find" in mistake_of(root, disk)
    for other in (b"", LVM.ljust(1 << 17, b"\0"), b"LUKS\xba\xbe".ljust(1 << 17, b"\1")):
        assert mistake_of(root, disk, other, has_initrd=True) == "", "there may be more behind it"


def block_sized(kind: str, size: int) -> bytes:
    head = bytearray(file_system(kind))
    shift = size.bit_length() - 1
    if kind.startswith("ext"):
        put(head, 0x418, (shift - 10).to_bytes(4, "little"))
    elif kind == "xfs":
        put(head, 4, size.to_bytes(4, "big"))
    elif kind == "btrfs":
        put(head, 0x10090, size.to_bytes(4, "little"))
    elif kind == "f2fs":
        put(head, 0x410, shift.to_bytes(4, "little"))
    else:
        head[0x40C] = shift
    return bytes(head)


@pytest.mark.parametrize(("kind", "since"), [
    ("ext2", "6.19"), ("ext3", "6.19"), ("ext4", "6.19"), ("xfs", "6.12"), ("btrfs", ""),
    ("f2fs", ""), ("erofs", ""),
])
def test_fault_27_blocks_larger_than_a_page(kind: str, since: str) -> None:
    assert mistake_of("/dev/vda", block_sized(kind, 4096)) == ""
    for size in (8192, 65536):
        mistake = mistake_of("/dev/vda", block_sized(kind, size), version="6.1.0-44-amd64 (x) #1")
        assert f"is {kind} with blocks of {size} bytes" in mistake
        assert mistake_of("/dev/vda1", gpt(block_sized(kind, size)))
        assert (f"before Linux {since} " in mistake) is bool(since)
        assert mistake_of("/dev/vda", block_sized(kind, size), version="")
        newer = mistake_of("/dev/vda", block_sized(kind, size), version=f"{since or '7.0'}.1")
        assert (newer == "") is bool(since)


def test_fault_27_what_mke2fs_makes(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(64 << 20))
    subprocess.run(["/sbin/mke2fs", "-q", "-F", "-t", "ext4", "-b", "65536", image], check=True,
                   capture_output=True)
    assert "is ext4 with blocks of 65536 bytes" in mistake_of("/dev/vda", image.read_bytes())
    subprocess.run(["/sbin/mke2fs", "-q", "-F", "-t", "ext4", image], check=True)
    assert mistake_of("/dev/vda", image.read_bytes()) == ""


def test_fault_27_features_that_no_linux_mounts() -> None:
    head = bytearray(EXT4)
    head[0x463] = 0x80
    assert "features that no Linux mounts (0x80000000)" in mistake_of("/dev/vda", bytes(head))


@pytest.mark.parametrize(("content", "alone", "helped"), [
    (LVM, "LVM, which only an initramfs opens", ""), (SWAP, ": swap", ": swap"),
    (b"LUKS\xba\xbe", "LUKS, which only an initramfs opens", ""),
    (bytes(1 << 17), "nothing but zeros", ""), (VFAT, "", ""), (b"\1" * 5000, "", ""),
])
def test_what_is_no_file_system(content: bytes, alone: str, helped: str) -> None:
    for has_initrd, said in ((False, alone), (True, helped)):
        mistake = mistake_of("/dev/vda1", gpt(content), has_initrd=has_initrd)
        assert (f"holds no file system to mount: {said.removeprefix(': ')}" in mistake) if said \
            else (mistake == "")


@given(
    root=st.text(max_size=20) | st.sampled_from(["/dev/vda", "/dev/vda1", "PARTUUID=0-1"])
    | st.builds("{}={}".format, st.sampled_from(["UUID", "LABEL", "PARTUUID", "PARTLABEL"]),
                st.text(max_size=40)),
    disk=st.binary(max_size=1500), has_initrd=st.booleans(), version=st.text(max_size=8),
)
def test_nothing_is_too_odd(root: str, disk: bytes, has_initrd: bool, version: str) -> None:
    for head in (disk, bytes(446) + disk[:64].ljust(64, b"\0") + b"\x55\xaaEFI PART" + disk, b""):
        mistake = mistake_of(root, head, has_initrd=has_initrd, version=version)
        assert len(mistake) < 2000


@pytest.mark.parametrize(("root", "meant"), [
    ("/dev/sda1", "/dev/vda1"), ("/dev/xvda1", "/dev/vda1"), ("/dev/hda1", "/dev/vda1"),
    ("/dev/nvme0n1p1", "/dev/vda1"), ("/dev/mmcblk0p1", "/dev/vda1"), ("vda1", "/dev/vda1"),
    ("sda1", "/dev/vda1"), ("/dev/sdb", "/dev/vdb"), ("/dev/nvme1n1", "/dev/vdb"),
    ("vdb", "/dev/vdb"),
])
def test_fault_27_a_disk_of_another_driver(root: str, meant: str) -> None:
    for has_initrd in (False, True):
        mistake = mistake_of(root, gpt(EXT4), XFS, has_initrd=has_initrd)
        assert mistake == (f"root={root} is not there: the disks here are /dev/vda, /dev/vdb; "
                           f"it is likely root={meant}")


@pytest.mark.parametrize(("root", "said"), [
    ("/dev/sda3", "it is not there: the disks here are /dev/vda; vda has vda1 (ext4)"),
    ("/dev/sdc1", "it is not there: the disks here are /dev/vda"),
    ("/dev/nvme7n1p2", "it is not there: the disks here are /dev/vda"),
    ("vda", "the disks here are /dev/vda; root=/dev/vda is a disk with partitions (vda1 (ext4)): "
            "its root is likely root=/dev/vda1"),
])
def test_fault_27_a_disk_of_another_driver_that_has_no_like_here(root: str, said: str) -> None:
    assert mistake_of(root, gpt(EXT4)).endswith(said.removeprefix("it "))


@pytest.mark.parametrize("root", ["/dev/sdaa1", "/dev/dm-0", "/dev/mapper/vg-root", "/dev/md0",
                                  "fe01", "254:1", "/dev/ram0", "/dev/nfs", "/dev/nvme"])
def test_what_may_be_there_without_us_is_not_judged(root: str) -> None:
    assert mistake_of(root, gpt(EXT4)) == ""


def test_fault_22_linux_takes_no_number_with_a_zero_in_front() -> None:
    """block/early-lookup.c, devt_from_devname: "*p == '0'" is no partition."""
    for root in ("/dev/vda01", "/dev/vda0", "/dev/vda001"):
        assert f"root={root} is not there: vda has vda1 (ext4)" in mistake_of(root, gpt(EXT4))


def of_4k_sectors() -> bytes:
    """A disk partitioned for sectors of 4096 bytes: an MBR that protects, a GPT at 4096."""
    disk = bytearray(gpt(EXT4))
    header = bytes(disk[512:1024])
    put(disk, 512, bytes(512))
    put(disk, 446, b"\0\0\2\0\xee\xff\xff\xff\1\0\0\0\xff\0\0\0")
    put(disk, 4096, header)
    return bytes(disk)


@pytest.mark.parametrize("root", ["/dev/vda", "/dev/vda1"])
def test_fault_22_an_mbr_that_protects_a_gpt_that_is_not_there(root: str) -> None:
    disk = of_4k_sectors()
    for has_initrd in (False, True):
        mistake = mistake_of(root, disk, has_initrd=has_initrd)
        assert "vda is partitioned for sectors of 4096 bytes, and has sectors of 512" in mistake
        damaged = disk[:4096] + bytes(512) + disk[4608:]
        mistake = mistake_of(root, damaged, has_initrd=has_initrd)
        assert "vda has a protective MBR, but no GPT" in mistake
    assert root_of("PARTUUID=00000000-01", disk).place is None


def test_fault_27_disks_of_windows() -> None:
    bitlocker = (b"\xeb\x58\x90-FVE-FS-").ljust(1 << 17, b"\1")
    assert "BitLocker, which only an initramfs opens" in mistake_of("/dev/vda", bitlocker)
    ntfs = (b"\xeb\x52\x90NTFS    ").ljust(1 << 17, b"\1")
    assert "is ntfs, as a disk of Windows" in mistake_of("/dev/vda1", gpt(ntfs))
