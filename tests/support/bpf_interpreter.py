"""Runs a seccomp filter as the kernel does: classic BPF over struct seccomp_data.

Written from Documentation/networking/filter.rst, and not from ``pyvmm.jail.bpf``, whose output it
checks.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

X86_64 = 0xC000003E


def run(program: bytes, number: int, arguments: Sequence[int] = (), *, arch: int = X86_64) -> int:
    """Return the action for one system call; AssertionError for a program that is not valid."""
    six = [argument & (1 << 64) - 1 for argument in (*arguments, *[0] * 6)][:6]
    data = struct.pack("<IIQ6Q", number & 0xFFFFFFFF, arch, 0, *six)
    instructions = list(struct.iter_unpack("<HBBI", program))
    accumulator, at = 0, 0
    while True:
        code, if_true, if_false, k = instructions[at]
        at += 1
        match code:
            case 0x20:  # BPF_LD | BPF_W | BPF_ABS
                assert k % 4 == 0
                assert k < len(data)
                (accumulator,) = struct.unpack_from("<I", data, k)
            case 0x54:  # BPF_ALU | BPF_AND | BPF_K
                accumulator &= k
            case 0x15:  # BPF_JMP | BPF_JEQ | BPF_K
                at += if_true if accumulator == k else if_false
            case 0x35:  # BPF_JMP | BPF_JGE | BPF_K
                at += if_true if accumulator >= k else if_false
            case 0x06:  # BPF_RET | BPF_K
                return int(k)
            case _:
                raise AssertionError(f"instruction {at - 1}: code {code:#x}")
