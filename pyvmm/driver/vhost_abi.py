"""The numbers and structures of <linux/vhost.h> that the vhost-vdpa transport uses, under the
kernel's own names.

No logic lives here.  ``tests/driver/test_vhost_abi.py`` compiles a C probe against the system's
headers.  It compares every ioctl number, constant, structure size and field offset that it finds
below, as for ``pyvmm.kvm.abi``, whose strict ``Structure`` is used here too.
"""

from __future__ import annotations

import ctypes
from types import MappingProxyType

from pyvmm.kvm.abi import Ioctl, Structure

_u8, _u16, _u32, _u64 = ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64
_int = ctypes.c_int32

# --- Structures (<linux/vhost_types.h>) --------------------------------------------------------


class vhost_vring_state(Structure):
    _fields_ = [("index", _u32), ("num", _u32)]


class vhost_vring_file(Structure):
    _fields_ = [("index", _u32), ("fd", _int)]


class vhost_vring_addr(Structure):
    _fields_ = [
        ("index", _u32),
        ("flags", _u32),
        ("desc_user_addr", _u64),
        ("used_user_addr", _u64),
        ("avail_user_addr", _u64),
        ("log_guest_addr", _u64),
    ]


class vhost_iotlb_msg(Structure):
    _fields_ = [
        ("iova", _u64),
        ("size", _u64),
        ("uaddr", _u64),
        ("perm", _u8),
        ("type", _u8),
        ("_end", _u8 * 6),  # to C's alignment; nameless there
    ]


class vhost_msg_v2(Structure):
    """``iotlb`` is in a union with 64 bytes of ``padding`` in C."""

    _fields_ = [
        ("type", _u32),
        ("asid", _u32),
        ("iotlb", vhost_iotlb_msg),
        ("_end", _u8 * 32),
    ]


class vhost_vdpa_config(Structure):
    """``len`` bytes follow in ``buf``, a flexible array member."""

    _fields_ = [("off", _u32), ("len", _u32), ("buf", _u8 * 0)]


class vhost_vdpa_iova_range(Structure):
    """Both ends are inclusive."""

    _fields_ = [("first", _u64), ("last", _u64)]


VHOST_ACCESS_RW = 3
VHOST_IOTLB_UPDATE = 2
VHOST_IOTLB_INVALIDATE = 3
VHOST_IOTLB_MSG_V2 = 2
VHOST_BACKEND_F_IOTLB_MSG_V2 = 1
"""A bit's number, like everything called F."""

# --- <linux/virtio_config.h> --------------------------------------------------------------------

VIRTIO_F_ACCESS_PLATFORM = 33
"""A bit's number: addresses are the IOTLB's, which vhost-vdpa devices insist on."""

# --- Ioctls, in the header's order -------------------------------------------------------------

# <asm-generic/ioctl.h>: direction in bits 30-31, size in 16-29, type in 8-15, number in 0-7.
_NONE, _WRITE, _READ = 0, 1, 2
_VHOST_VIRTIO = 0xAF

_Argument = type[
    ctypes.c_uint8 | ctypes.c_uint16 | ctypes.c_uint32 | ctypes.c_uint64 | ctypes.c_int32
    | Structure
]


def _ioc(direction: int, number: int, size: int) -> Ioctl:
    return Ioctl(direction << 30 | size << 16 | _VHOST_VIRTIO << 8 | number)


def _IO(number: int) -> Ioctl:
    return _ioc(_NONE, number, 0)


def _IOW(number: int, argument: _Argument) -> Ioctl:
    return _ioc(_WRITE, number, ctypes.sizeof(argument))


def _IOR(number: int, argument: _Argument) -> Ioctl:
    return _ioc(_READ, number, ctypes.sizeof(argument))


VHOST_GET_FEATURES = _IOR(0x00, _u64)
VHOST_SET_FEATURES = _IOW(0x00, _u64)
VHOST_SET_OWNER = _IO(0x01)
VHOST_SET_VRING_NUM = _IOW(0x10, vhost_vring_state)
VHOST_SET_VRING_ADDR = _IOW(0x11, vhost_vring_addr)
VHOST_SET_VRING_BASE = _IOW(0x12, vhost_vring_state)
VHOST_SET_VRING_KICK = _IOW(0x20, vhost_vring_file)
VHOST_SET_VRING_CALL = _IOW(0x21, vhost_vring_file)
VHOST_SET_BACKEND_FEATURES = _IOW(0x25, _u64)
VHOST_GET_BACKEND_FEATURES = _IOR(0x26, _u64)
VHOST_VDPA_GET_DEVICE_ID = _IOR(0x70, _u32)
VHOST_VDPA_GET_STATUS = _IOR(0x71, _u8)
VHOST_VDPA_SET_STATUS = _IOW(0x72, _u8)
VHOST_VDPA_GET_CONFIG = _IOR(0x73, vhost_vdpa_config)
VHOST_VDPA_SET_VRING_ENABLE = _IOW(0x75, vhost_vring_state)
VHOST_VDPA_GET_VRING_NUM = _IOR(0x76, _u16)
VHOST_VDPA_SET_CONFIG_CALL = _IOW(0x77, _int)
VHOST_VDPA_GET_IOVA_RANGE = _IOR(0x78, vhost_vdpa_iova_range)
VHOST_VDPA_GET_CONFIG_SIZE = _IOR(0x79, _u32)
VHOST_VDPA_GET_VQS_COUNT = _IOR(0x80, _u32)

IOCTL_NAMES = MappingProxyType(
    {value: name for name, value in list(globals().items()) if isinstance(value, Ioctl)}
)
"""The name of each, for errors."""
