"""Numbers of virtio 1.2, under the names of the specification; no logic.

Sections are cited by number *and* title, because numbers move between versions.  Everything is
little-endian; this package serves x86 guests on x86 hosts only, so native views are used.
"""

from __future__ import annotations

from pyvmm.startup.types import IntEnum, IntFlag


class DeviceType(IntEnum):
    """5 "Device Types"."""

    BLOCK = 2
    CONSOLE = 3
    ENTROPY = 4


class Status(IntFlag):
    """2.1 "Device Status Field"."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    DEVICE_NEEDS_RESET = 64
    FAILED = 128


class Feature(IntFlag):
    """6 "Reserved Feature Bits": what any device may offer."""

    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    VERSION_1 = 1 << 32
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    RING_RESET = 1 << 40


class Register(IntEnum):
    """4.2.2 "MMIO Device Register Layout": offsets in bytes."""

    MAGIC_VALUE = 0x000
    VERSION = 0x004
    DEVICE_ID = 0x008
    VENDOR_ID = 0x00C
    DEVICE_FEATURES = 0x010
    DEVICE_FEATURES_SEL = 0x014
    DRIVER_FEATURES = 0x020
    DRIVER_FEATURES_SEL = 0x024
    QUEUE_SEL = 0x030
    QUEUE_NUM_MAX = 0x034
    QUEUE_NUM = 0x038
    QUEUE_READY = 0x044
    QUEUE_NOTIFY = 0x050
    INTERRUPT_STATUS = 0x060
    INTERRUPT_ACK = 0x064
    STATUS = 0x070
    QUEUE_DESC_LOW = 0x080
    QUEUE_DESC_HIGH = 0x084
    QUEUE_DRIVER_LOW = 0x090
    QUEUE_DRIVER_HIGH = 0x094
    QUEUE_DEVICE_LOW = 0x0A0
    QUEUE_DEVICE_HIGH = 0x0A4
    SHM_LEN_LOW = 0x0B0
    SHM_LEN_HIGH = 0x0B4
    SHM_BASE_LOW = 0x0B8
    SHM_BASE_HIGH = 0x0BC
    QUEUE_RESET = 0x0C0
    CONFIG_GENERATION = 0x0FC
    CONFIG = 0x100


MAGIC = 0x74726976
"""MagicValue: "virt"."""
MMIO_VERSION = 2


class InterruptBit(IntFlag):
    """InterruptStatus and InterruptACK, 4.2.2 "MMIO Device Register Layout"."""

    USED_BUFFER = 1
    CONFIG_CHANGE = 2


class DescriptorFlag(IntFlag):
    """2.7.5 "The Virtqueue Descriptor Table": ``flags`` of a descriptor, split or packed."""

    NEXT = 1
    WRITE = 2
    INDIRECT = 4


class PackedFlag(IntFlag):
    """2.8.1 "Driver and Device Ring Wrap Counters": more ``flags`` of a packed descriptor."""

    AVAIL = 1 << 7
    USED = 1 << 15


class EventFlags(IntEnum):
    """2.8.10 "Driver and Device Event Suppression": RING_EVENT_FLAGS_*; 3 is reserved."""

    ENABLE = 0
    DISABLE = 1
    DESC = 2


AVAIL_F_NO_INTERRUPT = 1
"""2.7.6 "The Virtqueue Available Ring": the driver needs no interrupt for used buffers."""
USED_F_NO_NOTIFY = 1
"""2.7.8 "The Virtqueue Used Ring": the device needs no notification of available buffers."""
MAX_QUEUE_SIZE = 32768
"""2.7 "Split Virtqueues": "The maximum Queue Size value is 32768"; packed ones have 2^15."""


class ConsoleFeature(IntFlag):
    """5.3.3 "Feature bits" of the console device."""

    SIZE = 1 << 0
    MULTIPORT = 1 << 1
    EMERG_WRITE = 1 << 2


class PortEvent(IntEnum):
    """5.3.6.2 "Multiport Device Operation": ``event`` of a control message."""

    DEVICE_READY = 0
    PORT_ADD = 1
    PORT_REMOVE = 2
    PORT_READY = 3
    CONSOLE_PORT = 4
    RESIZE = 5
    PORT_OPEN = 6
    PORT_NAME = 7


class BlockFeature(IntFlag):
    """5.2.3 "Feature bits" of the block device."""

    SIZE_MAX = 1 << 1
    SEG_MAX = 1 << 2
    GEOMETRY = 1 << 4
    RO = 1 << 5
    BLK_SIZE = 1 << 6
    FLUSH = 1 << 9
    TOPOLOGY = 1 << 10
    CONFIG_WCE = 1 << 11
    MQ = 1 << 12
    DISCARD = 1 << 13
    WRITE_ZEROES = 1 << 14
    LIFETIME = 1 << 15
    SECURE_ERASE = 1 << 16


class BlockRequestType(IntEnum):
    """5.2.6 "Device Operation" of the block device: ``type`` of a request."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    GET_LIFETIME = 10
    DISCARD = 11
    WRITE_ZEROES = 13
    SECURE_ERASE = 14


class BlockStatus(IntEnum):
    """5.2.6 "Device Operation" of the block device: the request's last byte."""

    OK = 0
    IOERR = 1
    UNSUPP = 2


WRITE_ZEROES_F_UNMAP = 1
"""5.2.6 "Device Operation" of the block device: the one ``flags`` bit of a segment to discard or
zero; the driver allows the range to be unmapped."""
SECTOR_SIZE = 512
"""Bytes; the unit of ``sector`` and ``capacity`` whatever ``blk_size`` says (5.2.5)."""
BLOCK_ID_SIZE = 20
"""Bytes of the device ID string: "If the string is 20 bytes long then there is no NUL"."""
