"""The TSCs of several vCPUs: exactly as far apart as they were, whatever KVM made of the values."""

from __future__ import annotations

import ctypes
import errno

import pytest

from pyvmm.errors import KvmError
from pyvmm.kvm import abi, state_abi, tsc
from pyvmm.kvm.handles import Vcpu, Vm

MOST = (1 << 64) - 1


class OffsetKernel:
    """Vcpus with a TSC offset each, and a deadline that is lost or not when the offset is set."""

    def __init__(self, offsets: list[int]) -> None:
        self.offsets = dict(enumerate(offsets))
        self.deadlines = dict.fromkeys(self.offsets, 0)
        self.set_again: list[int] = []
        self.refusal: int | None = None
        self.order: list[int] = []

    def ioctl(self, fd: int, request: int, argument: ctypes.Structure) -> int:
        """Play KVM_GET_DEVICE_ATTR and KVM_SET_DEVICE_ATTR of vCPU ``fd``."""
        if self.refusal is not None:
            raise KvmError("KVM_GET_DEVICE_ATTR", self.refusal)
        assert isinstance(argument, state_abi.kvm_device_attr)
        assert (argument.flags, argument.group, argument.attr) == (0, 0, 0)
        value = ctypes.c_uint64.from_address(argument.addr)
        if request == abi.Ioctl(state_abi.KVM_GET_DEVICE_ATTR):
            value.value = self.offsets[fd]
        else:
            self.order.append(fd)
            self.offsets[fd] = value.value
        return 0


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> OffsetKernel:
    made = OffsetKernel([MOST - 10, 500, 777])
    monkeypatch.setattr(tsc, "ioctl", made.ioctl)
    monkeypatch.setattr(
        Vcpu, "get_msrs", lambda vcpu, _indices: {tsc.TSC_DEADLINE: made.deadlines[vcpu.fd]}
    )
    monkeypatch.setattr(Vcpu, "set_msrs", lambda vcpu, _msrs: made.set_again.append(vcpu.fd))
    return made


class Numbered(Vcpu):
    """A vCPU that is nothing but its number."""

    def __init__(self, number: int) -> None:
        self.fd = number


def vcpus(*offsets: int | None) -> dict[Vcpu, object]:
    return {Numbered(index): {"tsc_offset": value} for index, value in enumerate(offsets)}


def test_offsets_are_as_far_apart_as_they_were(kernel: OffsetKernel) -> None:
    tsc.align(vcpus(1000, 1000, 990))
    assert kernel.offsets == {0: MOST - 10, 1: MOST - 10, 2: MOST - 20}
    assert kernel.order == [0, 1, 2], "KVM compares each with the one before"


def test_differences_wrap_as_a_tsc_does(kernel: OffsetKernel) -> None:
    tsc.align(vcpus(0, MOST, 20))
    assert kernel.offsets == {0: MOST - 10, 1: MOST - 11, 2: 9}


def test_a_timer_that_waits_is_set_again(kernel: OffsetKernel) -> None:
    kernel.deadlines[1] = 12345
    tsc.align(vcpus(0, 0, 0))
    assert kernel.set_again == [1]


@pytest.mark.parametrize("code", [errno.ENXIO, errno.ENOTTY, errno.EINVAL])
def test_a_kvm_that_does_not_know_offsets_is_left_alone(kernel: OffsetKernel, code: int) -> None:
    kernel.refusal = code
    assert tsc.offset_of(Numbered(0)) is None
    tsc.align(vcpus(5, 5, 5))
    assert kernel.order == []


def test_other_refusals_are_errors(kernel: OffsetKernel) -> None:
    kernel.refusal = errno.EFAULT
    with pytest.raises(KvmError):
        tsc.offset_of(Numbered(0))


def test_a_state_of_such_a_kvm_is_too(kernel: OffsetKernel) -> None:
    tsc.align(vcpus(None, None, None))
    assert kernel.order == []


def test_ticks() -> None:
    assert tsc.ticks(2_596_090, 1_000_000_000) == 2_596_090_000
    assert tsc.ticks(1, 999_999) == 0


def test_an_offset_may_go_forward_with_all_others(kernel: OffsetKernel) -> None:
    tsc.align(vcpus(1000, 1000, 990), 15)
    assert kernel.offsets == {0: 4, 1: 4, 2: MOST - 5}


def test_the_clock_is_read_between_two_tscs_that_are_close(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads = iter([100, 500, 1000, 1010, 2000, 2400, 3000, 3900, 4000, 4100])
    clocks = iter([1, 2, 3, 4, 5])
    monkeypatch.setattr(Vcpu, "get_msrs", lambda _vcpu, _indices: {tsc.TSC: next(reads)})

    def ioctl(_fd: int, request: int, argument: object = None) -> int:
        if request == state_abi.KVM_GET_TSC_KHZ:
            return 2_000_000
        assert isinstance(argument, state_abi.kvm_clock_data)
        argument.clock = next(clocks)
        return 0

    monkeypatch.setattr(tsc, "ioctl", ioctl)
    assert tsc.sample(Vm(-1, 0), Numbered(0)) == (2, 1005)
    reads, clocks = iter([7000, 7000] * 5), iter([1002] * 5)
    # 1000 ns later the TSC should be 2000 ticks farther; it is 5995.
    assert tsc.lag(Vm(-1, 0), Numbered(0), (2, 1005)) == 1005 + 2000 - 7000
