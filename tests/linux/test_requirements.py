"""A kernel that lacks each needed option in turn."""

from __future__ import annotations

import pytest

from pyvmm.linux.compression import Compression
from pyvmm.linux.config import KernelConfig
from pyvmm.linux.guest import Guest
from pyvmm.linux.requirements import (
    BUILT_IN,
    FILE_SYSTEMS,
    State,
    every_guest,
    judge,
    known_options,
    notes,
    problems,
)
from tests.support.kernels import OPTIONS

COMPLETE = dict.fromkeys((
    "64BIT", "PRINTK", "TTY", "SERIAL_8250", "SERIAL_8250_CONSOLE", "SERIAL_8250_PNP",
    "BLOCK", "VIRTIO_MMIO",
    "VIRTIO_MMIO_CMDLINE_DEVICES", "ACPI", "PCI", "VIRTIO_BLK", "EXT4_FS", "BLK_DEV_INITRD",
    "RD_GZIP", "DEVTMPFS", "DEVTMPFS_MOUNT", "BINFMT_ELF", "BINFMT_SCRIPT",
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
IMAGE = {"DEVTMPFS", "DEVTMPFS_MOUNT", "BINFMT_SCRIPT"}


@pytest.mark.parametrize("option", sorted(COMPLETE.keys() - DISCOVERY - IMAGE))
def test_each_option_in_turn_is_named(option: str) -> None:
    guest = INITRD if option in ("BLK_DEV_INITRD", "RD_GZIP") else DISK
    (problem,) = problems(config(**{f"C_{option}": "n"}), guest)
    assert (problem.option, problem.state) == (option, "n")
    assert str(problem).startswith(f"the kernel lacks CONFIG_{option} (")


@pytest.mark.parametrize("option", sorted(IMAGE))
def test_what_depends_on_the_image_is_a_note(option: str) -> None:
    lacks = config(**{option: "n"})
    assert problems(lacks, DISK) == []
    (note,) = notes(lacks, DISK)
    assert str(note).startswith(f"the kernel lacks CONFIG_{option} (")
    states = {finding.settings[0][0]: finding.state for finding in judge(lacks, DISK)}
    assert states[option] is State.NOTE


def test_so_is_a_module_of_that_kind() -> None:
    assert problems(config(BINFMT_SCRIPT="m"), DISK) == []
    assert [note.option for note in notes(config(BINFMT_SCRIPT="m"), DISK)] == ["BINFMT_SCRIPT"]
    assert notes(config(BINFMT_SCRIPT="m"), INITRD) == []


@pytest.mark.parametrize("without", [
    {"SERIAL_8250": "n", "SERIAL_8250_CONSOLE": "n", "SERIAL_8250_PNP": "n"},
    {"SERIAL_8250_CONSOLE": "n", "SERIAL_8250_PNP": "n"}, {"SERIAL_8250_CONSOLE": "n"},
])
def test_a_serial_console_may_be_missing_where_hvc0_is_named_and_there(
    without: dict[str, str]
) -> None:
    both = Guest(console="ttyS0", names_hvc0=True)
    assert problems(config(VIRTIO_CONSOLE="y", **without), both) == []
    assert "nothing is seen on ttyS0" in str(notes(config(VIRTIO_CONSOLE="y", **without), both)[-1])
    assert problems(config(VIRTIO_CONSOLE="m", **without), both)
    assert problems(config(**without), both)
    assert problems(config(VIRTIO_CONSOLE="y", **without), DISK)


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
    assert problems(config(PCI="n", SERIAL_8250_PNP="n"), Guest(acpi=False)) == []
    assert problems(config(PCI="n", SERIAL_8250_PNP="n", ACPI="n"), DISK) == []


def test_with_acpi_off_only_the_command_line_is_left() -> None:
    assert problems(config(ACPI="n"), Guest(acpi=False)) == []
    (problem,) = problems(config(VIRTIO_MMIO_CMDLINE_DEVICES="n"), Guest(acpi=False))
    assert str(problem) == (
        "the kernel lacks CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES (virtio-mmio discovery with "
        "acpi=off): no disk is found"
    )


def test_by_acpi_alone() -> None:
    by_acpi = Guest(cmdline_devices=False)
    assert problems(config(VIRTIO_MMIO_CMDLINE_DEVICES="n"), by_acpi) == []
    (problem,) = problems(config(ACPI="n"), by_acpi)
    assert str(problem) == (
        "the kernel lacks CONFIG_ACPI (virtio-mmio discovery by ACPI): no disk is found"
    )
    (problem,) = problems(config(PCI="n"), by_acpi)
    assert "(--discovery cmdline may help)" in str(problem)


def test_a_virtio_console_needs_no_serial_port() -> None:
    hvc = Guest(console="hvc0")
    (problem,) = problems(config(), hvc)
    assert str(problem) == (
        "the kernel lacks CONFIG_VIRTIO_CONSOLE (console hvc0): "
        "no hvc0 shows anything or takes what is typed"
    )
    without = {"SERIAL_8250": "n", "SERIAL_8250_CONSOLE": "n", "SERIAL_8250_PNP": "n"}
    assert problems(config(VIRTIO_CONSOLE="y", **without), hvc) == []
    (problem,) = problems(config(VIRTIO_CONSOLE="m"), hvc)
    assert (problem.option, problem.state) == ("VIRTIO_CONSOLE", "m")
    assert problems(config(VIRTIO_CONSOLE="m"), hvc.replace(initrd_compression=Compression.NONE)) \
        == []


def test_a_virtio_console_is_a_device_without_a_disk_too() -> None:
    alone = Guest(console="hvc0", has_disk=False)
    assert problems(config(VIRTIO_CONSOLE="y", VIRTIO_BLK="n", BLOCK="n"), alone) == []
    (problem,) = problems(config(VIRTIO_CONSOLE="y", VIRTIO_MMIO="n"), alone)
    assert str(problem) == (
        "the kernel lacks CONFIG_VIRTIO_MMIO (virtio-mmio): no hvc0 is found"
    )


def test_another_console_is_not_ours_to_judge() -> None:
    without = {"SERIAL_8250": "n", "SERIAL_8250_CONSOLE": "n", "SERIAL_8250_PNP": "n"}
    assert problems(config(**without), Guest(console="")) == []


SMP = {"SMP": "y", "NR_CPUS": "4", "X86_MPPARSE": "y"}


def test_several_vcpus() -> None:
    assert problems(config(), Guest(cpus=1)) == []
    (problem,) = problems(config(), Guest(cpus=2))
    assert str(problem) == "the kernel lacks CONFIG_SMP (several vCPUs): only one vCPU runs"
    assert problems(config(**SMP), Guest(cpus=4)) == []
    (problem,) = problems(config(**SMP), Guest(cpus=5))
    assert str(problem) == "the kernel has CONFIG_NR_CPUS=4 (5 vCPUs): no more of them run"
    assert (problem.option, problem.state) == ("NR_CPUS", "4")


def test_vcpus_are_found_by_acpi_or_by_the_mp_table() -> None:
    no_table = SMP | {"X86_MPPARSE": "n"}
    assert problems(config(**no_table), Guest(cpus=2)) == []
    (problem,) = problems(config(**no_table), Guest(cpus=2, acpi=False))
    assert str(problem) == (
        "the kernel lacks CONFIG_X86_MPPARSE (finding vCPUs without ACPI): only one vCPU runs"
    )
    (problem,) = problems(config(**no_table, ACPI="n"), Guest(cpus=2))
    assert "has neither CONFIG_ACPI nor CONFIG_X86_MPPARSE" in str(problem)
    assert problems(config(**no_table), Guest(cpus=1, acpi=False)) == []


@pytest.mark.parametrize(("table", "option"), [
    ("gpt", "EFI_PARTITION"), ("dos", "MSDOS_PARTITION"),
])
def test_a_root_on_a_partition(table: str, option: str) -> None:
    (problem,) = problems(config(), Guest(partitions=table))
    assert problem.option == option
    assert problems(config(**{f"C_{option}": "y"}), Guest(partitions=table)) == []
    assert problems(config(**{f"C_{option}": "y"}), Guest(partitions="any")) == []
    (problem,) = problems(config(), Guest(partitions="any"))
    assert "has neither CONFIG_EFI_PARTITION nor CONFIG_MSDOS_PARTITION" in str(problem)


def test_an_initrd_that_is_a_file_system() -> None:
    guest = Guest(initrd_compression=Compression.NONE, is_ram_disk=True)
    for state in ("n", "m"):
        (problem,) = problems(config(BLK_DEV_RAM=state), guest)
        assert problem.option == "BLK_DEV_RAM"
    assert problems(config(BLK_DEV_RAM="y"), guest) == []


def test_what_a_squashfs_is_packed_with() -> None:
    guest = Guest(file_system="squashfs", squashfs="ZSTD")
    assert [p.option for p in problems(config(), guest)] == ["SQUASHFS"]
    assert [p.option for p in problems(config(SQUASHFS="y"), guest)] == ["SQUASHFS_ZSTD"]
    assert problems(config(SQUASHFS="y", SQUASHFS_ZSTD="y"), guest) == []


def test_devtmpfs_may_be_mounted_by_the_command_line() -> None:
    assert notes(config(DEVTMPFS_MOUNT="n"), Guest(mounts_devtmpfs=True)) == []


def test_the_options_of_all_guests_are_known() -> None:
    assert known_options() == {*OPTIONS, "NR_CPUS", *BUILT_IN}
    complete = KernelConfig(dict.fromkeys(OPTIONS, "y") | {"NR_CPUS": "8"}, "test")
    for guest in every_guest():
        assert problems(complete, guest) == notes(complete, guest) == []


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


@pytest.mark.parametrize("kind", sorted(set(Compression) - {Compression.NONE}, key=str))
def test_the_initrds_compression(kind: Compression) -> None:
    lacking = config(RD_GZIP="n")
    (problem,) = problems(lacking, Guest(initrd_compression=kind))
    assert problem.option == f"RD_{kind.value}"
    assert problems(lacking, Guest(initrd_compression=Compression.NONE)) == []


def test_a_finding_shows_every_setting() -> None:
    found = {f.requirement.purpose: str(f) for f in judge(config(ACPI="n", VIRTIO_BLK="m"), DISK)}
    assert found["virtio-blk"] == "VIRTIO_BLK=m"
    assert found["virtio-mmio discovery"] == "VIRTIO_MMIO_CMDLINE_DEVICES=y, ACPI is not set"
