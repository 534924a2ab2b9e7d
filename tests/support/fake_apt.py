"""apt and dpkg as scripts, so that a package becomes a kernel in the cache without a network."""

from __future__ import annotations

import lzma
import os
import struct
from pathlib import Path

import pytest

ELF = b"\x7fELF" + bytes(range(200))
RELEASE = "6.1.0-1-amd64"
NAME = f"linux-image-{RELEASE}"

APT_CACHE = f"""\
#!/bin/sh
while [ "$1" = -o ]; do shift 2; done
echo "cache $*" >>"$TOOLS/asked"
[ -e "$TOOLS/known" ] || exit 100
for package; do :; done
case $1:$package in
  show:*=9*) exit 100 ;;
  show:linux-image-*-*-*-amd64* | show:linux-image-6*)
    printf 'Package: {NAME}\\nVersion: 6.1.1-2\\nSize: 70000000\\n' ;;
  show:busybox-static) printf 'Package: busybox-static\\nVersion: 1\\nSize: 900000\\n' ;;
  show:*) printf 'Package: meta\\nVersion: 6.1.1-2\\nDepends: {NAME} (= 6.1.1-2)\\nSize: 1500\\n' ;;
  madison:*) printf ' meta | 6.1.1-2 | http://mirror\\n meta | 6.1.0-1 | http://mirror\\n' ;;
esac
"""
APT_GET = """\
#!/bin/sh
while [ "$1" = -o ]; do
  case $2 in Dir::Etc::SourceList=*) cp "${2#*=}" "$TOOLS/sources" ;; esac
  shift 2
done
echo "$*" >>"$TOOLS/log"
case $1 in
  indextargets) echo "bookworm http://mirror.example/debian/" ;;
  update)
    [ ! -e "$TOOLS/offline" ] || { echo "E: no network" >&2; exit 100; }
    touch "$TOOLS/known" "$TOOLS/fresh" ;;
  download)
    [ -e "$TOOLS/fresh" ] || { echo "E: 404  Not Found" >&2; exit 100; }
    echo >"${3%%=*}_1_amd64.deb" ;;
esac
"""
DPKG = """\
#!/bin/sh
case $2 in
  */busybox*) mkdir -p "$3/bin" && cp "$TOOLS/busybox.bin" "$3/bin/busybox" ;;
  *) cp -r "$TOOLS/package" "$3" ;;
esac
"""
MODULES = {
    "fs/9p/9p.ko": "9pnet,netfs",
    "fs/netfs/netfs.ko": "",
    "net/9p/9pnet.ko": "",
    "net/9p/9pnet_virtio.ko": "9pnet",
    "arch/x86/kvm/kvm-amd.ko": "kvm",
    "arch/x86/kvm/kvm.ko": "irqbypass",
    "virt/lib/irqbypass.ko": "",
    "drivers/char/virtio_console.ko": "",
    "drivers/virtio/virtio_mmio.ko": "",
    "drivers/block/virtio_blk.ko": "",
    "crypto/crc32c_generic.ko": "",
    "fs/ext4/ext4.ko": "jbd2,mbcache",
    "fs/jbd2/jbd2.ko": "",
    "fs/mbcache.ko": "",
    "drivers/net/unrelated.ko": "",
}


def bz_image(payload: bytes) -> bytes:
    """The least that has a payload: one boot sector, one setup sector, 8 bytes of code."""
    image = bytearray(1024)
    image[0x1F1] = 1
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", image, 0x248, 8, len(payload))
    return bytes(image) + bytes(8) + payload


def module(depends: str) -> bytes:
    """What load_order looks for in a module."""
    return b"\x7fELF...\0license=GPL\0depends=" + depends.encode() + b"\0name=x\0"


def install(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the scripts and the package into ``directory``, and that in front of PATH.

    The file ``known`` in it makes apt know the package, ``fresh`` able to download it, ``offline``
    unable to update; ``log`` is what apt-get was called for.
    """
    root = directory / "package"
    (root / "boot").mkdir(parents=True)
    packed = lzma.compress(ELF) + struct.pack("<I", len(ELF))
    (root / "boot" / f"vmlinuz-{RELEASE}").write_bytes(bz_image(packed))
    (root / "boot" / f"config-{RELEASE}").write_text("CONFIG_64BIT=y\n")
    for path, depends in MODULES.items():
        file = root / "lib/modules" / RELEASE / "kernel" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(module(depends))
    (directory / "busybox.bin").write_bytes(b"a busybox")
    for name, text in (("apt-cache", APT_CACHE), ("apt-get", APT_GET), ("dpkg", DPKG)):
        (directory / name).write_text(text)
        (directory / name).chmod(0o755)
    monkeypatch.setenv("TOOLS", str(directory))
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")


def apt_log(directory: Path) -> list[str]:
    """What apt-get was called for, in order."""
    log = directory / "log"
    return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []
