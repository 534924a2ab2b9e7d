"""The jail's table read rule by rule, as a person would: not by way of the assembled filters."""

from __future__ import annotations

from pyvmm.jail import bpf
from pyvmm.jail.table import REFUSED, RULES


def said(kind: str, name: str, arguments: tuple[int, ...]) -> int:
    """Return the action that the table has for a system call of a thread of ``kind``.

    ``arguments`` has ``bpf.OWN_PID`` in the place of the process's own number.
    """
    for rule in RULES:
        if rule.syscall == name and kind in rule.kinds and all(
            arguments[one.argument] & 0xFFFFFFFF & one.mask in one.values for one in rule.when
        ):
            return bpf.ALLOW
    errors = [one.error for one in REFUSED if one.syscall == name]
    return bpf.refuse_with(errors[0]) if errors else bpf.KILL_PROCESS


def in_words(action: int) -> str:
    """Return ``action`` as the results of ``tests.support.escape`` have it: "killed", "errno N" or
    "allowed"."""
    if action == bpf.ALLOW:
        return "allowed"
    return "killed" if action == bpf.KILL_PROCESS else f"errno {action & 0xFFFF}"
