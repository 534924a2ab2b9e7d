"""A kernel's command line, read as Linux reads it (lib/cmdline.c)."""

from __future__ import annotations

_CONSOLES = {
    "hvc0": "hvc0", "ttyS0": "ttyS0", "0": "ttyS0", "uart8250": "ttyS0", "uart": "ttyS0",
}
"""Linux's names of our consoles; a bare number is a serial port's (kernel/printk/printk.c)."""


def words_of(command_line: str) -> list[tuple[str, str]]:
    """Return a kernel command line's parameters as ``(name, value)``; behind ``--`` they are
    init's.

    Double quotes keep spaces together; ``-`` and ``_`` in names are the same.
    """
    found = []
    word, quoted = "", False
    for character in f"{command_line} ":
        if character == '"':
            quoted = not quoted
        elif not character.isspace() or quoted:
            word += character
        elif word:
            if word == "--":
                break
            name, _, value = word.partition("=")
            found.append((name.replace("-", "_"), value))
            word = ""
    return found


def consoles_of(words: list[tuple[str, str]]) -> list[str]:
    """Return the consoles of this machine that ``words`` name, ``ttyS0`` and ``hvc0``, in order.

    Linux shows its messages on all of them; /dev/console is the last.
    """
    named = [value.partition(",")[0] for name, value in words if name == "console"]
    return [_CONSOLES[name] for name in named if name in _CONSOLES]
