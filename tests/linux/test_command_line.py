"""A kernel's command line, read as Linux reads it."""

from __future__ import annotations

import pytest

from pyvmm.linux.command_line import consoles_of, words_of


@pytest.mark.parametrize(("text", "words"), [
    ("", []),
    ("  a=1   b ", [("a", "1"), ("b", "")]),
    ('a="x y" b', [("a", "x y"), ("b", "")]),
    ('"a=x y" b', [("a", "x y"), ("b", "")]),
    ("a-b.c-d=e-f", [("a_b.c_d", "e-f")]),
    ("root=PARTUUID=1-2", [("root", "PARTUUID=1-2")]),
    ("a -- root=/dev/vdz", [("a", "")]),
    ('a="unfinished b', []),
])
def test_words(text: str, words: list[tuple[str, str]]) -> None:
    assert words_of(text) == words


@pytest.mark.parametrize(("text", "consoles"), [
    ("", []), ("console=ttyS0", ["ttyS0"]), ("console=ttyS0,115200n8", ["ttyS0"]),
    ("console=hvc0 quiet console=ttyS0", ["hvc0", "ttyS0"]), ("console=0,9600", ["ttyS0"]),
    ("console=tty0 console=hvc0 console=ttyS1 console=hvc1", ["hvc0"]), ("console=", []),
    ("console=uart8250,io,0x3f8", ["ttyS0"]), ("console hvc0", []), ("xconsole=hvc0", []),
    ('pyvmm.run="echo console=hvc0" a', []), ("a -- console=hvc0", []),
])
def test_the_consoles_of_this_machine(text: str, consoles: list[str]) -> None:
    assert consoles_of(words_of(text)) == consoles
