"""The jail: all that a process gives up before the guest's first instruction (docs/jail.md)."""

MODES = ("on", "off", "strict")
"""The jail of a process: strict refuses a host that lacks a part of it."""
