"""Token buckets: how many operations and bytes a second a disk may do, and how many at once.

A bucket holds up to a burst of tokens and gains its rate every second.  A request that finds
enough takes them and goes.  A request that does not is told how long to wait and takes nothing, so
it may ask again at any time.  A request larger than the burst would never find enough: it waits
for a full bucket and borrows the rest, which the requests after it pay back.  Over any time t a
bucket lets through at most ``burst + rate * t`` tokens, and the debt of the last request.

Nothing here sleeps or calls anybody: the device tells its caller when to come back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable

from pyvmm.errors import ConfigError, StateError
from pyvmm.startup.types import Record

MIN_TURN_S = 0.001
"""The least wait of a queue while another is before it in the line."""
MAX_WAIT_S = 0.25
"""No wait is longer, however deep the debt: a changed limit is felt this soon."""

MAX_RATE = 1 << 50
"""Per second, and at once; bytes of a disk faster than any (1024T)."""

_MAX_DEBT = 1 << 63
"""Tokens; no request is larger."""
_ENOUGH = 1e-6
"""Tokens that may be missing: a wait of exactly the time asked for must be the last."""


class RateLimit(Record):
    """The most a disk may do; a rate of 0 is no limit.

    Rates are per second.  A burst may go at once after a pause; 0 stands for a tenth of
    a second's worth, at least 1.
    """

    ops_per_s: int = 0
    ops_burst: int = 0
    bytes_per_s: int = 0
    bytes_burst: int = 0

    def __post_init__(self) -> None:
        for name, rate, burst in (
            ("ops", self.ops_per_s, self.ops_burst),
            ("bytes", self.bytes_per_s, self.bytes_burst),
        ):
            if rate < 0 or burst < 0:
                raise ConfigError(
                    "rate limit", f"{name} {rate} per second, burst {burst}: the least is 0"
                )
            if max(rate, burst) > MAX_RATE:
                raise ConfigError(
                    "rate limit",
                    f"{name} {rate} per second, burst {burst}: the most is {MAX_RATE} (1024T)",
                )
            if burst and not rate:
                raise ConfigError("rate limit", f"{name} burst {burst} without a rate")

    def __bool__(self) -> bool:
        """True if anything is limited."""
        return bool(self.ops_per_s or self.bytes_per_s)


class RateLimiter:
    """The buckets of one disk, full at first, however many devices show it.  Safe to use from
    several threads at once."""

    def __init__(self, limit: RateLimit, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        now_s = clock()
        self._limit = limit
        self._ops = _Bucket(limit.ops_per_s, limit.ops_burst, now_s)
        self._bytes = _Bucket(limit.bytes_per_s, limit.bytes_burst, now_s)
        self._line: dict[Hashable, int] = {}
        """Who waits, first come first, and for how many bytes."""

    def admit(self, byte_count: int, who: Hashable = 0) -> float:
        """Ask, as ``who`` (a device's queue), to do one operation that moves ``byte_count`` bytes.

        Return 0.0 if it may go now: both buckets are charged.  Otherwise return the seconds after
        which to ask again: nothing is charged, and ``who`` keeps its place in the line.  So small
        requests do not keep the buckets empty for ever in front of a large one.
        """
        with self._lock:
            now_s = self._clock()
            self._line[who] = byte_count
            first, first_bytes = next(iter(self._line.items()))
            wait_s = max(self._ops.wait_s(1, now_s), self._bytes.wait_s(first_bytes, now_s))
            if first != who:
                return min(max(wait_s, MIN_TURN_S), MAX_WAIT_S)
            if wait_s:
                return min(wait_s, MAX_WAIT_S)
            del self._line[who]
            self._ops.take(1)
            self._bytes.take(byte_count)
            return 0.0

    def leave(self, who: Hashable) -> None:
        """Take ``who`` out of the line: its request was dropped."""
        with self._lock:
            self._line.pop(who, None)

    def change(self, limit: RateLimit) -> None:
        """Go on with ``limit``: tokens saved up are kept as far as the new burst allows, and
        so is a debt."""
        with self._lock:
            now_s = self._clock()
            self._limit = limit
            self._ops.change(limit.ops_per_s, limit.ops_burst, now_s)
            self._bytes.change(limit.bytes_per_s, limit.bytes_burst, now_s)

    def save(self) -> dict[str, object]:
        """Return the limit and the tokens left (docs/architecture.md, "State").

        The line is no part of it: a queue that goes on takes its place anew.
        """
        with self._lock:
            now_s, limit = self._clock(), self._limit
            return {
                "ops_per_s": limit.ops_per_s, "ops_burst": limit.ops_burst,
                "bytes_per_s": limit.bytes_per_s, "bytes_burst": limit.bytes_burst,
                "ops_level": self._ops.save(now_s), "bytes_level": self._bytes.save(now_s),
            }

    def restore(self, data: object) -> None:
        """Take what ``save`` returned; StateError.  Time that has passed fills no bucket."""
        from pyvmm.state import Fields  # not on the boot path

        fields = Fields("rate limit", data)
        rates = {
            name: fields.integer(name, 0, MAX_RATE)
            for name in ("ops_per_s", "ops_burst", "bytes_per_s", "bytes_burst")
        }
        ops_level, bytes_level = fields.take("ops_level"), fields.take("bytes_level")
        fields.end()
        try:
            limit = RateLimit(**rates)
        except ConfigError as error:
            raise StateError("rate limit", error.problem) from error
        now_s = self._clock()
        ops = _Bucket(limit.ops_per_s, limit.ops_burst, now_s)
        ops.restore("ops_level", ops_level)
        many_bytes = _Bucket(limit.bytes_per_s, limit.bytes_burst, now_s)
        many_bytes.restore("bytes_level", bytes_level)
        with self._lock:
            self._limit, self._ops, self._bytes = limit, ops, many_bytes
            self._line.clear()


class _Bucket:
    """``rate`` tokens a second, at most ``burst`` at once; a rate of 0 is a bucket without end.

    ``level`` is below 0 while something is borrowed.  Times are in seconds of any one clock.
    """

    __slots__ = ("_burst", "_filled_at_s", "_level", "_rate")

    def __init__(self, rate: int, burst: int, now_s: float) -> None:
        self._rate = 0
        self._level = 0.0
        self.change(rate, burst, now_s)

    def change(self, rate: int, burst: int, now_s: float) -> None:
        was_limited = self._rate > 0
        if was_limited:
            self._fill(now_s)
        self._rate = rate
        self._burst = burst or max(1, rate // 10)
        self._level = min(self._level, self._burst) if was_limited else self._burst
        self._filled_at_s = now_s

    def wait_s(self, cost: int, now_s: float) -> float:
        """Return the seconds until ``cost`` tokens may be taken, 0.0 for now.

        An operation without cost never waits, be the bucket in debt or not."""
        if not self._rate or not cost:
            return 0.0
        self._fill(now_s)
        missing = min(cost, self._burst) - self._level
        return missing / self._rate if missing > _ENOUGH else 0.0

    def take(self, cost: int) -> None:
        if self._rate:
            self._level -= cost

    def save(self, now_s: float) -> str | None:
        """Return the level, as text that keeps every bit; None if there is no limit."""
        if not self._rate:
            return None
        self._fill(now_s)
        return float(self._level).hex()

    def restore(self, name: str, level: object) -> None:
        """Take the level that ``save`` returned; StateError."""
        if not self._rate and level is None:
            return
        try:
            value = float.fromhex(level) if self._rate and isinstance(level, str) else None
        except (ValueError, OverflowError):
            value = None
        if value is None or not -_MAX_DEBT <= value <= self._burst:
            limit = f"a number up to {self._burst} (float.hex)" if self._rate else "None"
            raise StateError("rate limit", f"{name} is not {limit}")
        self._level = value

    def _fill(self, now_s: float) -> None:
        gained = (now_s - self._filled_at_s) * self._rate
        self._level = min(self._level + gained, self._burst)
        self._filled_at_s = now_s
