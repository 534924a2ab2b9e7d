"""Every guest physical address and interrupt line of the machine, in one place.

::

    0x0_0000_0000  +-------------------------+
                   | real-mode IVT, BIOS data|
    0x0_0000_0500  | GDT                     |
    0x0_0000_7000  | boot_params (zero page) |
    0x0_0000_8000  | PVH start info          |
    0x0_0000_9000  | page tables: PML4, PDPT,|
                   | four page directories   |
    0x0_0002_0000  | kernel command line     |
    0x0_0009_fc00  +-------------------------+  end of low RAM (e820)
                   | MP table, then holes    |
    0x0_000e_0000  | ACPI tables             |
    0x0_000f_0000  | VM generation ID        |
    0x0_000f_fff0  | reset vector            |
    0x0_0010_0000  +-------------------------+
                   | kernel, then initrd at  |
                   | the top of low RAM      |
    <= 0xc000_0000 +-------------------------+  end of RAM below 4 GiB
    0x0_d000_0000  | virtio-mmio, 4 KiB each |
    0x0_fec0_0000  | IOAPIC (in-kernel)      |
    0x0_fee0_0000  | LAPIC (in-kernel)       |
    0x0_fffb_c000  | KVM's identity map page |
    0x0_fffb_d000  | KVM's TSS, three pages  |
    0x1_0000_0000  +-------------------------+
                   | rest of RAM             |
                   +-------------------------+
"""

from __future__ import annotations

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

GDT = 0x500
BOOT_PARAMS = 0x7000
START_INFO = 0x8000
START_INFO_MAX = 0x1000
"""hvm_start_info and the tables it points to, which a PVH kernel gets instead of boot_params."""
PAGE_TABLES = 0x9000
PAGE_TABLES_END = PAGE_TABLES + 6 * 0x1000
BOOT_STACK = 0x1FFF0
CMDLINE = 0x20000
CMDLINE_MAX = 0x10000
"""Room for the command line, in bytes with its NUL; the kernel's own limit is lower."""
LOW_RAM_END = 0x9FC00
MP_TABLE = LOW_RAM_END
"""In the last KiB of base memory, one of the places where kernels look for the table."""
ACPI_TABLES = 0xE0000
"""The RSDP, before all other tables: the first place where kernels scan for it."""
ACPI_TABLES_END = 0xF0000
VMGENID_GPA = 0xF0028
"""16 bytes in a page of their own, as its specification has it.  Kernels look for other tables at
multiples of 16 bytes, so these random ones begin at none."""
RESET_VECTOR = 0xFFFF0
"""f000:fff0, where a PC's CPUs start; a kernel that reboots "by BIOS" jumps there."""
HIGH_RAM_START = 0x100000

MMIO_GAP_START = 0xC000_0000
MMIO_GAP_END = 0x1_0000_0000
VIRTIO_MMIO = 0xD000_0000
VIRTIO_MMIO_STRIDE = 0x1000
IOAPIC = 0xFEC0_0000
LAPIC = 0xFEE0_0000
IDENTITY_MAP = 0xFFFB_C000
TSS = 0xFFFB_D000

MIN_MEMORY = 16 * MIB
MAX_MEMORY = 512 * GIB

SERIAL_PORT, SERIAL_IRQ = 0x3F8, 4
I8042_DATA, I8042_COMMAND = 0x60, 0x64
RTC_INDEX, RTC_DATA = 0x70, 0x71
DEBUG_EXIT_PORT = 0xF4
PCI_PORT = 0xCF8
BOOT_TIMER_PORT = 0xF8
WARM_PORT = 0xF9
PVPANIC_PORT = 0x505
SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT, RESET_PORT = 0x600, 0x601, 0x602
"""The power device's registers of one byte each, which the guest finds in ACPI's FADT."""
S5_SLEEP_TYPE = 5
"""SLP_TYP of the sleep control register that means soft off."""
RESET_VALUE = 1
"""The value that a guest writes to the reset register."""
GED_GSI = 23
"""The line of ACPI's generic event device, edge-triggered.  It is one that only the IOAPIC has: a
guest that has set up neither it nor the 8259s, and lets interrupts in, must not get this one."""
VIRTIO_IRQS = (5, 6, 7, 9, 10, 11, 12, 14, 16, 17, 18, 19, 20, 21, 22, 15)
"""GSIs for virtio-mmio devices, in device order: ISA lines that nothing else here uses, then the
IOAPIC's own, one ISA line at last."""
MAX_VIRTIO_DEVICES = len(VIRTIO_IRQS)


def ram_ranges(memory_bytes: int) -> list[tuple[int, int]]:
    """Return the places of ``memory_bytes`` of RAM as ``(gpa, length)``, around the hole below 4
    GiB."""
    low = min(memory_bytes, MMIO_GAP_START)
    ranges = [(0, low)]
    if memory_bytes > low:
        ranges.append((MMIO_GAP_END, memory_bytes - low))
    return ranges


def virtio_slot(index: int) -> tuple[int, int]:
    """Return ``(base address, GSI)`` of virtio-mmio device ``index``, below MAX_VIRTIO_DEVICES."""
    return VIRTIO_MMIO + index * VIRTIO_MMIO_STRIDE, VIRTIO_IRQS[index]
