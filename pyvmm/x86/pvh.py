"""``struct hvm_start_info``, which tells a kernel entered by PVH about the machine.

The ABI is Xen's (docs/misc/pvh.pandoc, "x86/HVM direct boot ABI"); names, sizes and order of the
structures are those of ``xen/include/public/arch-x86/hvm/start_info.h``, version 1.
"""

from __future__ import annotations

import ctypes
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64

from pyvmm.memory import GuestMemory
from pyvmm.x86 import layout
from pyvmm.x86.boot_params import e820_map, encode_cmdline
from pyvmm.x86.image import Kernel

XEN_HVM_START_MAGIC_VALUE = 0x336E_C578
START_INFO_VERSION = 1
"""The first version that has a memory map."""


class HvmStartInfo(ctypes.LittleEndianStructure):
    """struct hvm_start_info; an address of 0 means "not there"."""

    __slots__ = ()
    _fields_ = [
        ("magic", u32),
        ("version", u32),
        ("flags", u32),
        ("nr_modules", u32),
        ("modlist_paddr", u64),
        ("cmdline_paddr", u64),
        ("rsdp_paddr", u64),
        ("memmap_paddr", u64),
        ("memmap_entries", u32),
        ("reserved", u32),
    ]


class HvmModlistEntry(ctypes.LittleEndianStructure):
    """struct hvm_modlist_entry: ``size`` bytes at ``paddr``; the first module is the initrd."""

    __slots__ = ()
    _fields_ = [("paddr", u64), ("size", u64), ("cmdline_paddr", u64), ("reserved", u64)]


class HvmMemmapTableEntry(ctypes.LittleEndianStructure):
    """struct hvm_memmap_table_entry: ``size`` bytes at ``addr``, ``type`` as in the e820 map."""

    __slots__ = ()
    _fields_ = [("addr", u64), ("size", u64), ("type", u32), ("reserved", u32)]


def write_start_info(
    memory: GuestMemory,
    kernel: Kernel,
    cmdline: str,
    initrd: tuple[int, int] | None,
    *,
    rsdp: int = 0,
) -> None:
    """Write the command line at layout.CMDLINE and the start info at layout.START_INFO.

    The counterpart of ``write_boot_params``, with the same arguments and errors.
    """
    text = encode_cmdline(cmdline, kernel)
    info = HvmStartInfo(
        magic=XEN_HVM_START_MAGIC_VALUE,
        version=START_INFO_VERSION,
        cmdline_paddr=layout.CMDLINE,
        rsdp_paddr=rsdp,
    )
    modules = b""
    if initrd is not None:
        gpa, size_bytes = initrd
        modules = bytes(HvmModlistEntry(paddr=gpa, size=size_bytes))
        info.nr_modules = 1
        info.modlist_paddr = layout.START_INFO + ctypes.sizeof(info)
    entries = e820_map([(region.gpa, region.length) for region in memory.regions])
    info.memmap_entries = len(entries)
    info.memmap_paddr = layout.START_INFO + ctypes.sizeof(info) + len(modules)
    memory_map = b"".join(
        bytes(HvmMemmapTableEntry(addr=address, size=size, type=kind))
        for address, size, kind in entries
    )
    memory.write(layout.CMDLINE, text + b"\0")
    memory.write(layout.START_INFO, bytes(info) + modules + memory_map)
