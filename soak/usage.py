"""The resources that a process takes, sampled, and how much they drift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

NAMES = ("rss_kib", "own_kib", "threads", "descriptors", "mappings")
WARM = 0.1
"""The share of the samples, the first ones, that do not count: caches fill."""
MOST_DRIFT = 1.0
"""In per cent."""


@dataclass(frozen=True, slots=True)
class Usage:
    """The resources of a process at one moment; sizes in KiB.

    ``own_kib`` is its resident memory without the guest's RAM.
    """

    rss_kib: int
    own_kib: int
    threads: int
    descriptors: int
    mappings: int

    @classmethod
    def of(cls, pid: int, *, ram_kib: int) -> Usage:
        """Return those of process ``pid`` (0: this one), whose guest has ``ram_kib`` of RAM.

        OSError once the process has ended.
        """
        folder = Path(f"/proc/{pid or 'self'}")
        rss = own = mappings = size = 0
        for line in (folder / "smaps").read_text().splitlines():
            key, _, value = line.partition(":")
            if key == "Size":
                mappings += 1
                size = int(value.split()[0])
            elif key == "Rss":
                pages = int(value.split()[0])
                rss += pages
                own += 0 if size == ram_kib else pages
        threads = len(list((folder / "task").iterdir()))
        return cls(rss, own, threads, len(list((folder / "fd").iterdir())), mappings)

    def figures(self) -> dict[str, int]:
        """Return them by name, for a journal."""
        return {name: getattr(self, name) for name in NAMES}


@dataclass(frozen=True, slots=True)
class Drift:
    """How much a resource has grown over many samples."""

    first: int
    last: int

    @classmethod
    def of(cls, samples: Sequence[Mapping[str, object]], name: str) -> Drift:
        """Compare the medians of the first and the last quarter of ``samples`` that count."""
        values = [int(str(sample[name])) for sample in samples[int(len(samples) * WARM):]]
        if not values:
            return cls(0, 0)
        quarter = max(1, len(values) // 4)
        return cls(_median(values[:quarter]), _median(values[-quarter:]))

    @property
    def percent(self) -> float:
        """The change."""
        return 100.0 * (self.last - self.first) / self.first if self.first else 0.0

    def __str__(self) -> str:
        return f"{self.first} -> {self.last} ({self.percent:+.2f} %)"


def longest(
    trials: Sequence[Mapping[str, object]], least: int
) -> list[Mapping[str, object]]:
    """Return the samples of the longest ``stretch`` in which one process was watched; none if
    they are fewer than ``least``."""
    stretches: dict[object, list[Mapping[str, object]]] = {}
    for line in trials:
        if "failed" not in line:
            stretches.setdefault(line["stretch"], []).append(line)
    found = max(stretches.values(), key=len, default=[])
    return found if len(found) >= least else []


def growth(samples: Sequence[Mapping[str, object]]) -> str:
    """Return the resources that have grown by MOST_DRIFT and more; empty if none has."""
    found = [(name, Drift.of(samples, name)) for name in NAMES] if samples else []
    grown = [f"{name} {drift}" for name, drift in found if drift.percent >= MOST_DRIFT]
    return f"grown: {', '.join(grown)}" if grown else ""


def drift_figures(samples: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """Return the drift of every resource, for a report; empty without samples."""
    return {f"{name}, first to last quarter": str(Drift.of(samples, name))
            for name in NAMES} if samples else {}


def _median(values: Sequence[int]) -> int:
    return sorted(values)[len(values) // 2]
