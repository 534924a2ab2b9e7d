"""The one way into the kernel: ``vcpu_entry`` for KVM_RUN, ``ioctl`` for everything else.

Three limits of ``fcntl.ioctl`` shape this file.  An integer argument must fit a C int.  A buffer of
more than 1,024 bytes must be mutable, and holds the GIL meanwhile; here only set-up has such
buffers.  From CPython 3.14 on it retries a call that a signal interrupts.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import struct
import sys
from collections.abc import Callable, Mapping

from pyvmm.errors import KvmError
from pyvmm.kvm import abi

MSR_HEAD = struct.Struct("=I4x")
"""kvm_msrs."""
MSR_ENTRY = struct.Struct("=I4xQ")
"""kvm_msr_entry."""
_INT_MAX = (1 << 31) - 1
_ULONG_MAX = (1 << 64) - 1

_HINTS = {
    (abi.KVM_CREATE_VM, errno.EBUSY): "another hypervisor is using the CPU's virtualization",
    (abi.KVM_GET_API_VERSION, errno.ENOTTY): "this file is not a KVM device",
}


def ioctl(fd: int, request: abi.Ioctl, argument: ctypes.Structure | bytearray | int = 0) -> int:
    """Call one ioctl; return its result, or raise KvmError naming it.  Retried after a signal.

    A structure or bytearray is read and written in place.
    """
    if isinstance(argument, int) and not 0 <= argument <= _ULONG_MAX:
        raise ValueError(f"{_name(request)}: {argument:#x} is not an unsigned long")
    while True:
        try:
            if isinstance(argument, int) and argument > _INT_MAX:
                # fcntl.ioctl takes a C int; the value of its upper half would be undefined.
                result: int = _libc().ioctl(fd, request, argument)
                if result < 0:
                    raise OSError(ctypes.get_errno(), "ioctl")
                return result
            return fcntl.ioctl(fd, request, argument)
        except InterruptedError:
            continue
        except OSError as error:
            code = error.errno or errno.EIO
            hint = _HINTS.get((request, code), "")
            raise KvmError(_name(request), code, hint) from error


def _name(request: abi.Ioctl) -> str:
    if request in abi.IOCTL_NAMES:
        return abi.IOCTL_NAMES[request]
    # Whoever uses one of these has imported its module: nothing is while a guest runs.
    from pyvmm.kvm import irqchip_abi

    if request in irqchip_abi.IOCTL_NAMES:
        return irqchip_abi.IOCTL_NAMES[request]
    from pyvmm.kvm import state_abi

    return state_abi.IOCTL_NAMES[request]


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong)
    return libc


def entry_by_fcntl(fd: int) -> Callable[[], object]:
    """Return KVM_RUN for a ``fcntl.ioctl`` that reports EINTR (CPython before 3.14); OSError.

    No third argument: passing 0 costs 0.9 us more.  No function of ours around it: a call in Python
    costs as much again as the system call.
    """
    return functools.partial(fcntl.ioctl, fd, abi.KVM_RUN)


def entry_by_libc(fd: int) -> Callable[[], object]:
    """Return KVM_RUN for a ``fcntl.ioctl`` that would retry EINTR, so that a kick did nothing."""

    libc_ioctl = _libc().ioctl

    def enter() -> None:
        if libc_ioctl(fd, abi.KVM_RUN, 0) < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    return enter


vcpu_entry = entry_by_fcntl if sys.version_info < (3, 14) else entry_by_libc
"""Return a function that enters the vCPU ``fd``."""


def msr_buffer(msrs: Mapping[int, int]) -> bytearray:
    """Return ``msrs``, values by index, behind the header that counts them."""
    buffer = bytearray(MSR_HEAD.size + MSR_ENTRY.size * len(msrs))
    MSR_HEAD.pack_into(buffer, 0, len(msrs))
    at = MSR_HEAD.size
    for index, value in msrs.items():
        MSR_ENTRY.pack_into(buffer, at, index, value)
        at += MSR_ENTRY.size
    return buffer
