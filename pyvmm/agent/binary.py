"""The agent's program: a static ELF file for x86-64, part of this package.

``make agent`` builds it from guest/agent/; a test does so too and compares every byte.
"""

from __future__ import annotations

from pathlib import Path

PROGRAM = Path(__file__).with_name("pyvmm-agent")
"""The program.  An installer may leave out its execute bits: whoever packs it sets mode 0755."""
BUILT_WITH = PROGRAM.with_name("pyvmm-agent.built-with")
"""The versions of the compiler, linker and C library, a line each, that made it."""
NAME_IN_INITRAMFS = "pyvmm-agent"
"""Its place in an initramfs: ``rdinit=/pyvmm-agent`` starts it as process 1."""


def read_program() -> bytes:
    """Return the program's bytes."""
    return PROGRAM.read_bytes()
