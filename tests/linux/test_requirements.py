"""A kernel that lacks each needed option in turn."""

from __future__ import annotations

import pytest

from pyvmm.linux.compression import Compression
from pyvmm.linux.config import KernelConfig
from pyvmm.linux.requirements import FILE_SYSTEMS, Guest, State, judge, problems

COMPLETE = dict.fromkeys((
    "64BIT", "PRINTK", "TTY", "SERIAL_8250", "SERIAL_8250_CONSOLE", "SERIAL_8250_PNP",
    "BLOCK", "VIRTIO_MMIO",
    "VIRTIO_MMIO_CMDLINE_DEVICES", "ACPI", "PCI", "VIRTIO_BLK", "EXT4_FS", "BLK_DEV_INITRD",
    "RD_GZIP", "DEVTMPFS", "DEVTMPFS_MOUNT", "BINFMT_ELF",
), "y")  # fmt: skip
DISK = Guest()
INITRD = Guest(initrd_compression=Compression.GZIP)


def config(**changes: str) -> KernelConfig:
    """A configuration with all that any guest needs, but for ``changes``; n is "not set"."""
    options = COMPLETE | {name.removeprefix("C_"): value for name, value in changes.items()}
    return KernelConfig({name: value for name, value in options.items() if value != "n"}, "test")


@pytest.mark.parametrize("guest", [DISK, INITRD, Guest(has_disk=False)])
def test_nothing_is_missing(guest: Guest) -> None:
    assert problems(config(), guest) == []
    assert {finding.state for finding in judge(config(), guest)} == {State.BUILT_IN}


DISCOVERY = {"ACPI", "VIRTIO_MMIO_CMDLINE_DEVICES"}


@pytest.mark.parametrize("option", sorted(COMPLETE.keys() - DISCOVERY))
def test_each_option_in_turn_is_named(option: str) -> None:
    guest = INITRD if option in ("BLK_DEV_INITRD", "RD_GZIP") else DISK
    (problem,) = problems(config(**{f"C_{option}": "n"}), guest)
    assert (problem.option, problem.state) == (option, "n")
    assert str(problem).startswith(f"the kernel lacks CONFIG_{option} (")


def test_devices_are_found_by_command_line_or_by_acpi() -> None:
    assert problems(config(ACPI="n"), DISK) == []
    assert problems(config(VIRTIO_MMIO_CMDLINE_DEVICES="n"), DISK) == []
    (problem,) = problems(config(ACPI="n", VIRTIO_MMIO_CMDLINE_DEVICES="n"), DISK)
    assert str(problem) == (
        "the kernel has neither CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES nor CONFIG_ACPI "
        "(virtio-mmio discovery): no disk is found"
    )


def test_acpi_wants_pci_unless_it_is_off() -> None:
    (problem,) = problems(config(PCI="n"), DISK)
    assert str(problem) == (
        "the kernel lacks CONFIG_PCI (ACPI's tables): they are not loaded and no disk is found "
        "(acpi=off may help)"
    )
    assert problems(config(PCI="n", SERIAL_8250_PNP="n"), Guest(acpi_off=True)) == []
    assert problems(config(PCI="n", SERIAL_8250_PNP="n", ACPI="n"), DISK) == []


def test_with_acpi_off_only_the_command_line_is_left() -> None:
    assert problems(config(ACPI="n"), Guest(acpi_off=True)) == []
    (problem,) = problems(config(VIRTIO_MMIO_CMDLINE_DEVICES="n"), Guest(acpi_off=True))
    assert str(problem) == (
        "the kernel lacks CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES (virtio-mmio discovery with "
        "acpi=off): no disk is found"
    )


@pytest.mark.parametrize("option", ["VIRTIO_MMIO", "VIRTIO_BLK", "EXT4_FS"])
def test_a_module_needs_an_initramfs(option: str) -> None:
    modular = config(**{option: "m"})
    (problem,) = problems(modular, DISK)
    assert (problem.option, problem.state) == (option, "m")
    assert "a module: without an initramfs that loads it (--initrd) " in str(problem)
    assert problems(modular, INITRD) == []
    states = {finding.settings[0]: finding.state for finding in judge(modular, INITRD)}
    assert states[option, "m"] is State.MODULE


def test_a_console_cannot_be_a_module() -> None:
    (problem,) = problems(config(SERIAL_8250="m"), INITRD)
    assert problem.option == "SERIAL_8250"


@pytest.mark.parametrize("name", FILE_SYSTEMS)
def test_the_roots_file_system(name: str) -> None:
    bare = config(EXT4_FS="n")
    (problem,) = problems(bare, Guest(file_system=name))
    assert problem.option in FILE_SYSTEMS[name]
    for option in FILE_SYSTEMS[name]:
        assert problems(config(**{"EXT4_FS": "n", option: "y"}), Guest(file_system=name)) == []
    assert problems(bare, Guest(file_system=None)) == []


@pytest.mark.parametrize("kind", set(Compression) - {Compression.NONE})
def test_the_initrds_compression(kind: Compression) -> None:
    lacking = config(RD_GZIP="n")
    (problem,) = problems(lacking, Guest(initrd_compression=kind))
    assert problem.option == f"RD_{kind.value}"
    assert problems(lacking, Guest(initrd_compression=Compression.NONE)) == []


def test_a_finding_shows_every_setting() -> None:
    found = {f.requirement.purpose: str(f) for f in judge(config(ACPI="n", VIRTIO_BLK="m"), DISK)}
    assert found["virtio-blk"] == "VIRTIO_BLK=m"
    assert found["virtio-mmio discovery"] == "VIRTIO_MMIO_CMDLINE_DEVICES=y, ACPI is not set"
