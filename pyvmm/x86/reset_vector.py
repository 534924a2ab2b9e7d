"""The code at the reset vector: it resets the machine.  This machine has no other BIOS.

Linux with EFI built in, told by ACPI that the platform is hardware-reduced, does not reboot by
ACPI's reset register but by EFI (arch/x86/kernel/reboot.c, reboot_init).  Without EFI it goes on to
"reboot by BIOS": in real mode, a jump to f000:fff0.
"""

from __future__ import annotations

import struct

from pyvmm.memory import GuestMemory
from pyvmm.x86 import layout

# 16-bit code: mov $port, %dx; mov $value, %al; out %al, (%dx); hlt; jmp to the hlt
_CODE = struct.Struct("<BHBBBB2s")
_MOV_DX, _MOV_AL, _OUT_DX_AL, _HLT, _JMP_TO_HLT = 0xBA, 0xB0, 0xEE, 0xF4, b"\xeb\xfd"


def write_reset_vector(memory: GuestMemory) -> None:
    """Write the code that pulls the reset register (``layout.RESET_PORT``)."""
    memory.write(layout.RESET_VECTOR, _CODE.pack(
        _MOV_DX, layout.RESET_PORT, _MOV_AL, layout.RESET_VALUE, _OUT_DX_AL, _HLT, _JMP_TO_HLT
    ))
