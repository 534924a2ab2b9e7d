"""A stand-in for the kernel: records each ioctl and answers what the test says."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Callable, Iterator

import pytest

from pyvmm.kvm import abi, irqchip_abi, state_abi
from pyvmm.kvm.handles import Vm

NAMES = abi.IOCTL_NAMES | irqchip_abi.IOCTL_NAMES | state_abi.IOCTL_NAMES
Answer = int | OSError | Callable[[bytearray], int]


class FakeKernel:
    """``answers`` by ioctl name; what is not in it succeeds with 0 (ENOTTY if ``strict``)."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.calls: list[tuple[str, bytes | int]] = []

    def ioctl(
        self, fd: int, request: int, argument: ctypes.Structure | bytearray | int = 0
    ) -> int:
        if fd < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        name = NAMES[abi.Ioctl(request)]
        self.calls.append((name, argument if isinstance(argument, int) else bytes(argument)))
        answer = self.answers.get(name, 0)
        if isinstance(answer, OSError):
            raise answer
        if callable(answer):
            assert isinstance(argument, bytearray)
            return answer(argument)
        return answer


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    """fcntl.ioctl answered by a FakeKernel that speaks KVM API version 12."""
    fake = FakeKernel()
    fake.answers["KVM_GET_API_VERSION"] = abi.KVM_API_VERSION
    monkeypatch.setattr(fcntl, "ioctl", fake.ioctl)
    return fake


@pytest.fixture
def fake_vm(kernel: FakeKernel) -> Iterator[Vm]:
    """A Vm over /dev/null, whose ioctls go to ``kernel``."""
    with Vm(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC), 8192) as vm:
        yield vm
