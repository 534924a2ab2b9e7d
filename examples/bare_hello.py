"""Fourteen bytes of real-mode code print a greeting through a port: a whole guest, without Linux.

    python -m examples.bare_hello

Needs a /dev/kvm of any kind.
"""

from __future__ import annotations

import pyvmm

CODE = bytes.fromhex(
    "be0e10"  # 1000: mov $text, %si
    "ac"      # 1003: lodsb
    "84c0"    # 1004: test %al, %al
    "7404"    # 1006: jz 100c
    "e6e9"    # 1008: out %al, $0xe9
    "ebf7"    # 100a: jmp 1003
    "f4"      # 100c: hlt, which ends the run
    "00"      # 100d
) + b"Hello, world\0"  # fmt: skip

with pyvmm.bare(CODE) as guest:
    guest.on_port(0xE9, lambda access: print(chr(access.value or 0), end=""))
    print(f": {guest.run()} after {guest.exits.io} port writes")
