"""Guests of a few bytes that talk on the serial port: for tests of what the host makes of it.

Machine code for 64-bit mode, independent of its place; no assembler is needed.
"""

from __future__ import annotations

from pathlib import Path

from tests.support.kernels import ElfSegment, elf

REPORT_0 = bytes.fromhex("31c0 e6f4 f4")  # xor eax, eax; out 0xf4, al; hlt
REPORT_7 = bytes.fromhex("b007 e6f4 f4")
SPIN = bytes.fromhex("ebfe")
HALT = bytes.fromhex("fa f4 ebfd")  # cli; hlt
REBOOT = bytes.fromhex("b0fe e664 ebfe")  # mov al, 0xfe; out 0x64, al
TRIPLE_FAULT = bytes.fromhex("0f0b")  # ud2, and no interrupt table

_COM1, _IER, _LSR = 0x3F8, 0x3F9, 0x3FD


def _dx(port: int) -> bytes:
    return b"\x66\xba" + port.to_bytes(2, "little")


def out(port: int, value: int) -> bytes:
    """Code that writes a byte to a port."""
    return _dx(port) + b"\xb0" + bytes([value]) + b"\xee"


def prints(text: bytes) -> bytes:
    """Code that sends ``text``, as fast as it can, and goes on behind it."""
    size = len(text).to_bytes(4, "little")
    return (
        b"\xe8" + size + text  # call over the text: its address is on the stack
        + b"\x5e"  # pop rsi
        + b"\xb9" + size  # mov ecx, size
        + _dx(_COM1)
        + b"\xac\xee"  # next: lodsb; out dx, al
        + b"\xff\xc9\x75\xfa"  # dec ecx; jnz next
    )


def prints_for_ever(text: bytes) -> bytes:
    """Code that sends ``text`` again and again."""
    code = prints(text)
    return code + b"\xe9" + (-(len(code) + 5)).to_bytes(4, "little", signed=True)


def waits(turns: int) -> bytes:
    """Code that counts to ``turns`` and goes on."""
    return b"\xb9" + turns.to_bytes(4, "little") + b"\xff\xc9\x75\xfc"


def echoes(*, slowness: int = 1) -> bytes:
    """Code that listens, and sends back each byte, counting to ``slowness`` before; for ever."""
    listen = _dx(_IER) + b"\xb0\x01\xee"  # mov al, 1; out dx, al
    poll = _dx(_LSR) + b"\xec\xa8\x01\x74\xfb"  # in al, dx; test al, 1; jz back to the in
    answer = _dx(_COM1) + b"\xec\xee"  # in al, dx; out dx, al
    turn = waits(slowness) + poll + answer
    return listen + turn + b"\xe9" + (-(len(turn) + 5)).to_bytes(4, "little", signed=True)


def echoes_once() -> bytes:
    """Code that listens, sends one byte back, and goes on."""
    return echoes()[:-5]


def write_guest(path: Path, *code: bytes) -> Path:
    """A kernel file at ``path`` that does all of ``code``, in order."""
    whole = b"".join(code)
    # The stack that the calls of prints() need lies behind the code.
    stack = b"\x48\x8d\x25" + (len(whole) + 2048).to_bytes(4, "little")  # lea rsp, [rip + ...]
    path.write_bytes(elf(ElfSegment(data=stack + whole, p_memsz=len(whole) + 8192)))
    return path
