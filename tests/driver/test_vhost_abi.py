"""vhost_abi.py against the system's own <linux/vhost.h>, by a C probe generated from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvmm.driver import vhost_abi
from tests.support.abi_probe import AbiModule

ABI = AbiModule(vhost_abi, "linux/vhost.h", "linux/virtio_config.h")


def test_every_number_size_and_offset_is_the_kernels(tmp_path: Path) -> None:
    assert ABI.claims() == ABI.as_c_has_it(tmp_path)


def test_the_probe_covers_every_public_name() -> None:
    assert set(ABI.public) == {*ABI.ioctls, *ABI.constants, *ABI.structures}
    assert len(ABI.ioctls) > 15
    assert len(ABI.structures) == 7


def test_padding_is_explicit() -> None:
    assert ABI.gaps() == []


def test_every_ioctl_has_a_name_for_errors() -> None:
    assert ABI.ioctl_names == ABI.ioctls


def test_a_value_that_does_not_fit_its_field_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vhost_vring_state\.num: 0x100000000 does not fit"):
        vhost_abi.vhost_vring_state(index=0, num=1 << 32)
