"""A suite: figures that one start of a program gives together, and how to take them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from bench.figures import Figure
from bench.host import Host
from bench.peers import Contender


@dataclass(frozen=True, slots=True)
class Reading:
    """One value, and what else is worth knowing about it."""

    value: float
    note: str = ""


Sampler = Callable[[Host, Contender, Collection[str]], Mapping[str, Reading]]
"""(host, contender, keys of the figures wanted) -> readings by key.  BenchError if it fails."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """Figures that are taken together, by ``sample``.

    ``kind`` says which contenders of ``peers.toml`` take part.  ``contenders``, if given, are
    those instead, ours first.  ``boots_linux`` is for what needs a complete KVM: where this
    host's is not, it is measured in the lab, and only its ratios mean anything.
    """

    figures: tuple[Figure, ...]
    sample: Sampler
    kind: str = "vmm"
    contenders: tuple[Contender, ...] = ()
    boots_linux: bool = True
    repeats: int = 1
    """Samples for each run asked for: what is over in milliseconds is easily disturbed."""
    max_samples: int = 1000
    """More would not tell more: what is counted, not timed, is the same every time."""
    warm_up: bool = True
    """Whether the first sample is better not counted."""
