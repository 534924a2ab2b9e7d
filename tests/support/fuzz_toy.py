"""A fuzz target with one fault of each kind, to fuzz the fuzzers with."""

from __future__ import annotations

import os
import time

from fuzz.target import Target


class ToyTarget(Target):
    """Cases that begin with certain letters go wrong."""

    max_bytes = 64
    limit_s = 0.5
    memory_bytes = 64 << 20

    def seeds(self) -> list[bytes]:
        """Return one harmless case."""
        return [b"Aardvark"]

    def run(self, data: bytes) -> None:
        """Go wrong, or not."""
        if data[:1] == b"B":
            raise ZeroDivisionError("planted")
        if data[:2] == b"CC":
            while True:
                pass
        if data[:2] == b"DD":
            time.sleep(60)
        if data[:2] == b"EE":
            bytearray(128 << 20)[::4096] = b"\1" * (128 << 8)
        if data[:2] == b"FF":
            os.abort()


def make() -> Target:
    """Return the target."""
    return ToyTarget()
