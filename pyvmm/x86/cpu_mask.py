"""Masks over the registers of CPUID: CPU models and CPU templates are made of them."""

from __future__ import annotations

from pyvmm.startup.types import Record
from pyvmm.x86.cpu_features import Word

OPTION = "--cpu"
"""The option that names a model or a template, for messages."""


class RegisterMask(Record):
    """A register of CPUID: the bits of ``keep`` stay as the host has them, all others are cleared.

    The host must have set the bits of ``demand``, a part of ``keep``.
    """

    word: Word
    keep: int
    demand: int = 0
