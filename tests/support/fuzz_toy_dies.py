"""A fuzz target whose first case ends the process."""

from __future__ import annotations

from fuzz.target import Target
from tests.support.fuzz_toy import ToyTarget


class DyingTarget(ToyTarget):
    """Dies at once."""

    def seeds(self) -> list[bytes]:
        """Return the case that aborts."""
        return [b"FF and more"]


def make() -> Target:
    """Return the target."""
    return DyingTarget()
