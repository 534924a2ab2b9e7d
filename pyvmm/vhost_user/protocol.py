"""vhost-user messages: numbers and layouts (QEMU's docs/interop/vhost-user.rst).

A message has a header of three 32-bit words (request, flags, size of the payload) and a payload.
Up to 8 file descriptors come as ancillary data.  All is in the machine's byte order.  Names are the
document's without VHOST_USER_.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

MAX_FDS = 8
"""File descriptors of one message: "at most 8 descriptors in each message"."""
MAX_PAYLOAD = 4096
"""Bytes of one payload that we take.  The largest in use is under 600: a table of 8 regions, or a
configuration space of 256 bytes."""
MAX_TABLE_REGIONS = 8
"""Regions of one SET_MEM_TABLE: each brings a file descriptor."""
MAX_CONFIG_BYTES = 256
"""Bytes of configuration space that one GET_CONFIG or SET_CONFIG can cover."""
PROTOCOL_FEATURES = 1 << 30
"""VHOST_USER_F_PROTOCOL_FEATURES, among the virtio feature bits: there are protocol features."""

VERSION = 1
"""In bits 0 and 1 of a message's flags."""
VERSION_MASK = 3
REPLY = 1 << 2
NEED_REPLY = 1 << 3
"""With REPLY_ACK: the sender wants a u64 that is 0 for success."""

VRING_INDEX_MASK = 0xFF
VRING_NO_FD = 1 << 8
"""In the u64 of SET_VRING_KICK, _CALL and _ERR: no file descriptor comes along."""


class Request(enum.IntEnum):
    """ "Front-end message types": requests of a front end to a back end."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43


class BackendRequest(enum.IntEnum):
    """ "Back-end message types": a back end's own messages, over SET_BACKEND_REQ_FD."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5


class ProtocolFeature(enum.IntFlag):
    """ "Protocol features"."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16


HEADER = struct.Struct("=III")
"""Request, flags, bytes of payload."""
U64 = struct.Struct("=Q")
VRING_STATE = struct.Struct("=II")
"""Ring index, number."""
VRING_ADDR = struct.Struct("=IIQQQQ")
"""Ring index, flags, then user addresses: descriptor table, used ring, available ring; log.  For a
packed ring the device area takes the place of used, the driver area that of available."""
MEM_TABLE = struct.Struct("=II")
"""SET_MEM_TABLE begins with: number of regions, padding; the regions follow."""
MEM_REGION = struct.Struct("=QQQQ")
SINGLE_MEM_REGION = struct.Struct("=8xQQQQ")
"""ADD_MEM_REG and REM_MEM_REG: 64 bits of padding, then a region."""
CONFIG = struct.Struct("=III")
"""GET_CONFIG and SET_CONFIG begin with: offset, size, flags; ``size`` bytes follow."""


class MemoryRegion(NamedTuple):
    """``size`` bytes of memory, from ``mmap_offset`` of a file descriptor on.

    Descriptors find them at ``gpa``.  SET_VRING_ADDR finds them at ``user_address``, the front
    end's own address of them.
    """

    gpa: int
    size: int
    user_address: int
    mmap_offset: int
