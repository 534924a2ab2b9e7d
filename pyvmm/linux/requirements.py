"""The options that a kernel needs to boot here, judged by its configuration.

``pyvmm run`` may ask before a boot, so this imports only ``enum`` and the modules that it judges.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator

from pyvmm.linux.file_systems import SQUASHFS_COMPRESSORS
from pyvmm.linux.formats import Compression
from pyvmm.linux.guest import Guest
from pyvmm.linux.options import KernelConfig
from pyvmm.numerals import whole_number
from pyvmm.startup.types import Record

# The options that make a file system mountable; any one will do.  ext4 mounts ext2 and ext3 too, if
# only under its own name.
FILE_SYSTEMS = {
    "ext4": ("EXT4_FS",),
    "ext3": ("EXT4_FS", "EXT3_FS"),
    "ext2": ("EXT4_FS", "EXT2_FS"),
    "xfs": ("XFS_FS",),
    "btrfs": ("BTRFS_FS",),
    "f2fs": ("F2FS_FS",),
    "squashfs": ("SQUASHFS",),
    "erofs": ("EROFS_FS",),
    "iso9660": ("ISO9660_FS",),
    "jfs": ("JFS_FS",),
    "cramfs": ("CRAMFS",),
    "romfs": ("ROMFS_FS",),
}
PARTITIONS = {
    "gpt": ("EFI_PARTITION",),
    "dos": ("MSDOS_PARTITION",),
    "any": ("EFI_PARTITION", "MSDOS_PARTITION"),
}
BUILT_IN = ("CMDLINE_BOOL", "CMDLINE", "CMDLINE_OVERRIDE", "INITRAMFS_SOURCE")
"""The options at which ``guest.describe`` looks."""


class State(enum.Enum):
    """A kernel's answer to a requirement.  NOTE: it is missing, but a boot may do without."""

    BUILT_IN = "ok"
    MODULE = "module"
    NOTE = "note"
    MISSING = "missing"


class Requirement(Record):
    """Something that a guest needs, by any one of ``options``; ``without`` names the consequence.

    With ``given`` it is asked only of a kernel that has all those options.  ``at_least`` is for an
    option that is a number.  ``depends_on_image`` means that some images boot without, and nobody
    knows which kind this one is.  The options of ``unless`` together do in its place.
    """

    purpose: str
    options: tuple[str, ...]
    without: str
    may_be_module: bool = False
    given: tuple[str, ...] = ()
    at_least: int = 0
    depends_on_image: bool = False
    unless: tuple[str, ...] = ()

    def asked_about(self) -> set[str]:
        """Return the options that decide on it."""
        return {*self.options, *self.given, *self.unless}


class Finding(Record):
    """A requirement, and the state that a configuration has of it."""

    requirement: Requirement
    state: State
    settings: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return ", ".join(
            f"{option} is not set" if value == "n" else f"{option}={ascii(value)[1:-1]}"
            for option, value in self.settings
        )


class Problem(Record):
    """A reason why a guest will not boot: ``option`` is ``state`` ("n", "m", or its number)."""

    option: str
    state: str
    text: str

    def __str__(self) -> str:
        return self.text


def requirements(guest: Guest) -> Iterator[Requirement]:
    """Yield the needs of ``guest``, in the order in which a boot would miss them."""
    yield Requirement(purpose="64 bits", options=("64BIT",), without="it is a 32-bit kernel")
    yield from _console(guest)
    if guest.cpus > 1:
        yield from _cpus(guest)
    if guest.has_disk or guest.console == "hvc0" or guest.agent_port:
        yield from _virtio(guest)
    if guest.agent_port:
        yield Requirement(purpose="the agent's port", options=("VIRTIO_CONSOLE",),
                          without="no agent is heard", may_be_module=True)
    if guest.has_disk:
        yield from _root(guest)
    yield from _start(guest)


def _console(guest: Guest) -> Iterator[Requirement]:
    silent = "nothing is seen on the console"
    yield Requirement(purpose="kernel messages", options=("PRINTK",),
                      without="what the kernel says is not seen")
    yield Requirement(purpose="terminals", options=("TTY",), without=silent)
    if guest.console == "hvc0":
        # It selects HVC_DRIVER.
        yield Requirement(purpose="console hvc0", options=("VIRTIO_CONSOLE",), may_be_module=True,
                          without="no hvc0 shows anything or takes what is typed")
    if guest.console != "ttyS0":
        return
    hvc0: tuple[str, ...] = ()
    if guest.names_hvc0:  # then it is the console that is seen
        hvc0, silent = ("VIRTIO_CONSOLE", "VIRTIO_MMIO"), "nothing is seen on ttyS0"
    yield Requirement(purpose="serial port", options=("SERIAL_8250",), without=silent, unless=hvc0)
    yield Requirement(purpose="serial console", options=("SERIAL_8250_CONSOLE",), without=silent,
                      unless=hvc0)
    if guest.acpi:
        # On a hardware-reduced platform no line is ISA's: only ACPI knows the UART's line.
        yield Requirement(purpose="serial port by ACPI", options=("SERIAL_8250_PNP",),
                          given=("ACPI", "SERIAL_8250_CONSOLE"),
                          without="what programs print is not seen (acpi=off helps)")


def _cpus(guest: Guest) -> Iterator[Requirement]:
    one = "only one vCPU runs"
    yield Requirement(purpose="several vCPUs", options=("SMP",), without=one)
    yield Requirement(purpose=f"{guest.cpus} vCPUs", options=("NR_CPUS",), given=("SMP",),
                      at_least=guest.cpus, without="no more of them run")
    if guest.acpi:
        yield Requirement(purpose="finding vCPUs", options=("ACPI", "X86_MPPARSE"), given=("SMP",),
                          without=one)
    else:
        yield Requirement(purpose="finding vCPUs without ACPI", options=("X86_MPPARSE",),
                          given=("SMP",), without=one)


def _virtio(guest: Guest) -> Iterator[Requirement]:
    nothing = "no hvc0 is found" if guest.console == "hvc0" else "no agent is heard"
    if guest.has_disk:
        nothing = "no disk is found"
    yield Requirement(purpose="virtio-mmio", options=("VIRTIO_MMIO",), without=nothing,
                      may_be_module=True)
    by_command_line = "VIRTIO_MMIO_CMDLINE_DEVICES"
    if not guest.acpi:
        if guest.cmdline_devices:
            yield Requirement(purpose="virtio-mmio discovery with acpi=off",
                              options=(by_command_line,), without=nothing)
        return
    if guest.cmdline_devices:
        yield Requirement(purpose="virtio-mmio discovery", options=(by_command_line, "ACPI"),
                          without=nothing)
        helps = "acpi=off may help"
    else:
        yield Requirement(purpose="virtio-mmio discovery by ACPI", options=("ACPI",),
                          without=nothing)
        helps = "--discovery cmdline may help"
    # ACPICA then fails to install its handler for PCI, and Linux gives up on all of it.
    yield Requirement(purpose="ACPI's tables", options=("PCI",), given=("ACPI",),
                      without=f"they are not loaded and {nothing} ({helps})")


def _root(guest: Guest) -> Iterator[Requirement]:
    no_disk = "no disk is found"
    yield Requirement(purpose="block devices", options=("BLOCK",), without=no_disk)
    yield Requirement(purpose="virtio-blk", options=("VIRTIO_BLK",), without=no_disk,
                      may_be_module=True)
    if guest.partitions:
        name = {"gpt": "GPT", "dos": "MBR", "any": ""}[guest.partitions]
        yield Requirement(purpose=f"{name} partitions".strip(),
                          options=PARTITIONS[guest.partitions],
                          without="the root's partition is not found")
    if options := FILE_SYSTEMS.get(guest.file_system or ""):
        not_mounted = f"a root of {guest.file_system} is not mounted"
        yield Requirement(purpose=f"root file system {guest.file_system}", options=options,
                          without=not_mounted, may_be_module=True)
        if guest.squashfs:
            yield Requirement(purpose=f"squashfs, {guest.squashfs}",
                              options=(f"SQUASHFS_{guest.squashfs}",), given=("SQUASHFS",),
                              without=not_mounted)


def _start(guest: Guest) -> Iterator[Requirement]:
    if (kind := guest.initrd_compression) is not None:
        unused = "the initrd is not used"
        yield Requirement(purpose="initramfs", options=("BLK_DEV_INITRD",), without=unused)
        if kind is not Compression.NONE:
            yield Requirement(purpose=f"initramfs, {kind.value}", options=(f"RD_{kind.value}",),
                              without=unused)
        if guest.is_ram_disk:
            yield Requirement(purpose="initrd, a file system", options=("BLK_DEV_RAM",),
                              without=unused)
    no_dev = "/dev of a root without device files stays empty"
    yield Requirement(purpose="devtmpfs", options=("DEVTMPFS",), without=no_dev,
                      depends_on_image=True)
    if guest.initrd_compression is None and not guest.mounts_devtmpfs:
        yield Requirement(purpose="devtmpfs, no initramfs", options=("DEVTMPFS_MOUNT",),
                          without=f"{no_dev} until its init mounts it, as systemd does",
                          depends_on_image=True)
    yield Requirement(purpose="programs", options=("BINFMT_ELF",), without="no program is run")
    yield Requirement(purpose="scripts", options=("BINFMT_SCRIPT",), may_be_module=True,
                      without="an init that is a script is not run", depends_on_image=True)


def every_guest() -> Iterator[Guest]:
    """Yield guests that together ask for everything that a guest can ask for."""
    for acpi, cmdline_devices in ((True, True), (True, False), (False, True)):
        for console in ("ttyS0", "hvc0"):
            yield Guest(cpus=2, acpi=acpi, cmdline_devices=cmdline_devices, console=console)
    yield Guest(initrd_compression=Compression.NONE, is_ram_disk=True)
    yield Guest(agent_port=True)
    for kind in Compression:
        yield Guest(initrd_compression=kind)
    for name in FILE_SYSTEMS:
        yield Guest(file_system=name)
    for name in filter(None, SQUASHFS_COMPRESSORS):
        yield Guest(file_system="squashfs", squashfs=name)
    for table in PARTITIONS:
        yield Guest(partitions=table)


def known_options() -> frozenset[str]:
    """Return every option on which a judgement may rest."""
    asked = {need for guest in every_guest() for need in requirements(guest)}
    return frozenset(set(BUILT_IN).union(*(need.asked_about() for need in asked)))


def judge(config: KernelConfig, guest: Guest) -> list[Finding]:
    """Return each requirement of ``guest`` with its state in ``config``."""
    return [
        _find(config, guest, requirement)
        for requirement in requirements(guest)
        if all(config.state(option) == "y" for option in requirement.given)
    ]


def problems(config: KernelConfig, guest: Guest) -> list[Problem]:
    """Return why ``guest`` will not boot with ``config``; a module counts without initrd."""
    return [problem for problem, is_note in _lacking(config, guest) if not is_note]


def notes(config: KernelConfig, guest: Guest) -> list[Problem]:
    """Return why ``guest`` may not boot, though other images boot so."""
    return [problem for problem, is_note in _lacking(config, guest) if is_note]


def _lacking(config: KernelConfig, guest: Guest) -> Iterator[tuple[Problem, bool]]:
    for finding in judge(config, guest):
        need = finding.requirement
        option, value = finding.settings[0]
        if finding.state in (State.MISSING, State.NOTE):
            names = " nor ".join(f"CONFIG_{option}" for option in need.options)
            verb = "has neither" if len(need.options) > 1 else "lacks"
            if need.at_least:
                names, verb = f"CONFIG_{option}={ascii(value)[1:-1]}", "has"
            text = f"the kernel {verb} {names} ({need.purpose}): {need.without}"
        elif finding.state is State.MODULE and guest.initrd_compression is None:
            text = (f"the kernel has CONFIG_{option}={value} ({need.purpose}), a module: without "
                    f"an initramfs that loads it (--initrd) {need.without}")
        else:
            continue
        is_note = finding.state is State.NOTE or need.depends_on_image
        yield Problem(option=option, state=value, text=text), is_note


def _find(config: KernelConfig, guest: Guest, requirement: Requirement) -> Finding:
    settings = [(option, config.state(option)) for option in requirement.options]
    # The best comes first; a sort keeps the order of equals.
    settings.sort(key=lambda setting: {"y": 0, "m": 1}.get(setting[1], 2))
    best = settings[0][1]
    if requirement.at_least:
        is_less = whole_number(best, 0, requirement.at_least - 1) is not None
        state = State.MISSING if is_less else State.BUILT_IN
    elif best == "y":
        state = State.BUILT_IN
    elif best == "m" and requirement.may_be_module:
        state = State.MODULE
    else:
        has = ("y",) if guest.initrd_compression is None else ("y", "m")
        is_replaced = requirement.unless and all(
            config.state(option) in has for option in requirement.unless
        )
        may_do = requirement.depends_on_image or is_replaced
        state = State.NOTE if may_do else State.MISSING
    return Finding(requirement=requirement, state=state, settings=tuple(settings))
