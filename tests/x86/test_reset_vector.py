"""The reset vector's code against the assembler."""

from __future__ import annotations

import subprocess
from pathlib import Path

from pyvmm.memory import GuestMemory
from pyvmm.x86 import layout
from pyvmm.x86.reset_vector import write_reset_vector

SOURCE = """
    .code16
    mov ${port}, %dx
    mov ${value}, %al
    out %al, (%dx)
0:  hlt
    jmp 0b
"""


def test_it_writes_the_reset_register_and_goes_no_further(tmp_path: Path) -> None:
    source, binary = tmp_path / "reset.S", tmp_path / "reset.bin"
    source.write_text(SOURCE.format(port=layout.RESET_PORT, value=layout.RESET_VALUE))
    subprocess.run(
        ["gcc", "-nostdlib", "-static", "-Wl,--oformat=binary,-Ttext=0,-e0,--build-id=none",
         "-o", binary, source],
        check=True,
    )
    code = binary.read_bytes()
    assert len(code) <= 16
    memory = GuestMemory.over(bytearray(2 << 20))
    write_reset_vector(memory)
    assert memory.read(0xFFFF0, 16) == code.ljust(16, b"\0")
    assert not any(memory.read(0, 0xFFFF0))
    assert not any(memory.read(0x100000, 1 << 20))
