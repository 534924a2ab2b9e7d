"""abi.py against the system's own <linux/kvm.h>, by a C probe generated from abi.py itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvmm.kvm import abi, irqchip_abi, state_abi
from tests.support.abi_probe import AbiModule

ABI = AbiModule(abi, "linux/kvm.h", "asm/kvm_para.h")
IRQCHIP = AbiModule(irqchip_abi, "linux/kvm.h")
STATE = AbiModule(state_abi, "linux/kvm.h")


@pytest.mark.parametrize("module", [ABI, IRQCHIP, STATE])
def test_every_number_size_and_offset_is_the_kernels(tmp_path: Path, module: AbiModule) -> None:
    assert module.claims() == module.as_c_has_it(tmp_path)


def test_the_probe_covers_every_public_name_of_abi() -> None:
    assert set(ABI.public) == {*ABI.ioctls, *ABI.constants, *ABI.structures}
    assert len(ABI.ioctls) > 20
    assert len(ABI.structures) > 10
    for module in (IRQCHIP, STATE):
        assert set(module.public) == {*module.ioctls, *module.constants, *module.structures}


def test_structures_have_no_undeclared_gaps_in_the_middle() -> None:
    """Padding is explicit, so no field of C hides between two of ours."""
    assert ABI.gaps() == IRQCHIP.gaps() == STATE.gaps() == []


def test_every_ioctl_has_a_name_for_errors() -> None:
    assert ABI.ioctl_names == ABI.ioctls
    assert IRQCHIP.ioctl_names == IRQCHIP.ioctls
    assert STATE.ioctl_names == STATE.ioctls


@pytest.mark.parametrize(("field", "value"), [("slot", 1 << 32), ("flags", -1)])
def test_a_value_that_does_not_fit_its_field_is_refused(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"kvm_userspace_memory_region\.{field}"):
        abi.kvm_userspace_memory_region(**{field: value})
    with pytest.raises(ValueError, match="does not fit"):
        setattr(abi.kvm_userspace_memory_region(), field, value)


def test_a_misspelt_field_is_refused() -> None:
    with pytest.raises(AttributeError):
        abi.kvm_regs().raz = 1
    with pytest.raises(AttributeError):
        abi.kvm_regs(raz=1)
