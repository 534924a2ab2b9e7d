"""Every way to name a root, on every kind of disk and file system that docs/kernels.md promises.

Debian's kernels boot with the initramfs of ``pyvmm kernel fetch``; each root says which it is.
"""

from __future__ import annotations

import pytest

from tests.support.guest import Run, boot
from tests.support.roots import DISKS, DOS_ID, FILE_SYSTEM_UUID, GPT_UUID, WANTED
from tests.support.stock import BACKPORTS, STABLE, stock_kernel

pytestmark = pytest.mark.kvm

def boot_root(append: str, name: str = STABLE) -> Run:
    """A boot of the kernel ``name`` as far as the init of the root that ``append`` names."""
    kernel = stock_kernel(name)
    disks = [word for disk in DISKS for word in ("--disk", f"{disk},snapshot")]
    return boot(
        "--initrd", kernel.initramfs, *disks, append=f"panic=-1 {append}", kernel=kernel.vmlinux,
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
def test_fault_45_every_root_boots(append: str, root: str, kind: str, name: str) -> None:
    run = boot_root(append, name)
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


def test_fault_45_what_is_there_names_partitions() -> None:
    run = boot_root(f"root=PARTUUID={GPT_UUID.format(9)} rootdelay=1")
    seen = run.console + run.messages
    assert run.status == 121, seen
    there = "vda vda1 vda2 vda3 vda4 vdb vdb1 vdb2 vdb4 vdb5 vdb6"
    assert f"no PARTUUID={GPT_UUID.format(9)} after 1 s; there are: {there}" in run.messages, seen
    called = run.lines("pyvmm-initramfs: ")
    assert f"vda3 is PARTUUID={GPT_UUID.format(3)} PARTLABEL=xfs root" in called, seen
    assert f"vdb6 is PARTUUID={DOS_ID}-06" in called, seen
