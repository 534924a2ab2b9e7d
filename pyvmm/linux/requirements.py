"""What a kernel must have been built with to boot here, judged by its configuration."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

from pyvmm.linux.compression import Compression
from pyvmm.linux.config import KernelConfig

# Which options make a file system mountable; one of them will do.
FILE_SYSTEMS = {
    "ext4": ("EXT4_FS",),
    "ext3": ("EXT4_FS", "EXT3_FS"),
    "ext2": ("EXT2_FS", "EXT4_USE_FOR_EXT2"),
    "xfs": ("XFS_FS",),
    "btrfs": ("BTRFS_FS",),
    "f2fs": ("F2FS_FS",),
    "squashfs": ("SQUASHFS",),
    "erofs": ("EROFS_FS",),
}


class State(enum.Enum):
    """Whether the kernel has what is needed."""

    BUILT_IN = "ok"
    MODULE = "module"
    MISSING = "missing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """What is asked of the kernel.

    ``initrd_compression`` is None without an initrd.  ``file_system`` is the root's on a disk, None
    if there is no disk or its kind is unknown.  ``acpi_off`` is what the command line may say.
    """

    has_disk: bool = True
    acpi_off: bool = False
    initrd_compression: Compression | None = None
    file_system: str | None = "ext4"


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """Something a guest needs, by any one of ``options``; ``without`` says what happens.

    With ``given`` it is asked only of a kernel that has that option.
    """

    purpose: str
    options: tuple[str, ...]
    without: str
    may_be_module: bool = False
    given: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A requirement, and what a configuration has of it."""

    requirement: Requirement
    state: State
    settings: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return ", ".join(
            f"{option} is not set" if value == "n" else f"{option}={ascii(value)[1:-1]}"
            for option, value in self.settings
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A reason why a guest will not boot: ``option`` is ``state`` ("n" or "m")."""

    option: str
    state: str
    text: str

    def __str__(self) -> str:
        return self.text


def requirements(guest: Guest) -> Iterator[Requirement]:
    """What ``guest`` needs, in the order in which a boot would miss it."""
    silent = "nothing is seen on the console"
    yield Requirement(purpose="64 bits", options=("64BIT",), without="it is a 32-bit kernel")
    yield Requirement(purpose="kernel messages", options=("PRINTK",), without=silent)
    yield Requirement(purpose="terminals", options=("TTY",), without=silent)
    yield Requirement(purpose="serial port", options=("SERIAL_8250",), without=silent)
    yield Requirement(purpose="serial console", options=("SERIAL_8250_CONSOLE",), without=silent)
    if not guest.acpi_off:
        # On a hardware-reduced platform no line is ISA's: only ACPI knows the UART's.
        yield Requirement(purpose="serial port by ACPI", options=("SERIAL_8250_PNP",),
                          given="ACPI", without="what programs print is not seen (acpi=off helps)")
    no_disk = "no disk is found"
    if guest.has_disk:
        yield Requirement(purpose="block devices", options=("BLOCK",), without=no_disk)
        yield Requirement(purpose="virtio-mmio", options=("VIRTIO_MMIO",), without=no_disk,
                          may_be_module=True)
        by_command_line = "VIRTIO_MMIO_CMDLINE_DEVICES"
        if guest.acpi_off:
            yield Requirement(purpose="virtio-mmio discovery with acpi=off",
                              options=(by_command_line,), without=no_disk)
        else:
            yield Requirement(purpose="virtio-mmio discovery",
                              options=(by_command_line, "ACPI"), without=no_disk)
            # ACPICA then fails to install its handler for PCI, and Linux gives up on all of it.
            yield Requirement(purpose="ACPI's tables", options=("PCI",), given="ACPI",
                              without=f"they are not loaded and {no_disk} (acpi=off may help)")
        yield Requirement(purpose="virtio-blk", options=("VIRTIO_BLK",), without=no_disk,
                          may_be_module=True)
        if guest.file_system is not None:
            name = guest.file_system
            yield Requirement(purpose=f"root file system {name}", options=FILE_SYSTEMS[name],
                              without=f"a root of {name} is not mounted", may_be_module=True)
    if guest.initrd_compression is not None:
        unused = "the initrd is not used"
        yield Requirement(purpose="initramfs", options=("BLK_DEV_INITRD",), without=unused)
        if guest.initrd_compression is not Compression.NONE:
            name = guest.initrd_compression.value
            yield Requirement(purpose=f"initramfs, {name}", options=(f"RD_{name}",), without=unused)
    no_dev = "/dev of a root without device files stays empty"
    yield Requirement(purpose="devtmpfs", options=("DEVTMPFS",), without=no_dev)
    if guest.initrd_compression is None:
        yield Requirement(purpose="devtmpfs, no initramfs", options=("DEVTMPFS_MOUNT",),
                          without=no_dev)
    yield Requirement(purpose="programs", options=("BINFMT_ELF",), without="no program is run")


def judge(config: KernelConfig, guest: Guest) -> list[Finding]:
    """Each requirement of ``guest`` with what ``config`` has of it."""
    return [
        _find(config, requirement)
        for requirement in requirements(guest)
        if not requirement.given or config.state(requirement.given) == "y"
    ]


def problems(config: KernelConfig, guest: Guest) -> list[Problem]:
    """Why ``guest`` will not boot with a kernel of ``config``; a module counts without initrd."""
    found = []
    for finding in judge(config, guest):
        need = finding.requirement
        option, value = finding.settings[0]
        if finding.state is State.MISSING:
            names = " nor ".join(f"CONFIG_{option}" for option in need.options)
            verb = "has neither" if len(need.options) > 1 else "lacks"
            text = f"the kernel {verb} {names} ({need.purpose}): {need.without}"
        elif finding.state is State.MODULE and guest.initrd_compression is None:
            text = (f"the kernel has CONFIG_{option}={value} ({need.purpose}), a module: without "
                    f"an initramfs that loads it (--initrd) {need.without}")
        else:
            continue
        found.append(Problem(option=option, state=value, text=text))
    return found


def _find(config: KernelConfig, requirement: Requirement) -> Finding:
    settings = [(option, config.state(option)) for option in requirement.options]
    # The best comes first; a sort keeps the order of equals.
    settings.sort(key=lambda setting: {"y": 0, "m": 1}.get(setting[1], 2))
    best = settings[0][1]
    if best == "y":
        state = State.BUILT_IN
    elif best == "m" and requirement.may_be_module:
        state = State.MODULE
    else:
        state = State.MISSING
    return Finding(requirement=requirement, state=state, settings=tuple(settings))
