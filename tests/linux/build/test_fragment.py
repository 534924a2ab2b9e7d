"""The rules of pyvmm.config: short, every block with its reason, no option twice."""

from __future__ import annotations

import re
from collections import Counter

from pyvmm.linux.build import options as build

OPTION = re.compile(r"CONFIG_\w+=\S+|# CONFIG_\w+ is not set")


def test_is_short() -> None:
    assert len(build.FRAGMENT.read_text().splitlines()) < 150


def test_every_line_is_an_option_a_reason_or_empty() -> None:
    for line in build.FRAGMENT.read_text().splitlines():
        assert not line or line.startswith("# ") or OPTION.fullmatch(line), line


def test_every_block_of_options_starts_with_its_reason() -> None:
    for block in build.FRAGMENT.read_text().strip().split("\n\n"):
        first = block.splitlines()[0]
        assert first.startswith("# "), block
        assert not OPTION.fullmatch(first), block


def test_no_option_stands_twice() -> None:
    names = re.findall(r"^(?:# )?(CONFIG_\w+)(?:=| is not set)", build.FRAGMENT.read_text(),
                       re.MULTILINE)
    assert [name for name, count in Counter(names).items() if count > 1] == []


def test_has_what_the_machine_offers() -> None:
    found = build.parse_config(build.FRAGMENT.read_text())
    for name in ("SERIAL_8250_CONSOLE", "ACPI", "VMGENID", "VIRTIO_BLK", "EXT4_FS",
                 "DEVTMPFS_MOUNT", "KVM_GUEST", "BLK_DEV_INITRD", "X86_IOPL_IOPERM"):
        assert found[f"CONFIG_{name}"] == "y"
    assert found["CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES"] == "n", "each disk is announced once"


def test_the_needs_of_a_foreign_configuration_are_options_of_ours() -> None:
    """Or this kernel of ours would not boot where theirs does."""
    ours, needs = (build.read_fragment(path) for path in (build.FRAGMENT, build.NEEDS))
    assert needs.items() <= ours.items()
    assert set(needs.values()) == {"y"}, "nothing of theirs is taken away"
