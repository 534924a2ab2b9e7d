"""The jail: all that a process gives up before the guest's first instruction (docs/jail.md)."""

from pyvmm.errors import ConfigError

MODES = ("on", "off", "strict")
"""The jail of a process: strict refuses a host that lacks a part of it."""


def check_mode(mode: str) -> str:
    """Return ``mode``, the value of ``--jail``; ConfigError unless it is among MODES."""
    if mode not in MODES:
        raise ConfigError(f"--jail {mode}", f"is none of {', '.join(MODES)}")
    return mode
