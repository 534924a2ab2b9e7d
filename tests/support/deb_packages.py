"""Small kernel packages of Debian's and Ubuntu's layout, and a repository that apt can read.

Ubuntu has the kernel in linux-image-RELEASE, configuration and modules in linux-modules-RELEASE, on
which the image depends; modules and packages are packed by zstd.
"""

from __future__ import annotations

import lzma
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.support.fake_apt import ELF, MODULES, bz_image, module

RELEASE = "6.8.0-31-generic"
VERSION = "6.8.0-31.31"


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A package to build: its control fields, and its files by absolute path."""

    name: str
    version: str = VERSION
    depends: str = ""
    files: dict[str, bytes]


def zstd(data: bytes) -> bytes:
    """``data`` packed by zstd."""
    return subprocess.run(["zstd", "-qc"], input=data, capture_output=True, check=True).stdout


def kernel() -> bytes:
    """A bzImage, its payload packed by xz."""
    return bz_image(lzma.compress(ELF) + struct.pack("<I", len(ELF)))


def ubuntu(release: str = RELEASE, *, image: bytes = b"", config: bytes = b"CONFIG_64BIT=y\n",
           tree: dict[str, bytes] | None = None) -> list[Package]:
    """linux-image-virtual and what it needs, as Ubuntu 24.04 has them."""
    if tree is None:
        tree = {f"kernel/{path}": module(depends) for path, depends in MODULES.items()}
    folder = f"/lib/modules/{release}"
    return [
        Package(name="linux-image-virtual", version=VERSION.replace("-31.31", ".31.31"),
                depends=f"linux-image-{release}", files={}),
        Package(name=f"linux-image-{release}",
                files={f"/boot/vmlinuz-{release}": image or kernel()},
                depends=f"kmod, linux-base (>= 4.5ubuntu1~16.04.1), linux-modules-{release}"),
        Package(name=f"linux-modules-{release}", files={
            f"/boot/config-{release}": config, f"/boot/System.map-{release}": b"0 T _text\n",
            f"{folder}/modules.order": b"", f"{folder}/modules.builtin": b"",
            **{f"{folder}/{path}.zst": zstd(data) for path, data in tree.items()},
        }),
    ]


def debian(release: str = "6.1.0-9-cloud-amd64") -> list[Package]:
    """Debian's one package, as of bookworm."""
    return [Package(name=f"linux-image-{release}", files={
        f"/boot/vmlinuz-{release}": kernel(), f"/boot/config-{release}": b"CONFIG_64BIT=y\n",
        **{f"/lib/modules/{release}/kernel/{path}": module(depends)
           for path, depends in MODULES.items()},
    })]


def build(
    package: Package, out: Path, packing: str = "zstd", *, architecture: str = "amd64"
) -> Path:
    """Build ``package`` by dpkg-deb in the directory ``out``; return the file."""
    root = out / f"{package.name}.root"
    (root / "DEBIAN").mkdir(parents=True)
    fields = {"Package": package.name, "Version": package.version, "Architecture": architecture,
              "Maintainer": "nobody <nobody@localhost>", "Description": "for a test"}
    fields |= {"Depends": package.depends} if package.depends else {}
    (root / "DEBIAN/control").write_text("".join(f"{k}: {v}\n" for k, v in fields.items()))
    for name, data in package.files.items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    target = out / f"{package.name}_{package.version}_{architecture}.deb"
    packed = target.with_suffix(".plain")
    # Debian's dpkg-deb 1.21.18 and later know zstd; what reads them is what is tested.
    subprocess.run(["dpkg-deb", "--root-owner-group", f"-Z{packing}", "-b", root, packed],
                   check=True, capture_output=True)
    return packed.rename(target)


def repository(packages: list[Package], out: Path) -> Path:
    """A repository with ``packages``: a directory of files and their index."""
    out.mkdir(parents=True, exist_ok=True)
    for package in packages:
        build(package, out)
    listed = subprocess.run(["apt-ftparchive", "packages", "."], cwd=out, check=True,
                            capture_output=True).stdout
    (out / "Packages").write_bytes(listed)
    return out


def apt_configuration(folder: Path, source: Path) -> Path:
    """The file for APT_CONFIG that makes apt know only the repository ``source``."""
    for name in ("lists/partial", "cache/archives/partial", "etc"):
        (folder / name).mkdir(parents=True)
    (folder / "sources.list").write_text(f"deb [trusted=yes] file:{source} ./\n")
    (folder / "status").touch()
    settings = {
        "Dir::Etc::SourceList": folder / "sources.list", "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": folder / "lists", "Dir::State::Status": folder / "status",
        "Dir::Cache": folder / "cache", "APT::Architecture": "amd64",
        "APT::Sandbox::User": "root", "Dir::Etc::Main": "/dev/null",
        "Dir::Etc::Parts": folder / "etc",
    }
    path = folder / "apt.conf"
    path.write_text("".join(f'{key} "{value}";\n' for key, value in settings.items()))
    return path
