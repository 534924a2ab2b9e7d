"""Every way to name a root, on every kind of disk and file system that docs/kernels.md promises.

Debian's kernels boot with the initramfs of ``pyvmm kernel fetch``; each root says which it is.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.guest import Run, boot
from tests.support.roots import make_disk, make_file_system, make_tree
from tests.support.stock import BACKPORTS, STABLE, stock_kernel

pytestmark = pytest.mark.kvm

GPT_UUID = "0fc63daf-8483-4772-8e79-3d69d8477d{:02x}"
FILE_SYSTEM_UUID = "70797669-6d6d-4000-8000-0000000000{:02x}"
DOS_ID = "0badc0de"
GPT = {1: "ext4", 2: "squashfs", 3: "xfs", 4: "btrfs"}
DOS = {1: "btrfs", 2: "xfs", 5: "squashfs", 6: "ext4"}
GPT_TABLE = "label: gpt\n" + "\n".join(
    f'size={size}MiB, uuid={GPT_UUID.format(number).upper()}, name="{GPT[number]} root"'
    for number, size in ((1, 16), (2, 16), (3, 304), (4, 128))
)
DOS_TABLE = f"""\
label: dos
label-id: 0x{DOS_ID}
1 : size=128MiB, type=83
2 : size=304MiB, type=83
4 : size=100MiB, type=5
5 : size=16MiB, type=83
6 : size=16MiB, type=83
"""


WANTED = {
    "/dev/vda": "/dev/vda", "/dev/vdb6": "/dev/vdb6", "/dev/vdc": "",
    f"UUID={FILE_SYSTEM_UUID.format(0x11)}": "/dev/vda1",
    f"UUID={FILE_SYSTEM_UUID.format(0x22)}": "/dev/vdb2",
    f"UUID={FILE_SYSTEM_UUID.format(0x14)}": "/dev/vda4",
    "LABEL=gpt3": "/dev/vda3", "LABEL=dos1": "/dev/vdb1", "LABEL=dos6": "/dev/vdb6",
    f"PARTUUID={GPT_UUID.format(3).upper()}": "/dev/vda3",
    f"PARTUUID={GPT_UUID.format(1)}/PARTNROFF=3": "/dev/vda4",
    f"PARTUUID={GPT_UUID.format(9)}": "",
    f"PARTUUID={DOS_ID.upper()}-01": "/dev/vdb1",
    f"PARTUUID={DOS_ID}-06": "/dev/vdb6",
    f"PARTUUID={DOS_ID}-05/PARTNROFF=-3": "/dev/vdb2",
    "PARTLABEL=btrfs root": "/dev/vda4",
    "254:3": "/dev/vda3", "fe12": "/dev/vdb2", "254:99": "",
}
"""Where each root is; asked on both kernels, of which one says itself what PARTUUIDs there are."""


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One with a GPT, /dev/vda, and one with an MBR, /dev/vdb; a root on each partition."""
    folder = tmp_path_factory.mktemp("roots")
    made = []
    for table, text, kinds in (("gpt", GPT_TABLE, GPT), ("dos", DOS_TABLE, DOS)):
        files = {}
        for number, kind in kinds.items():
            name = f"{table}{number}"
            wanted = list(WANTED) if name in ("gpt1", "gpt2") else []
            tree = make_tree(folder / f"{name}.tree", name, wanted)
            files[number] = folder / name
            uuid = FILE_SYSTEM_UUID.format(number + (0x10 if table == "gpt" else 0x20))
            make_file_system(files[number], kind, tree, label=name, uuid=uuid)
        made.append(make_disk(folder / f"{table}.img", text, files))
    return made[0], made[1]


def boot_root(disks: tuple[Path, Path], append: str, name: str = STABLE) -> Run:
    """A boot of the kernel ``name`` as far as the init of the root that ``append`` names."""
    kernel = stock_kernel(name)
    gpt, dos = disks
    # The base model has no AVX, with which btrfs's modules try themselves, to the lab's ruin.
    return boot(
        "--initrd", kernel.initramfs, "--disk", f"{gpt},snapshot", "--disk", f"{dos},snapshot",
        "--cpu", "base", append=f"panic=-1 {append}", kernel=kernel.vmlinux,
    )


# In the lab a boot takes 6 s or more, and to load xfs or btrfs again as long: one of each.
@pytest.mark.parametrize(("append", "root", "kind", "name"), [
    ("root=/dev/vda2 rootwait find-all", "gpt2", "squashfs ro", STABLE),
    ('root="PARTLABEL=ext4 root" rw find-all', "gpt1", "ext4 rw", BACKPORTS),
    (f"root=PARTUUID={GPT_UUID.format(1).upper()}", "gpt1", "ext4 ro", STABLE),
    (f"root=PARTUUID={DOS_ID}-05/PARTNROFF=1 rw", "dos6", "ext4 rw", STABLE),
    (f"root=UUID={FILE_SYSTEM_UUID.format(0x22)}", "dos2", "xfs ro", STABLE),
    ("root=LABEL=gpt4 rw", "gpt4", "btrfs rw", STABLE),
    ("root=254:21 rootfstype=ext4,squashfs rootflags=noatime init=/bin/other-init", "dos5",
     "squashfs ro,noatime", STABLE),
])
def test_fault_45_every_root_boots(
    append: str, root: str, kind: str, name: str, disks: tuple[Path, Path]
) -> None:
    run = boot_root(disks, append, name)
    seen = run.console + run.messages
    assert run.status == 0, seen
    (said,) = run.lines("root is ")
    init = "/bin/other-init" if "init=" in append else "/sbin/init"
    assert said.startswith(f"{init} of {root}, "), seen
    assert f" / {kind}" in said, "its type, and ro or rw first among its options"
    assert "CONFIG_" not in run.messages
    if "find-all" in append:
        found = dict(line.split(" at ") for line in run.lines("found "))
        assert found == WANTED, seen


def test_fault_45_what_is_there_names_partitions(disks: tuple[Path, Path]) -> None:
    run = boot_root(disks, f"root=PARTUUID={GPT_UUID.format(9)} rootdelay=1")
    seen = run.console + run.messages
    assert run.status == 121, seen
    there = "vda vda1 vda2 vda3 vda4 vdb vdb1 vdb2 vdb4 vdb5 vdb6"
    assert f"no PARTUUID={GPT_UUID.format(9)} after 1 s; there are: {there}" in run.messages, seen
    called = run.lines("pyvmm-initramfs: ")
    assert f"vda3 is PARTUUID={GPT_UUID.format(3)} PARTLABEL=xfs root" in called, seen
    assert f"vdb6 is PARTUUID={DOS_ID}-06" in called, seen
