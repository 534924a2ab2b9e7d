"""Masks over the registers of CPUID, and the CPU models that are made of them.

Each configuration has a model; the names of features are apart, because a restore needs none.
"""

from __future__ import annotations

from pyvmm.startup.types import TYPE_CHECKING, Record

if TYPE_CHECKING:
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


class CpuModel(Record):
    """The host's CPU without the masked parts; with nested virtualization only if demanded.

    ``functions`` are the only leaves left, or None for all.  Then ``masks`` apply, and then the
    features in ``removed`` go, even those that a mask demands.  A feature takes all that depend on
    it along, in whichever step it goes.  The features in ``required`` must be there in the end.
    ``name`` is for messages.
    """

    name: str = "host"
    functions: frozenset[int] | None = None
    masks: tuple[RegisterMask, ...] = ()
    removed: frozenset[str] = frozenset()
    required: frozenset[str] = frozenset()
