"""The contract of a fuzz target, and the registry of targets by name."""

from __future__ import annotations

import abc
import importlib
import importlib.util
import random
from collections.abc import Iterable
from pathlib import Path

TARGETS = Path(__file__).parent / "targets"
CORPUS = Path(__file__).parent / "corpus"


class Target(abc.ABC):
    """One program under attack.  ``run`` gets bytes; whatever it raises is a finding.

    A target's own checks are assertions.  ``run`` may change nothing that the next call sees:
    the same bytes must do the same again.
    """

    max_bytes = 4096
    """No case is longer."""
    limit_s = 2.0
    """CPU seconds of this process that one case may take.  A case that waits for something may
    take ten times as many seconds of the clock."""
    memory_bytes = 256 << 20
    """How far this process may grow over its size after the first cases, at its peak."""
    is_guided = True
    """False where coverage does not guide: threads, or a state in the host's kernel."""
    is_structured = False
    """True if ``run`` reads decisions (``source.Source``): then noise is a good case, too."""
    words: tuple[bytes, ...] = ()
    """Words of the input's language, for mutations to insert."""

    @abc.abstractmethod
    def run(self, data: bytes) -> None:
        """Do one case."""

    def seeds(self) -> Iterable[bytes]:
        """Return cases to begin with, always the same; noise if the target has no better."""
        noise = random.Random(1)
        return [noise.randbytes(length) for length in (16, 64, 256, 1024)]

    def close(self) -> None:  # noqa: B027 - most have nothing to close
        """Let go of what the target holds; idempotent."""


def target_names() -> list[str]:
    """Return the names of all targets, in the order of the alphabet."""
    files = TARGETS.glob("*.py")
    return sorted(file.stem.replace("_", "-") for file in files if not file.stem.startswith("_"))


def is_target(word: str) -> bool:
    """True if ``word`` names a target: one of ours, or any module, by its dotted name."""
    if word in target_names():
        return True
    if "." not in word or "/" in word or Path(word).exists():
        return False
    try:
        return importlib.util.find_spec(word) is not None
    except ImportError:
        return False


def load_target(name: str) -> Target:
    """Import the module of target ``name`` and make it."""
    module = importlib.import_module(
        name if "." in name else f"fuzz.targets.{name.replace('-', '_')}"
    )
    target: Target = module.make()
    return target


def about(name: str) -> str:
    """Return the first line of the module of target ``name``, without importing it."""
    first = (TARGETS / f"{name.replace('-', '_')}.py").read_text().partition("\n")[0]
    return first.strip('"').rstrip(".")


def committed_cases(name: str) -> list[Path]:
    """Return the cases that are in the repository: what once was a finding, and odd seeds."""
    folder = CORPUS / name
    return sorted(path for path in folder.glob("*") if path.is_file())
