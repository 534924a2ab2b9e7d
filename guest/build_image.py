#!/usr/bin/env python3
"""Build the test image: an ext4 disk (and, if asked, an initramfs) with busybox and guest/init.

    python3 guest/build_image.py --out build/root.img
    python3 guest/build_image.py --out build/fio.img --with-program /usr/bin/fio --size 256M
    python3 guest/build_image.py --initrd build/initramfs.cpio.gz

Needs no root; uses busybox-static, e2fsprogs and gcc.  Standard library only.  Two runs over the
same files give the same image: identifiers are fixed, times are SOURCE_DATE_EPOCH or a constant.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
INIT = HERE / "init"
PROGRAMS = tuple(HERE / "exit" / f"{name}.c" for name in ("pyvmm-exit", "pyvmm-mark"))
C_FLAGS = ("-Os", "-Wall", "-Wextra", "-Werror", "-static", "-nostdlib", "-ffreestanding",
           "-fno-pie", "-no-pie", "-fno-stack-protector", "-fcf-protection=none",
           "-fno-asynchronous-unwind-tables", "-Wl,--build-id=none,-z,noseparate-code,-s")
PACKAGES = {"busybox": "busybox-static", "mke2fs": "e2fsprogs", "debugfs": "e2fsprogs",
            "gcc": "gcc"}
TOOL_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
"""A user's PATH often lacks the directories where e2fsprogs lives."""

DEFAULT_SIZE = 64 << 20
MIN_SIZE = 8 << 20
BLOCK = 4096
UUID = "70797669-6d6d-4000-8000-000000000001"
DEFAULT_TIME = 1_700_000_000

DIRECTORIES = ("bin", "sbin", "usr/bin", "usr/sbin", "dev", "proc", "sys", "etc", "root", "run",
               "mnt", "tmp", "var/tmp")
STICKY = ("tmp", "var/tmp")
FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
    "etc/hostname": "pyvmm\n",
    "etc/hosts": "127.0.0.1 localhost pyvmm\n",
    "etc/profile": "export PS1='pyvmm:\\w\\$ '\n",
}


class ImageError(Exception):
    """The image cannot be built; the message says why and, where it can, what to type."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What goes into the image beside busybox, init and /etc.

    ``added`` are (file or directory on this machine, absolute path in the image); ``programs`` are
    programs of this machine, put at the same path together with the libraries they load.
    """

    added: Sequence[tuple[Path, str]] = ()
    programs: Sequence[Path] = ()


# ---- the tree ----------------------------------------------------------------------------------


def make_tree(root: Path, contents: Contents) -> None:
    """Fill the empty directory ``root`` with the image's files."""
    busybox = Path(find_tool("busybox")).resolve()
    if libraries_of(busybox):
        raise ImageError(f"{busybox} is dynamically linked; {install_hint(['busybox-static'])}")
    for name in DIRECTORIES:
        (root / name).mkdir(parents=True)
    for name in STICKY:
        (root / name).chmod(0o1777)
    for name, text in FILES.items():
        (root / name).write_text(text)
    _copy(busybox, root / "bin/busybox")
    listed = subprocess.run([busybox, "--list-full"], capture_output=True, text=True, check=True)
    for applet in listed.stdout.split():
        if applet not in ("bin/busybox", "sbin/init", "linuxrc"):
            (root / applet).parent.mkdir(parents=True, exist_ok=True)
            (root / applet).symlink_to("/bin/busybox")
    _copy(INIT, root / "sbin/init")
    (root / "sbin/init").chmod(0o755)
    for source in PROGRAMS:
        _run([find_tool("gcc"), *C_FLAGS, str(source), "-o", str(root / "sbin" / source.stem)],
             os.environ)
    (root / "init").symlink_to("sbin/init")  # where the kernel looks in an initramfs
    for program in contents.programs:
        if not program.is_file():
            raise ImageError(f"--with-program {program}: no such file")
        for path in (program.absolute(), *libraries_of(program)):
            _copy(path, root / path.relative_to("/"))
    for source, target in contents.added:
        _copy(source, root / target.lstrip("/"))


def _copy(source: Path, target: Path) -> None:
    """Copy a file (through symlinks) or a tree (keeping them), replacing what is there."""
    if not source.exists():
        raise ImageError(f"{source}: no such file")
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    shutil.copy(source, target)


def libraries_of(program: Path) -> list[Path]:
    """Every library a dynamic ELF program loads, its interpreter included; [] if it is static."""
    result = subprocess.run(["ldd", program], capture_output=True, text=True, check=False,
                            env={**os.environ, "LC_ALL": "C"})
    if result.returncode:
        if "not a dynamic executable" in result.stdout + result.stderr:
            return []
        raise ImageError(f"ldd {program}: {result.stderr.strip()}")
    if missing := re.findall(r"^\s*(\S+) => not found", result.stdout, re.MULTILINE):
        raise ImageError(f"{program} needs {', '.join(missing)}, not found on this machine")
    return [Path(path) for path in re.findall(r"(/\S+) \(0x", result.stdout)]


# ---- ext4 --------------------------------------------------------------------------------------


def build_disk(out: Path, contents: Contents, *, size_bytes: int, time: int) -> None:
    """Write an ext4 image of ``size_bytes`` to ``out``, atomically."""
    with tempfile.TemporaryDirectory(prefix="pyvmm-image-") as scratch:
        tree = Path(scratch) / "tree"
        tree.mkdir()
        make_tree(tree, contents)
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = _new_file_beside(out)
        try:
            with temporary.open("wb") as image:
                image.truncate(size_bytes)
            environment = {**os.environ, "E2FSPROGS_FAKE_TIME": str(time), "LC_ALL": "C"}
            # Nothing lazy: the guest's kernel would start a thread that writes in the background.
            _run([find_tool("mke2fs"), "-q", "-F", "-t", "ext4", "-b", str(BLOCK), "-m", "0",
                  "-L", "pyvmm-root", "-U", UUID, "-d", str(tree),
                  "-E", f"root_owner=0:0,hash_seed={UUID},"
                        "lazy_itable_init=0,lazy_journal_init=0", str(temporary)], environment)
            # mke2fs -d copies owners and times; the image belongs to root and to no moment.
            script = Path(scratch) / "attributes"
            script.write_text("".join(_attributes(tree, time)))
            _run([find_tool("debugfs"), "-w", "-f", str(script), str(temporary)], environment)
            os.replace(temporary, out)
        finally:
            temporary.unlink(missing_ok=True)


def _new_file_beside(out: Path) -> Path:
    """A new empty file, whose name nobody could guess, that is to take the place of ``out``."""
    fd, name = tempfile.mkstemp(prefix=f".{out.name}.", dir=out.parent)
    os.fchmod(fd, 0o644)
    os.close(fd)
    return Path(name)


def _attributes(tree: Path, time: int) -> Iterator[str]:
    """debugfs commands that set owner and times of every inode."""
    names = ["/", "/lost+found", *(f"/{path.relative_to(tree)}" for path in _walk(tree))]
    for name in names:
        for field in ("uid", "gid"):
            yield f'sif "{name}" {field} 0\n'
        for field in ("atime", "ctime", "mtime", "crtime"):
            yield f'sif "{name}" {field} @{time}\n'
            yield f'sif "{name}" {field}_extra 0\n'


def _run(command: Sequence[str], environment: Mapping[str, str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    # debugfs reports a failed command on stderr (below its banner) and still ends with 0.
    errors = [line for line in result.stderr.splitlines() if line and "debugfs 1." not in line]
    if result.returncode or (errors and "debugfs" in command[0]):
        raise ImageError(f"{Path(command[0]).name}: {errors[-1] if errors else 'failed'}")


# ---- initramfs ---------------------------------------------------------------------------------


def build_initramfs(out: Path, contents: Contents, *, time: int) -> None:
    """Write the same tree as a gzip-compressed newc cpio archive to ``out``, atomically."""
    with tempfile.TemporaryDirectory(prefix="pyvmm-image-") as scratch:
        tree = Path(scratch)
        make_tree(tree, contents)
        archive = bytearray()
        # The kernel opens /dev/console before init can mount devtmpfs on an initramfs.
        archive += cpio_entry("dev", stat.S_IFDIR | 0o755, b"", time=time, inode=1)
        archive += cpio_entry("dev/console", stat.S_IFCHR | 0o600, b"", time=time, inode=2,
                              device=(5, 1))
        for inode, path in enumerate(_walk(tree), 3):
            name, mode = str(path.relative_to(tree)), path.lstat().st_mode
            if name == "dev":
                continue
            data = b""
            if path.is_symlink():
                data = os.fsencode(path.readlink())
            elif path.is_file():
                data = path.read_bytes()
            archive += cpio_entry(name, mode, data, time=time, inode=inode)
        archive += cpio_entry("TRAILER!!!", 0, b"", time=0, inode=0)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = _new_file_beside(out)
    temporary.write_bytes(gzip.compress(archive, 6, mtime=0))
    os.replace(temporary, out)


def cpio_entry(name: str, mode: int, data: bytes, *, time: int, inode: int,
               device: tuple[int, int] = (0, 0)) -> bytes:
    """One member of a "new ASCII" cpio archive (Documentation/driver-api/early-userspace)."""
    encoded = os.fsencode(name) + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    fields = (inode, mode, 0, 0, links, time, len(data), 0, 0, *device, len(encoded), 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + encoded
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


# ---- small things ------------------------------------------------------------------------------


def _walk(tree: Path) -> list[Path]:
    """Everything below ``tree``, parents before children, in an order that does not vary."""
    return sorted(tree.rglob("*"))


def find_tool(name: str) -> str:
    """Path of a program; ImageError with the command that installs it."""
    if path := shutil.which(name, path=TOOL_PATH):
        return path
    raise ImageError(f"{name} is missing; {install_hint([PACKAGES[name]])}")


def missing_packages() -> list[str]:
    """Debian packages to install before an image can be built."""
    missing = {package for tool, package in PACKAGES.items()
               if not shutil.which(tool, path=TOOL_PATH)}
    return sorted(missing)


def install_hint(packages: Sequence[str]) -> str:
    """The command that installs ``packages``."""
    sudo = "" if os.geteuid() == 0 else "sudo "
    return f"run: {sudo}apt-get install -y --no-install-recommends {' '.join(packages)}"


def parse_size(text: str) -> int:
    """Bytes of "64M", "1G", "16384K" or "67108864"; at least 8 MiB, in whole 4 KiB blocks."""
    match = re.fullmatch(r"(\d+)([KMG]?)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 64M")
    size = int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]
    if size < MIN_SIZE or size % BLOCK:
        raise argparse.ArgumentTypeError(
            f"{text} must be at least {MIN_SIZE >> 20}M and a multiple of {BLOCK} bytes")
    return size


def parse_added(text: str) -> tuple[Path, str]:
    """``SRC:DST``, where DST is an absolute path in the image."""
    source, colon, target = text.rpartition(":")
    if not colon or not source or not target.startswith("/") or ".." in Path(target).parts:
        raise argparse.ArgumentTypeError(f"{text!r} is not SRC:DST with an absolute DST")
    return Path(source), target


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0, or 1 with one line on stderr."""
    parser = argparse.ArgumentParser(description="Build the test image: busybox and guest/init.")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write an ext4 disk image")
    parser.add_argument("--initrd", type=Path, metavar="FILE",
                        help="write the same tree as an initramfs (cpio.gz)")
    parser.add_argument("--size", type=parse_size, default=DEFAULT_SIZE, metavar="SIZE",
                        help="size of the disk image (default: 64M)")
    parser.add_argument("--add", type=parse_added, action="append", default=[], metavar="SRC:DST",
                        help="copy a file or directory into the image; repeatable")
    parser.add_argument("--with-program", type=Path, action="append", default=[], metavar="PATH",
                        help="copy a program and the libraries it loads; repeatable")
    parser.add_argument("--missing", action="store_true",
                        help="print the Debian packages that are needed and missing, and end")
    options = parser.parse_args(arguments)
    if options.missing:
        print(*missing_packages())
        return 0
    if options.out is None and options.initrd is None:
        parser.error("nothing to do: give --out, --initrd or both")
    time = int(os.environ.get("SOURCE_DATE_EPOCH") or DEFAULT_TIME)
    contents = Contents(added=options.add, programs=options.with_program)
    try:
        if options.out is not None:
            build_disk(options.out, contents, size_bytes=options.size, time=time)
        if options.initrd is not None:
            build_initramfs(options.initrd, contents, time=time)
    except (ImageError, OSError, subprocess.CalledProcessError) as error:
        print(f"guest/build_image.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
