"""State of a vCPU and of the chips: the order of ioctls, old KVMs, refusals; no KVM needed."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.errors import HostError, KvmError, StateError
from pyvmm.kvm import abi, irqchip_abi, state_abi
from pyvmm.kvm.handles import Kvm, Vcpu, Vm
from pyvmm.kvm.state import _MSRS_AT_ONCE, LAST_MSRS
from tests.kvm.conftest import FakeKernel
from tests.support.states import is_plain, spoilt

MSRS = [0xC000_0080, 0x6E0, 0x10, 0x17B, 0x1A0, *range(0x1000, 0x1000 + _MSRS_AT_ONCE)]
"""As KVM lists them: of these, it gives no value for 0x17B."""


def _kvm_with(kernel: FakeKernel, capabilities: dict[int, int]) -> None:
    """Have ``kernel`` play a KVM with ``capabilities``, all of whose structures hold 0x5a bytes."""

    def structure(buffer: bytearray) -> int:
        buffer[:] = bytes([0x5A]) * len(buffer)
        return 0

    def chip(buffer: bytearray) -> int:
        buffer[8:] = bytes([buffer[0]]) * (len(buffer) - 8)
        return 0

    def msr_list(buffer: bytearray) -> int:
        room = struct.unpack_from("<I", buffer)[0]
        struct.pack_into("<I", buffer, 0, len(MSRS))
        if room < len(MSRS):
            raise OSError(errno.E2BIG, "too small")
        struct.pack_into(f"<{len(MSRS)}I", buffer, 4, *MSRS)
        return 0

    def msrs(buffer: bytearray) -> int:
        count = int(struct.unpack_from("<I", buffer)[0])
        for at in range(count):
            index = struct.unpack_from("<I", buffer, 8 + 16 * at)[0]
            if index == 0x17B:
                return at
            struct.pack_into("<Q", buffer, 16 + 16 * at, index + 1)
        return count

    def set_msrs(buffer: bytearray) -> int:
        return int(struct.unpack_from("<I", buffer)[0])

    for name in ("REGS", "SREGS", "SREGS2", "XSAVE", "XSAVE2", "XCRS", "DEBUGREGS", "LAPIC",
                 "VCPU_EVENTS", "PIT2", "CLOCK"):
        kernel.answers[f"KVM_GET_{name}"] = structure
    kernel.answers |= {
        "KVM_GET_MSR_INDEX_LIST": msr_list, "KVM_GET_MSRS": msrs, "KVM_SET_MSRS": set_msrs,
        "KVM_GET_IRQCHIP": chip, "KVM_GET_TSC_KHZ": 2_000_000,
    }
    plain = kernel.ioctl

    def ioctl(
        fd: int, request: int, argument: ctypes.Structure | bytearray | int = 0
    ) -> int:
        if request == abi.KVM_CHECK_EXTENSION and isinstance(argument, int):
            return capabilities.get(argument, 0)
        return plain(fd, request, argument)

    kernel.ioctl = ioctl  # type: ignore[method-assign]


NEW = {
    state_abi.KVM_CAP_SREGS2: 1, state_abi.KVM_CAP_XSAVE2: 8192, state_abi.KVM_CAP_XCRS: 1,
    state_abi.KVM_CAP_XSAVE: 1, state_abi.KVM_CAP_GET_TSC_KHZ: 1,
}
OLD = {state_abi.KVM_CAP_XSAVE: 1}


class Rig:
    """A vCPU and a VM over /dev/null, whose ioctls go to ``kernel``."""

    def __init__(
        self, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch, capabilities: dict[int, int]
    ) -> None:
        self.kernel = kernel
        _kvm_with(kernel, capabilities)
        monkeypatch.setattr("fcntl.ioctl", kernel.ioctl)
        self.kvm = Kvm("/dev/null")
        self.vm = Vm(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC), 8192, self.kvm)
        self.vcpu = Vcpu(
            os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC), mmap.mmap(-1, 8192), 3, self.kvm
        )

    def names(self) -> list[str]:
        """The ioctls since the last time, without the prefix; repeated ones once."""
        calls = [name.removeprefix("KVM_") for name, _ in self.kernel.calls]
        self.kernel.calls.clear()
        return [name for name, before in zip(calls, ["", *calls], strict=False) if name != before]

    def changes(self) -> list[str]:
        """The ioctls of ``names`` that change something."""
        return [name for name in self.names() if not name.startswith("GET_")]

    def close(self) -> None:
        self.vcpu.close()
        self.vm.close()
        self.kvm.close()


@pytest.fixture
def rig(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    made = Rig(kernel, monkeypatch, dict(NEW))
    made.names()
    yield made
    made.close()


@pytest.fixture
def old(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    made = Rig(kernel, monkeypatch, dict(OLD))
    made.names()
    yield made
    made.close()


def test_a_vcpu_is_saved_in_an_order_that_loses_nothing(rig: Rig) -> None:
    state = rig.vcpu.save()
    assert is_plain(state)
    assert rig.names() == [
        "GET_MP_STATE", "GET_REGS", "GET_SREGS2", "GET_XSAVE2", "GET_XCRS", "GET_DEBUGREGS",
        "GET_LAPIC", "GET_TSC_KHZ", "GET_DEVICE_ATTR", "GET_MSR_INDEX_LIST", "GET_MSRS",
        "GET_VCPU_EVENTS",
    ]
    assert state["xsave"] == bytes([0x5A]) * 8192
    assert state["sregs"] is None
    assert state["msrs"][:3] == [  # type: ignore[index]
        [0xC000_0080, 0xC000_0081], [0x6E0, 0x6E1], [0x10, 0x11],
    ]
    indices = [index for index, _ in state["msrs"]]  # type: ignore[attr-defined]
    assert set(MSRS) - set(indices) == {0x17B}
    assert {0x200, 0x2FF} <= set(indices), "KVM lists no MTRRs"


def test_a_vcpu_is_restored_in_the_order_that_kvm_needs(rig: Rig) -> None:
    state = rig.vcpu.save()
    rig.names()
    rig.vcpu.restore(state)
    written = [
        struct.unpack_from("<I", data, 8 + 16 * at)[0]
        for name, data in rig.kernel.calls if name == "KVM_SET_MSRS" and isinstance(data, bytes)
        for at in range((len(data) - 8) // 16)
    ]
    assert rig.changes() == [
        "SET_MP_STATE", "SET_REGS", "SET_SREGS2", "SET_XCRS", "SET_XSAVE",
        "SET_DEBUGREGS", "SET_LAPIC", "SET_MSRS", "SET_VCPU_EVENTS",
    ]
    assert written[-2:] == list(LAST_MSRS)
    assert sorted(written) == sorted(index for index, _ in state["msrs"])  # type: ignore[attr-defined]
    cr8 = rig.vcpu.page.get_int(abi.kvm_run.cr8.offset, 8)
    assert cr8 == 0x5A5A_5A5A_5A5A_5A5A, "for a VM without a local APIC"


def test_the_first_vcpus_tsc_is_set_twice_so_that_kvm_takes_it(rig: Rig) -> None:
    """Else Linux before 6.7 keeps its own TSC, if that is less than a second away."""
    state = rig.vcpu.save()
    for index, times in ((3, 1), (0, 2)):
        rig.vcpu.index = index
        rig.kernel.calls.clear()
        rig.vcpu.restore(state)
        written = [
            struct.unpack_from("<Q", data, 16 + 16 * at)[0]
            for name, data in rig.kernel.calls
            if name == "KVM_SET_MSRS" and isinstance(data, bytes)
            for at in range((len(data) - 8) // 16)
            if struct.unpack_from("<I", data, 8 + 16 * at)[0] == 0x10
        ]
        assert len(written) == times
        assert written[-1] == 0x11
        assert all(abs(tsc - 0x11) > 1 << 40 for tsc in written[:-1])


def test_time_that_has_passed_is_in_the_tsc_and_in_kvm_clock(rig: Rig) -> None:
    state, chips = rig.vcpu.save() | {"tsc_khz": 2_000_000}, rig.vm.save()
    rig.kernel.calls.clear()
    rig.vcpu.restore(state, 3_000_000_000)
    rig.vm.restore(chips, 3_000_000_000)
    tscs = [
        struct.unpack_from("<Q", data, 16 + 16 * at)[0]
        for name, data in rig.kernel.calls if name == "KVM_SET_MSRS" and isinstance(data, bytes)
        for at in range((len(data) - 8) // 16)
        if struct.unpack_from("<I", data, 8 + 16 * at)[0] == 0x10
    ]
    assert tscs == [0x11 + 6_000_000_000]
    clock = next(data for name, data in rig.kernel.calls if name == "KVM_SET_CLOCK")
    assert isinstance(clock, bytes)
    assert struct.unpack_from("<Q", clock)[0] == 0x5A5A_5A5A_5A5A_5A5A + 3_000_000_000


def test_an_old_kvm_is_asked_for_what_it_has(old: Rig) -> None:
    old.kernel.answers["KVM_GET_DEVICE_ATTR"] = OSError(errno.ENXIO, "no attributes")
    state = old.vcpu.save()
    assert old.names() == [
        "GET_MP_STATE", "GET_REGS", "GET_SREGS", "GET_XSAVE", "GET_DEBUGREGS", "GET_LAPIC",
        "GET_DEVICE_ATTR", "GET_MSR_INDEX_LIST", "GET_MSRS", "GET_VCPU_EVENTS",
    ]
    assert [state[name] for name in ("sregs2", "xcrs", "tsc_khz", "tsc_offset")] == [None] * 4
    old.vcpu.restore(state)
    assert old.changes() == [
        "SET_MP_STATE", "SET_REGS", "SET_SREGS", "SET_XSAVE", "SET_DEBUGREGS", "SET_LAPIC",
        "SET_MSRS", "SET_VCPU_EVENTS",
    ]


def test_the_tsc_is_scaled_only_if_it_must_be(rig: Rig) -> None:
    state = rig.vcpu.save()
    rig.vcpu.restore(state | {"tsc_khz": 2_000_400})
    assert "SET_TSC_KHZ" not in rig.names(), "200 ppm, which KVM tolerates itself"
    rig.vcpu.restore(state | {"tsc_khz": 2_100_000})
    assert "SET_TSC_KHZ" in rig.names()
    rig.kernel.answers["KVM_SET_TSC_KHZ"] = OSError(errno.EINVAL, "no scaling")
    with pytest.raises(StateError, match=r"^vcpu3: tsc_khz is refused by KVM: KVM_SET_TSC_KHZ"):
        rig.vcpu.restore(state | {"tsc_khz": 2_100_000})


def test_an_msr_that_kvm_refuses_is_an_error_unless_it_has_the_value(rig: Rig) -> None:
    state = rig.vcpu.save()

    def all_but_one(buffer: bytearray) -> int:
        count = int(struct.unpack_from("<I", buffer)[0])
        indices = [struct.unpack_from("<I", buffer, 8 + 16 * at)[0] for at in range(count)]
        return indices.index(0x1A0) if 0x1A0 in indices else count

    rig.kernel.answers["KVM_SET_MSRS"] = all_but_one
    rig.vcpu.restore(state)
    other = [[i, 7] if i == 0x1A0 else [i, v] for i, v in state["msrs"]]  # type: ignore[attr-defined]
    with pytest.raises(StateError, match=r"^vcpu3: msrs is refused by KVM: MSR 0x1a0$"):
        rig.vcpu.restore(state | {"msrs": other})


@pytest.mark.parametrize("name", ["REGS", "SREGS2", "XSAVE", "XCRS", "DEBUGREGS", "LAPIC"])
def test_a_refused_structure_is_named(rig: Rig, name: str) -> None:
    state = rig.vcpu.save()
    rig.kernel.answers[f"KVM_SET_{name}"] = OSError(errno.EINVAL, "invalid")
    with pytest.raises(StateError) as caught:
        rig.vcpu.restore(state)
    assert str(caught.value) == (
        f"vcpu3: {name.lower()} is refused by KVM: KVM_SET_{name}: Invalid argument [errno 22]"
    )


def test_another_hosts_xsave_is_refused_by_its_size(rig: Rig) -> None:
    with pytest.raises(StateError, match=r"^vcpu3: xsave is not 8192 to 65536 bytes$"):
        rig.vcpu.restore(rig.vcpu.save() | {"xsave": bytes(4096)})


def test_the_chips_are_saved_and_restored_with_the_clock_before_them(rig: Rig) -> None:
    state = rig.vm.save()
    assert is_plain(state)
    assert rig.names() == ["GET_IRQCHIP", "GET_PIT2", "GET_CLOCK"]
    rig.vm.restore(state)
    calls = list(rig.kernel.calls)
    assert rig.changes() == ["SET_PIT2", "SET_CLOCK", "SET_IRQCHIP"]
    chips = [data for name, data in calls if name == "KVM_SET_IRQCHIP"]
    assert [chip[0] for chip in chips if isinstance(chip, bytes)] == [0, 1, 2]
    clock = next(data for name, data in calls if name == "KVM_SET_CLOCK")
    assert isinstance(clock, bytes)
    assert clock[8:12] == bytes(4), "no KVM_CLOCK_REALTIME: time stood still"


def test_a_vm_without_chips_has_none_in_its_state(rig: Rig) -> None:
    for name in ("IRQCHIP", "PIT2"):
        rig.kernel.answers[f"KVM_GET_{name}"] = OSError(errno.ENXIO, "none")
    rig.kernel.answers["KVM_GET_LAPIC"] = OSError(errno.EINVAL, "none")
    state = rig.vm.save()
    assert {name for name, value in state.items() if value is None} == {
        "pic_master", "pic_slave", "ioapic", "pit2",
    }
    rig.names()
    rig.vm.restore(state)
    assert rig.changes() == ["SET_CLOCK"]
    assert rig.vcpu.save()["lapic"] is None


@pytest.mark.parametrize("name", ["pic_master", "ioapic", "pit2"])
def test_a_chip_must_be_in_the_state_if_and_only_if_it_is_in_the_machine(
    rig: Rig, name: str
) -> None:
    state = rig.vm.save()
    with pytest.raises(StateError, match=f"^chips: {name} is missing$"):
        rig.vm.restore(state | {name: None})
    kind = "PIT2" if name == "pit2" else "IRQCHIP"
    rig.kernel.answers[f"KVM_GET_{kind}"] = OSError(errno.ENXIO, "none")
    with pytest.raises(StateError, match=r"^chips: [a-z_0-9]+ is no part of this machine$"):
        rig.vm.restore(state)


@pytest.mark.parametrize("name", ["lapic", "xcrs"])
def test_so_must_a_vcpus_parts(rig: Rig, name: str) -> None:
    with pytest.raises(StateError, match=f"^vcpu3: {name} is missing$"):
        rig.vcpu.restore(rig.vcpu.save() | {name: None})


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("KVM_GET_LAPIC", lambda rig: rig.vcpu.save()),
        ("KVM_GET_MSR_INDEX_LIST", lambda rig: rig.vcpu.save()),
        ("KVM_GET_IRQCHIP", lambda rig: rig.vm.save()),
        ("KVM_GET_CLOCK", lambda rig: rig.vm.save()),
    ],
)
def test_a_host_that_fails_while_saving_is_a_kvm_error(
    rig: Rig, name: str, call: Callable[[Rig], object]
) -> None:
    rig.kernel.answers[name] = OSError(errno.ENOMEM, "no memory")
    with pytest.raises(KvmError, match=name):
        call(rig)


def test_a_vcpu_is_saved_only_while_its_kvm_is_open(rig: Rig) -> None:
    rig.kvm.close()
    with pytest.raises(HostError, match="only while the /dev/kvm that made it is open"):
        rig.vcpu.save()


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_junk_is_a_state_error_before_any_ioctl(rig: Rig, data: st.DataObject) -> None:
    for part in (rig.vcpu, rig.vm):
        state = part.save()
        rig.names()
        try:
            part.restore(data.draw(spoilt(state)))
        except StateError:
            assert not any(name.startswith("SET_") for name in rig.names())


def test_the_sizes_of_all_fields_are_the_kernels(rig: Rig) -> None:
    sizes = {
        name: len(value)
        for state in (rig.vcpu.save(), rig.vm.save())
        for name, value in state.items() if isinstance(value, bytes)
    }
    assert sizes == {
        "regs": 144, "sregs2": 320, "xsave": 8192, "xcrs": 392, "debugregs": 128, "lapic": 1024,
        "events": 64, "pic_master": 520, "pic_slave": 520, "ioapic": 520, "pit2": 112, "clock": 48,
    }
    assert ctypes.sizeof(irqchip_abi.kvm_irqchip) == 520
