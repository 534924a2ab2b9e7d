"""A configuration and a kernel as plain data, and back."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.config import MAX_DISKS, DiskConfig, RunConfig
from pyvmm.errors import StateError
from pyvmm.snapshot.config_record import (
    restore_config,
    restore_kernel,
    save_config,
    save_kernel,
)
from pyvmm.storage.open import DiskSource
from pyvmm.virtio.rate_limit import RateLimit
from pyvmm.x86 import layout
from pyvmm.x86.image import EntryKind, Kernel, KernelKind
from tests.support.virtio_states import assert_plain, junk, replaced, walk, without

ascii_texts = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20)
names = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20)
limits = st.just(RateLimit()) | st.builds(
    RateLimit, ops_per_s=st.integers(1, 1000), ops_burst=st.integers(0, 9),
    bytes_per_s=st.integers(1, 1 << 40), bytes_burst=st.integers(0, 1 << 40),
)


@st.composite
def configs(draw: st.DrawFn) -> RunConfig:
    """Any configuration whose disks can be saved."""
    disks = tuple(
        DiskConfig(
            source=DiskSource(location=f"/disks/{index}", read_only=draw(st.booleans())),
            serial=draw(st.sampled_from(["", "serial"])), queues=draw(st.integers(1, 8)),
            writeback=draw(st.booleans()), rate_limit=draw(limits),
        )
        for index in range(draw(st.integers(0, MAX_DISKS)))
    )
    return RunConfig(
        kernel=draw(names), disks=disks, initrd=draw(st.none() | names),
        cmdline=draw(st.none() | ascii_texts), append=draw(ascii_texts),
        memory_bytes=draw(st.integers(16, 8192)) * layout.MIB, cpus=draw(st.integers(1, 8)),
        console=draw(st.sampled_from(["stdio", "none", "/tmp/console"])),
        mmio=draw(st.sampled_from(["mapped", "trapped"])),
        serve=draw(st.sampled_from(["thread", "exit"])),
        rtc=draw(st.sampled_from(["utc", "none"])), timing=draw(st.booleans()),
        discovery=draw(st.sampled_from(["both", "acpi", "cmdline"])),
        agent=draw(st.sampled_from(["none", "image"])),
    )


@given(config=configs(), devices=st.lists(names, max_size=3))
def test_a_configuration_is_the_same_again(config: RunConfig, devices: list[str]) -> None:
    data = save_config(config, devices)
    assert_plain(data)
    sources = [disk.source for disk in config.disks if isinstance(disk, DiskConfig)]
    assert restore_config(data, sources) == (config, tuple(devices))


def test_a_time_limit_is_no_part_of_it() -> None:
    config = RunConfig(kernel="k", timeout_s=5.0)
    assert restore_config(save_config(config), [])[0] == config.replace(timeout_s=None)


GOOD = RunConfig(
    kernel="bzImage", disks=(DiskConfig(source=DiskSource(location="/disk")),), memory_bytes=1 << 28
)


@given(data=st.data())
def test_a_spoilt_configuration_is_one_error_or_a_good_one(data: st.DataObject) -> None:
    good: Any = save_config(GOOD, ["chance"])
    path = data.draw(st.sampled_from([path for path, _ in walk(good)]), "path")
    spoilt = without(good, path) if data.draw(st.booleans(), "removed") else (
        replaced(good, path, data.draw(junk, "junk"))
    )
    with contextlib.suppress(StateError):
        config, _ = restore_config(spoilt, [DiskSource(location="/disk")])
        assert isinstance(config, RunConfig)


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("cpus", 9, r"^config: cannot be used: --cpus 9: must be from 1 to 8$"),
        ("mmio", "both", r"^config: cannot be used: --mmio both: is none of mapped, trapped$"),
        ("kernel", None, r"^config: kernel is None$"),
        ("memory_bytes", 1, r"^config: cannot be used: --memory 1: must be from 16M"),
        ("disks", [], r"^config: disks is not a list of 1$"),
        ("devices", [1], r"^config: devices has an element that is no name$"),
        ("extra", 1, r"^config: has no field 'extra'$"),
    ],
)
def test_a_field_that_cannot_be_is_named(name: str, value: object, problem: str) -> None:
    with pytest.raises(StateError, match=problem):
        restore_config(save_config(GOOD) | {name: value}, [DiskSource(location="/disk")])


KERNEL = Kernel(
    path="/boot/bzImage", kind=KernelKind.BZIMAGE, start=0x100000, end=0x2000000, entry=0x100200,
    entry_kind=EntryKind.LINUX_64, segments=(), setup_header=b"HdrS", initrd_addr_max=1 << 31,
    cmdline_limit=2047, protocol=0x20F, version="6.1.0 (builder) #1", is_linux=True,
)


def test_a_kernel_is_described_as_before() -> None:
    data = save_kernel(KERNEL)
    assert_plain(data)
    again = restore_kernel(data)
    assert again.describe() == KERNEL.describe()
    assert again.is_linux


@given(data=st.data())
def test_a_spoilt_kernel_is_one_error_or_a_good_one(data: st.DataObject) -> None:
    good = save_kernel(KERNEL)
    name = data.draw(st.sampled_from(sorted(good)))
    with contextlib.suppress(StateError):
        restore_kernel(good | {name: data.draw(junk, "junk")}).describe()
