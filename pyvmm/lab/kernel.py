"""The lab's Linux: Debian's generic kernel, unpacked once into the cache, never installed.

What is kept of the 400 MB package is an uncompressed ``vmlinux`` (entered by PVH, so that nothing
is decompressed under emulation) and the few modules that the lab loads, in load order.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import lzma
import os
import re
import shutil
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pyvmm.errors import HostError

META_PACKAGE = "linux-image-amd64"
MODULES = ("virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay", "kvm_amd")
"""What the lab loads; their dependencies are found in the modules themselves."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """An unpacked kernel in the cache: ``modules`` are uncompressed files in load order."""

    vmlinux: Path
    modules: tuple[Path, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """One Debian package as apt describes it."""

    name: str
    version: str
    size_bytes: int


def cache_directory() -> Path:
    """``$PYVMM_CACHE``, else ``$XDG_CACHE_HOME/pyvmm``, else ``~/.cache/pyvmm``."""
    if chosen := os.environ.get("PYVMM_CACHE"):
        return Path(chosen).absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pyvmm"


def source_key() -> str:
    """A short hash of this file: what it builds changes only when it does."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


def obtain(cache: Path, say: Say, build: Callable[[Path, Say], str] | None = None) -> Kernel:
    """The cached kernel, built first if this version of the source never built one.

    ``build`` fills an empty directory and returns the version that names it.  Safe against other
    processes doing the same: one builds, the others wait for it.  HostError if it cannot be built.
    """
    build = build or build_from_debian
    prefix = f"lab-{source_key()}-"
    if found := _newest(cache, prefix):
        return _open(found)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / "lab.lock", say):
            if found := _newest(cache, prefix):
                return _open(found)
            # Under the lock, what still carries this name is left over from a killed build.
            for stale in cache.glob("lab-building-*"):
                shutil.rmtree(stale, ignore_errors=True)
            work = Path(tempfile.mkdtemp(prefix="lab-building-", dir=cache))
            try:
                # mkdtemp is 0700; a cache shared by PYVMM_CACHE may have other readers.
                work.chmod(0o755)
                target = cache / (prefix + build(work, say))
                work.rename(target)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise HostError(f"lab: cannot build its kernel in {cache}: {error}") from error
    return _open(target)


def build_from_debian(work: Path, say: Say) -> str:
    """Download and unpack Debian's kernel, leaving ``vmlinux`` and ``modules/`` in ``work``."""
    package = find_package(say)
    try:
        archive = download(package, work, say)
    except HostError as error:
        # Most likely apt's lists are old and the mirror has moved on.
        if os.geteuid() != 0:
            raise HostError(f"{error}; if apt's lists are old, run: sudo apt-get update") from error
        say("that failed; running apt-get update to try again...")
        run_tool(["apt-get", "update", "-qq"], "apt-get update failed")
        package = find_package(say)
        archive = download(package, work, say)
    say("unpacking it (once; kept in the cache)...")
    root = work / "package"
    run_tool(["dpkg", "-x", str(archive), str(root)], "cannot unpack the kernel package")
    image = next(root.glob("boot/vmlinuz-*"), None)
    if image is None:
        raise HostError(f"lab: {package.name} holds no boot/vmlinuz")
    (work / "vmlinux").write_bytes(extract_vmlinux(image.read_bytes()))
    (work / "modules").mkdir()
    for index, (name, data) in enumerate(load_order(root, MODULES)):
        (work / "modules" / f"{index:02}-{name}.ko").write_bytes(data)
    shutil.rmtree(root)
    archive.unlink()
    return package.version.replace("/", "_")


def find_package(say: Say) -> Package:
    """What apt would install for ``linux-image-amd64``; root refreshes absent lists by itself."""
    name = _candidate()
    if not name and os.geteuid() == 0:
        say("apt does not know linux-image-amd64 yet: running apt-get update...")
        run_tool(["apt-get", "update", "-qq"], "apt-get update failed")
        name = _candidate()
    if not name:
        remedy = "is this Debian, amd64?" if os.geteuid() == 0 else "run: sudo apt-get update"
        raise HostError(f"lab: apt knows no package {META_PACKAGE}; {remedy}")
    shown = run_tool(["apt-cache", "show", "--no-all-versions", name], f"apt knows no {name}")
    version = re.search(r"^Version: (.+)$", shown, re.MULTILINE)
    size = re.search(r"^Size: (\d+)$", shown, re.MULTILINE)
    if version is None or size is None:
        raise HostError(f"lab: apt-cache show {name} says no version or no size")
    return Package(name=name, version=version[1], size_bytes=int(size[1]))


def download(package: Package, into: Path, say: Say) -> Path:
    """Fetch ``package``'s archive (without root, and without installing it) to ``into``."""
    say(f"downloading {package.name} {package.version} ({package.size_bytes / 1e6:.0f} MB)...")
    command = ["apt-get", "download", "-qq", f"{package.name}={package.version}"]
    run_tool(command, f"cannot download {package.name}", cwd=into)
    return next(into.glob("*.deb"))


def extract_vmlinux(image: bytes) -> bytes:
    """The ELF kernel inside a bzImage, decompressed; HostError if there is none.

    Documentation/arch/x86/boot.rst: setup_sects at 0x1f1, payload_offset and payload_length at
    0x248, relative to the end of the setup sectors.
    """
    if image[0x202:0x206] != b"HdrS" or len(image) < 0x250:
        raise HostError("lab: the package's kernel is not a bzImage")
    offset, length = struct.unpack_from("<II", image, 0x248)
    offset += ((image[0x1F1] or 4) + 1) * 512
    kernel = decompress(image[offset : offset + length])
    if kernel[:4] != b"\x7fELF":
        raise HostError("lab: the package's kernel holds no ELF image")
    return kernel


def decompress(data: bytes) -> bytes:
    """``data`` unpacked by the format its first bytes show; itself if they show none.

    The kernel appends the unpacked length to its payload, so trailing bytes are no error.
    """
    if data.startswith(b"\x1f\x8b"):
        return zlib.decompressobj(wbits=31).decompress(data)
    if data.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMADecompressor().decompress(data)
    for magic, tool in ((b"\x28\xb5\x2f\xfd", "zstd"), (b"\x02\x21\x4c\x18", "lz4")):
        if data.startswith(magic):
            if shutil.which(tool) is None:
                raise HostError(f"lab: {tool} is missing; run: {install_command([tool])}")
            # The status is not looked at: both tools complain about the trailing length.
            return subprocess.run([tool, "-dcq"], input=data, capture_output=True).stdout
    return data


def load_order(root: Path, wanted: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """``(name, contents)`` of the ``wanted`` modules under ``root``, dependencies first.

    A module names what it needs in its own ``depends=`` string, so depmod's tables (a minute of
    work on a whole package) are not needed.  A name without a file is built into the kernel.
    """
    files = {
        path.name.partition(".ko")[0].replace("-", "_"): path
        for path in root.glob("lib/modules/*/kernel/**/*.ko*")
    }
    done: set[str] = set()

    def visit(name: str) -> Iterator[tuple[str, bytes]]:
        name = name.replace("-", "_")
        if name in done or name not in files:
            return
        done.add(name)
        data = decompress(files[name].read_bytes())
        depends = re.search(rb"\0depends=([^\0]*)\0", data)
        for needed in depends[1].decode("ascii").split(",") if depends else ():
            yield from visit(needed)
        yield name, data

    for name in wanted:
        yield from visit(name)


def install_command(packages: list[str]) -> str:
    """The exact command that installs ``packages``, with sudo where this user needs it."""
    sudo = "" if os.geteuid() == 0 else "sudo "
    return f"{sudo}apt-get install -y --no-install-recommends {' '.join(packages)}"


def run_tool(command: list[str], problem: str, cwd: Path | None = None) -> str:
    """Run a host tool; its output, or HostError with ``problem`` and the tool's last line."""
    environment = os.environ | {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, errors="replace",
        )
    except FileNotFoundError as error:
        raise HostError(f"lab: {command[0]} is missing: its kernel comes by apt") from error
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise HostError(f"lab: {problem}: {said[-1]}")
    return done.stdout


def _candidate() -> str:
    """The package behind the meta package, such as linux-image-6.1.0-56-amd64; "" if unknown."""
    try:
        shown = run_tool(["apt-cache", "depends", META_PACKAGE], "")
    except HostError:
        return ""
    match = re.search(r"^ *Depends: (linux-image-\S+)$", shown, re.MULTILINE)
    return match[1] if match else ""


def _newest(cache: Path, prefix: str) -> Path | None:
    built = sorted(cache.glob(f"{prefix}*"), key=lambda path: path.stat().st_mtime)
    return built[-1] if built else None


def _open(directory: Path) -> Kernel:
    return Kernel(
        vmlinux=directory / "vmlinux", modules=tuple(sorted((directory / "modules").iterdir()))
    )


@contextlib.contextmanager
def _locked(path: Path, say: Say) -> Iterator[None]:
    """Hold an exclusive lock on ``path``; the kernel drops it if we are killed."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another lab is building the kernel: waiting for it...")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
