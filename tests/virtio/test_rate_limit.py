"""Token buckets, on a clock that the test moves."""

from __future__ import annotations

import random

import pytest

from pyvmm.errors import ConfigError
from pyvmm.virtio.rate_limit import MAX_RATE, MAX_WAIT_S, RateLimit, RateLimiter


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def admit_now(limiter: RateLimiter, byte_count: int = 0) -> bool:
    return limiter.admit(byte_count) == 0.0


def test_burst_passes_at_once_and_then_the_rate(clock: Clock) -> None:
    limiter = RateLimiter(RateLimit(ops_per_s=10, ops_burst=3), clock=clock)
    assert [admit_now(limiter) for _ in range(4)] == [True, True, True, False]
    assert limiter.admit(0) == pytest.approx(0.1)
    clock.now_s += 0.1
    assert [admit_now(limiter) for _ in range(2)] == [True, False]


def test_pause_saves_no_more_than_the_burst(clock: Clock) -> None:
    limiter = RateLimiter(RateLimit(ops_per_s=10, ops_burst=3), clock=clock)
    clock.now_s += 1e6
    assert [admit_now(limiter) for _ in range(4)] == [True, True, True, False]


def test_burst_is_a_tenth_of_a_second_unless_given(clock: Clock) -> None:
    limiter = RateLimiter(RateLimit(ops_per_s=50), clock=clock)
    assert sum(admit_now(limiter) for _ in range(20)) == 5
    limiter = RateLimiter(RateLimit(ops_per_s=3), clock=clock)
    assert sum(admit_now(limiter) for _ in range(20)) == 1


def test_bytes_and_operations_are_charged_both_or_neither(clock: Clock) -> None:
    limit = RateLimit(ops_per_s=100, ops_burst=2, bytes_per_s=1000, bytes_burst=1000)
    limiter = RateLimiter(limit, clock=clock)
    assert admit_now(limiter, 900)
    # Too many bytes: the second operation is not taken either.
    assert [admit_now(limiter, 900) for _ in range(5)] == [False] * 5
    assert admit_now(limiter, 100)
    assert limiter.admit(0) == pytest.approx(0.01)


def test_what_moves_no_bytes_does_not_wait_for_them(clock: Clock) -> None:
    limiter = RateLimiter(RateLimit(bytes_per_s=1000, bytes_burst=10), clock=clock)
    assert admit_now(limiter, 100_000)
    assert not admit_now(limiter, 1)
    assert admit_now(limiter, 0)


def test_oversize_request_waits_for_a_full_bucket_and_borrows(clock: Clock) -> None:
    limiter = RateLimiter(RateLimit(bytes_per_s=1000, bytes_burst=100), clock=clock)
    assert admit_now(limiter, 50)
    assert limiter.admit(500) == pytest.approx(0.05)
    clock.now_s += 0.05
    assert admit_now(limiter, 500)  # 400 borrowed
    clock.now_s += 0.39
    assert not admit_now(limiter, 1)
    clock.now_s += 0.02
    assert admit_now(limiter, 10)


def test_wait_is_capped_so_that_a_change_is_felt(clock: Clock) -> None:
    limiter = RateLimiter(RateLimit(ops_per_s=1), clock=clock)
    assert admit_now(limiter)
    assert limiter.admit(0) == MAX_WAIT_S
    limiter.change(RateLimit(ops_per_s=1000))
    clock.now_s += MAX_WAIT_S
    assert sum(admit_now(limiter) for _ in range(200)) == 100


def test_change_keeps_savings_up_to_the_new_burst(clock: Clock) -> None:
    limiter = RateLimiter(RateLimit(ops_per_s=10, ops_burst=50), clock=clock)
    limiter.change(RateLimit(ops_per_s=10, ops_burst=2))
    assert sum(admit_now(limiter) for _ in range(10)) == 2
    limiter.change(RateLimit(ops_per_s=10, ops_burst=50))
    assert not admit_now(limiter)


def test_change_keeps_a_debt(clock: Clock) -> None:
    limiter = RateLimiter(RateLimit(bytes_per_s=1000, bytes_burst=100), clock=clock)
    assert admit_now(limiter, 300)
    limiter.change(RateLimit(bytes_per_s=100, bytes_burst=100))
    clock.now_s += 1.9
    assert not admit_now(limiter, 1)
    clock.now_s += 0.2
    assert admit_now(limiter, 1)


def test_limit_that_comes_while_running_begins_with_a_full_burst(clock: Clock) -> None:
    limiter = RateLimiter(RateLimit(ops_per_s=10, ops_burst=1), clock=clock)
    assert admit_now(limiter, 1 << 30)
    limiter.change(RateLimit(bytes_per_s=1000, bytes_burst=100))
    assert admit_now(limiter, 100)
    assert not admit_now(limiter, 1)


def test_waiting_exactly_as_long_as_told_is_enough(clock: Clock) -> None:
    numbers = random.Random(3)
    limit = RateLimit(ops_per_s=977, ops_burst=7, bytes_per_s=1_234_567, bytes_burst=65_536)
    limiter = RateLimiter(limit, clock=clock)
    asked = 0
    for _ in range(1000):
        size = numbers.randrange(512, 32_768)
        while wait_s := limiter.admit(size):
            clock.now_s += wait_s
            asked += 1
    assert asked <= 1000


def test_rate_holds_over_time(clock: Clock) -> None:
    numbers = random.Random(7)
    limiter = RateLimiter(RateLimit(bytes_per_s=1_000_000, bytes_burst=50_000), clock=clock)
    begin_s, moved = clock.now_s, 0
    while clock.now_s < begin_s + 20:
        size = numbers.choice([512, 4096, 200_000])  # the largest has to borrow
        wait_s = limiter.admit(size)
        clock.now_s += wait_s
        moved += 0 if wait_s else size
    elapsed_s = clock.now_s - begin_s
    assert 0.98e6 * elapsed_s <= moved <= 1e6 * elapsed_s + 50_000 + 200_000


@pytest.mark.parametrize(
    "values",
    [
        {"ops_per_s": -1},
        {"bytes_per_s": -1},
        {"ops_per_s": 1, "ops_burst": -1},
        {"ops_burst": 1},
        {"bytes_burst": 1, "ops_per_s": 1},
    ],
)
def test_bad_limit_is_refused(values: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="rate limit"):
        RateLimit(**values)


def test_no_rate_is_no_limit() -> None:
    assert not RateLimit()
    assert RateLimit(ops_per_s=1)
    assert RateLimit(bytes_per_s=1)


def test_a_large_request_is_not_kept_waiting_by_small_ones(clock: Clock) -> None:
    """Two queues: one asks for a burst's worth, the other for a little, again and again."""
    limiter = RateLimiter(RateLimit(bytes_per_s=1000, bytes_burst=100), clock=clock)
    large = small = 0
    for _ in range(10_000):
        clock.now_s += 0.001
        large += limiter.admit(100, 1) == 0.0
        small += limiter.admit(1, 0) == 0.0
    assert 90 <= large <= 110
    assert small >= 90


def test_who_has_left_the_line_holds_up_nobody(clock: Clock) -> None:
    limiter = RateLimiter(RateLimit(ops_per_s=1, ops_burst=1), clock=clock)
    assert limiter.admit(0, 0) == 0.0
    assert limiter.admit(0, 1) > 0.0
    assert limiter.admit(0, 2) > 0.0
    clock.now_s += 1
    assert limiter.admit(0, 2) > 0.0, "1 is first"
    limiter.leave(1)
    assert limiter.admit(0, 2) == 0.0


@pytest.mark.parametrize(
    "limit",
    [
        RateLimit(),
        RateLimit(ops_per_s=7, ops_burst=3),
        RateLimit(bytes_per_s=MAX_RATE, bytes_burst=MAX_RATE),
        RateLimit(ops_per_s=3, bytes_per_s=1000, bytes_burst=10),
    ],
)
def test_tokens_and_debts_go_along_with_a_state_and_time_does_not(
    clock: Clock, limit: RateLimit
) -> None:
    first, second = (RateLimiter(limit, clock=clock) for _ in range(2))
    for byte_count in (1, 100_000, 3):
        first.admit(byte_count)
        clock.now_s += 1 / 7
    state = first.save()
    clock.now_s += 3600
    restored = RateLimiter(RateLimit(ops_per_s=1), clock=clock)
    restored.restore(state)
    assert restored.save() == state
    clock.now_s -= 3600
    second.restore(state)
    for byte_count in (0, 1, 5000):
        assert first.admit(byte_count) == second.admit(byte_count)


def test_who_waited_waits_no_more_after_a_restore(clock: Clock) -> None:
    """Or a queue that is gone would keep its place for ever."""
    limiter = RateLimiter(RateLimit(ops_per_s=10, ops_burst=1), clock=clock)
    assert limiter.admit(0, "first") == 0.0
    assert limiter.admit(0, "gone") > 0.0
    limiter.restore(limiter.save())
    clock.now_s += 0.1
    assert limiter.admit(0, "other") == 0.0
