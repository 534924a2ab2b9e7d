"""Options and their limits: each refusal is one line that names the option."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pyvmm.cli.parse import parse_cpus, parse_disk, parse_size
from pyvmm.config import (
    DEFAULT_CMDLINE,
    DiskConfig,
    RunConfig,
    VhostUserDiskConfig,
    format_size,
)
from pyvmm.errors import ConfigError
from pyvmm.storage.open import DiskSource
from pyvmm.virtio.rate_limit import RateLimit
from pyvmm.x86 import layout

KERNEL = Path("bzImage")


@pytest.mark.parametrize(("text", "size"), [
    ("256M", 256 << 20), ("1G", 1 << 30), ("1g", 1 << 30), ("512MiB", 512 << 20),
    ("1048576", 1 << 20), ("64KB", 64 << 10),
])
def test_sizes(text: str, size: int) -> None:
    assert parse_size("--memory", text) == size


@pytest.mark.parametrize("text", ["", "M", "-1M", "1.5G", "lots", "256X", "٣M", "0x10"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--memory"):
        parse_size("--memory", text)


@pytest.mark.parametrize("size", [1 << 20, 256 << 20, 3 << 30, 1 << 40, 1000])
def test_format_size_is_read_back(size: int) -> None:
    assert parse_size("--memory", format_size(size)) == size


def places(count: int) -> list[tuple[int, int]]:
    """Where the first ``count`` devices of a board are."""
    return [layout.virtio_slot(index) for index in range(count)]


def disk(location: str, **source: bool | str) -> DiskConfig:
    return DiskConfig(source=DiskSource(location=location, **source))  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "config"), [
    ("root.img", disk("root.img")),
    ("root.img,ro", disk("root.img", read_only=True)),
    ("a,,b.img,serial=X1", DiskConfig(source=DiskSource(location="a,b.img"), serial="X1")),
    ("d,serial=12345678901234567890,ro", DiskConfig(
        source=DiskSource(location="d", read_only=True), serial="12345678901234567890")),
    ("base.img,snapshot", disk("base.img", snapshot=True)),
    ("base.img,overlay=o,,1", disk("base.img", snapshot=True, overlay="o,1")),
    ("base.img,snapshot,overlay=a=b", disk("base.img", snapshot=True, overlay="a=b")),
    ("nbd://host:1234/x", disk("nbd://host:1234/x")),
    ("nbd+unix:///x?socket=/s,ro", disk("nbd+unix:///x?socket=/s", read_only=True)),
    ("d,faults=script", disk("d", faults="script")),
    ("d,queues=8,writeback=off", DiskConfig(
        source=DiskSource(location="d"), queues=8, writeback=False)),
    ("d,writeback=on,queues=1", disk("d")),
    ("d,iops=1000,bps=10M", DiskConfig(
        source=DiskSource(location="d"),
        rate_limit=RateLimit(ops_per_s=1000, bytes_per_s=10 << 20))),
    ("d,iops=1K:5K,bps=1M:64M", DiskConfig(
        source=DiskSource(location="d"),
        rate_limit=RateLimit(
            ops_per_s=1024, ops_burst=5120, bytes_per_s=1 << 20, bytes_burst=64 << 20))),
])
def test_disks(text: str, config: DiskConfig) -> None:
    assert parse_disk(text) == config
    assert config.read_only == config.source.read_only


@pytest.mark.parametrize(("text", "config"), [
    ("vhost-user=/run/s", VhostUserDiskConfig(socket="/run/s")),
    ("vhost-user=a,,b=c,queues=4", VhostUserDiskConfig(socket="a,b=c", queues=4)),
])
def test_disks_of_other_processes(text: str, config: VhostUserDiskConfig) -> None:
    assert parse_disk(text) == config
    assert RunConfig(kernel=KERNEL, disks=(config,)).kernel_command_line().endswith("vda rw")


@pytest.mark.parametrize(("text", "words"), [
    ("vhost-user=", "names no socket"), ("vhost-user=,queues=2", "names no socket"),
    ("vhost-user=s,ro", "ro is for the back end"), ("vhost-user=s,snapshot", "snapshot is for"),
    ("vhost-user=s,iops=5", "iops is for the back end"), ("vhost-user=s,queues=9", "from 1 to 8"),
    ("", "names no file"), (",ro", "names no file"), ("d,rw", "'rw'"), ("d,serial=", "serial"),
    ("d,serial=123456789012345678901", "limit is 20"), ("d,serial=\x07", "printable"),
    ("d,ro=1", "'ro=1'"), ("d,", "''"), ("d,snapshot=on", "'snapshot=on'"),
    ("d,queues", "queues= wants a value"),
    ("d,ro,ro", "ro twice"), ("d,serial=a,serial=b", "serial twice"),
    ("d,ro,snapshot", "either ro or a snapshot"), ("d,overlay=o,ro", "either ro or a snapshot"),
    ("d,overlay=", "overlay=FILE"), ("d,faults=", "faults=FILE"),
    ("d,queues=0", "from 1 to 8"), ("d,queues=9", "from 1 to 8"), ("d,queues=two", "from 1 to 8"),
    ("d,queues=01", "from 1 to 8"), ("d,writeback=yes", "neither on nor off"),
    ("d,iops=0", "at least 1"), ("d,bps=1M:0", "at least 1"), ("d,iops=1:2:3", "RATE:BURST"),
    ("d,iops=fast", "not a size"), ("d,bps=:5", "not a size"), ("d,bps=-1", "not a size"),
])
def test_bad_disk_options_say_what_is_wrong(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match="--disk") as caught:
        parse_disk(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("memory_bytes", "limit"), [
    (0, "16M"), (8 << 20, "16M"), (1 << 50, "512G"), ((256 << 20) + 512, "whole number"),
])
def test_memory_outside_the_limits(memory_bytes: int, limit: str) -> None:
    with pytest.raises(ConfigError, match="--memory") as caught:
        RunConfig(kernel=KERNEL, memory_bytes=memory_bytes)
    assert limit in str(caught.value)


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("nan"), float("inf")])
def test_a_timeout_is_a_positive_number(timeout_s: float) -> None:
    with pytest.raises(ConfigError, match="--timeout"):
        RunConfig(kernel=KERNEL, timeout_s=timeout_s)


def test_more_disks_than_lines() -> None:
    with pytest.raises(ConfigError, match=r"9 disks.*8"):
        RunConfig(kernel=KERNEL, disks=tuple(disk(str(i)) for i in range(9)))


@pytest.mark.parametrize(("text", "words"), [
    ("d", "ro on both"), ("vhost-user=s", "serves one disk of one guest"),
])
def test_the_same_disk_twice(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match="given twice") as caught:
        RunConfig(kernel=KERNEL, disks=(parse_disk(text), parse_disk(text)))
    assert words in str(caught.value)


def test_the_default_command_line_mounts_the_first_disk() -> None:
    config = RunConfig(kernel=KERNEL, disks=(disk("d"),), append="quiet")
    assert config.kernel_command_line(places(2)) == (
        "virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6 "
        "console=ttyS0 reboot=k panic=-1 root=/dev/vda rw quiet"
    )


def test_a_read_only_root_is_mounted_read_only() -> None:
    config = RunConfig(kernel=KERNEL, disks=(disk("d", read_only=True),))
    assert "root=/dev/vda ro" in config.kernel_command_line()


def test_cmdline_replaces_the_base_but_not_the_devices() -> None:
    disks = (disk("a"), disk("b"))
    config = RunConfig(kernel=KERNEL, disks=disks, cmdline="console=ttyS0 init=/bin/sh")
    assert config.kernel_command_line(places(3)) == (
        "virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6 "
        "virtio_mmio.device=4K@0xd0002000:7 console=ttyS0 init=/bin/sh"
    )


@pytest.mark.parametrize("text", [
    "vhost-user:disk.sock", "vhost_user=disk.sock", "vhostuser=s", "Vhost-User=s",
    "vhost-user-blk=s", "vhost-user-blk:s",
])
def test_what_is_nearly_vhost_user_is_told_how_to_write_it(text: str) -> None:
    with pytest.raises(ConfigError, match="is written --disk vhost-user=SOCKET"):
        parse_disk(text)


def test_an_option_that_is_none_is_told_of_vhost_user() -> None:
    with pytest.raises(ConfigError, match="another process's disk is vhost-user=SOCKET"):
        parse_disk("disk.sock,vhost-user")


@pytest.mark.parametrize(("append", "words", "has_device", "is_virtio"), [
    ("", "console=ttyS0 reboot=k panic=-1", False, False),
    ("quiet", "console=ttyS0 reboot=k panic=-1 quiet", False, False),
    ("console=tty0", "console=ttyS0 reboot=k panic=-1 console=tty0", False, False),
    ('run="console=hvc0"', 'console=ttyS0 reboot=k panic=-1 run="console=hvc0"', False, False),
    ("console=ttyS0,9600", "reboot=k panic=-1 console=ttyS0,9600", False, False),
    ("console=hvc0 quiet", "reboot=k panic=-1 console=hvc0 quiet", True, True),
    ("console=hvc0 console=tty1", "reboot=k panic=-1 console=hvc0 console=tty1", True, True),
    ("console=ttyS0 console=hvc0", "reboot=k panic=-1 console=ttyS0 console=hvc0", True, True),
    ("console=hvc0 console=ttyS0", "reboot=k panic=-1 console=hvc0 console=ttyS0", True, False),
])
def test_fault_34_there_is_a_virtio_console_if_it_is_named_and_the_last_is_chosen(
    append: str, words: str, has_device: bool, is_virtio: bool
) -> None:
    config = RunConfig(kernel=KERNEL, append=append)
    assert config.kernel_command_line() == words
    assert (config.has_virtio_console, config.console_is_virtio) == (has_device, is_virtio)


def test_fault_34_a_command_line_of_the_users_own_is_left_alone() -> None:
    own = "console=ttyS0 root=/dev/vda"
    config = RunConfig(kernel=KERNEL, cmdline=own, append="console=hvc0")
    assert config.kernel_command_line().endswith(f"{own} console=hvc0")
    assert config.console_is_virtio
    assert not RunConfig(kernel=KERNEL, cmdline="root=/dev/vda").has_virtio_console


@pytest.mark.parametrize(("given", "words"), [
    ({"cpus": 0}, "from 1 to 8"), ({"cpus": 9}, "from 1 to 8"),
    ({"mmio": "fast"}, "mapped, trapped"), ({"discovery": "pci"}, "both, acpi, cmdline"),
    ({"serve": ""}, "thread, exit"), ({"agent": "yes"}, "none, image, inject"),
])
def test_what_is_no_choice_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"--{next(iter(given))}") as caught:
        RunConfig(kernel=KERNEL, **given)
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["two", "", "-1", "1.5", "٣", "9999999"])
def test_what_is_no_number_of_cpus_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--cpus"):
        parse_cpus(text)


def test_devices_may_be_left_to_acpi() -> None:
    config = RunConfig(kernel=KERNEL, disks=(disk("d"),), discovery="acpi")
    assert "virtio_mmio" not in config.kernel_command_line(places(2))
    config = RunConfig(kernel=KERNEL, disks=(disk("d"),), discovery="cmdline")
    assert config.kernel_command_line(places(2)).count("virtio_mmio.device=") == 2


def test_an_agent_that_is_brought_in_is_the_first_program_and_the_root_is_named_all_the_same(
) -> None:
    config = RunConfig(kernel=KERNEL, disks=(disk("d"),), append="quiet", agent="inject")
    assert config.kernel_command_line() == (
        f"rdinit=/pyvmm-agent {DEFAULT_CMDLINE} root=/dev/vda rw quiet"
    )
    for agent in ("none", "image"):
        config = RunConfig(kernel=KERNEL, disks=(disk("d"),), append="quiet", agent=agent)
        assert "rdinit" not in config.kernel_command_line()


@pytest.mark.parametrize(("initrd", "is_named"), [
    ("kernel/initramfs-6.1.0-57-cloud-amd64.cpio.gz", True), ("my.cpio.gz", False),
    ("/boot/initrd.img-6.1.0-57-amd64", False),
])
def test_an_agent_knows_of_a_root_to_come_in_the_initramfs_of_kernel_fetch(
    initrd: str, is_named: bool
) -> None:
    config = RunConfig(kernel=KERNEL, disks=(disk("d"),), initrd=initrd, agent="inject")
    assert ("root=/dev/vda rw" in config.kernel_command_line()) == is_named
    assert "root=" not in config.replace(agent="none").kernel_command_line()


@pytest.mark.parametrize("given", [{"append": "rdinit=/x"}, {"cmdline": 'a="b c" rdinit=/bin/sh'}])
def test_two_first_programs_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^--agent: the guest starts the agent by rdinit="):
        RunConfig(kernel=KERNEL, agent="inject", **given)
    RunConfig(kernel=KERNEL, agent="inject", append="x -- rdinit=/for/init")
    RunConfig(kernel=KERNEL, agent="image", **given)


def test_with_an_initrd_the_root_is_the_initrds_business() -> None:
    config = RunConfig(
        kernel=KERNEL, disks=(disk("d"),), initrd=Path("initrd")
    )
    assert "root=" not in config.kernel_command_line()
