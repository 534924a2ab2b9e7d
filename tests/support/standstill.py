"""Whether the machine the tests run on stood still: then a missed deadline says nothing of pyvmm.

A machine in a cloud may be paused for half a minute, and the lab's with it: clocks go on, and each
guest's watchdog barks.  A process that does nothing but look at the clock sees that; a load does
not look like it, as the scheduler gives such a process its turn.  This is a plugin of pytest: a
test with Linux guests that failed meanwhile is run once more (pytest-rerunfailures), and the last
lines tell how often that was.
"""

from __future__ import annotations

import select
import subprocess
import sys
from collections.abc import Generator

import pytest

STANDSTILL_S = 8.0
"""What a load of 60 on one CPU does not bring about, and a guest's watchdog (20 s) minds."""
_BEAT_S = 0.25
_WATCH = f"""
import select, sys, time
last_s = time.monotonic()
while not select.select([sys.stdin], [], [], {_BEAT_S})[0]:
    now_s = time.monotonic()
    if now_s - last_s >= float(sys.argv[1]):
        print(f"{{now_s - last_s:.1f}}", flush=True)
    last_s = now_s
"""


class StandstillError(Exception):
    """A test failed, and the machine stood still meanwhile: it is run again (tests/conftest.py)."""


class Heartbeat:
    """Another process, which notes each time that the machine stood still for ``least_s``."""

    def __init__(self, least_s: float) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _WATCH, str(least_s)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )
        self.seen_s: list[float] = []
        """How long each took, in seconds."""

    @property
    def pid(self) -> int:
        """Return the process's id."""
        return self._process.pid

    def new_s(self, wait_s: float = 0.0) -> list[float]:
        """Return how long each took that is new since the last call; wait for one, if need be."""
        new = []
        assert self._process.stdout is not None
        while select.select([self._process.stdout], [], [], wait_s)[0]:
            line = self._process.stdout.readline()
            if not line:
                break  # it was killed
            new.append(float(line))
            wait_s = 0.0
        self.seen_s += new
        return new

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


_HEART = pytest.StashKey[Heartbeat]()


def pytest_configure(config: pytest.Config) -> None:
    """Have tests run again whose machine stood still."""
    if getattr(config.option, "reruns", 0) is None:  # else the plugin is off, or asked for more
        config.option.reruns, config.option.only_rerun = 1, [StandstillError.__name__]


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the heartbeat."""
    if _HEART in config.stash:
        config.stash[_HEART].close()


def told(config: pytest.Config) -> list[str]:
    """Return a line that says how long the machine stood still, if it did."""
    if _HEART not in config.stash:
        return []
    heart = config.stash[_HEART]
    heart.new_s()
    if not heart.seen_s:
        return []
    times = ", ".join(f"{one_s:.0f} s" for one_s in sorted(heart.seen_s, reverse=True)[:8])
    return [f"the machine stood still {len(heart.seen_s)} times: {times}"]


def _watched(item: pytest.Item) -> Generator[None, object, object]:
    if not any(item.iter_markers("kvm")):
        return (yield)
    stash = item.config.stash
    if _HEART not in stash:
        stash[_HEART] = Heartbeat(STANDSTILL_S)
    stash[_HEART].new_s()
    try:
        return (yield)
    except (Exception, pytest.fail.Exception) as error:
        if times_s := stash[_HEART].new_s():
            raise StandstillError(f"the machine stood still for {max(times_s):.0f} s") from error
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    """Raise StandstillError for a failure of fixtures while the machine stood still."""
    return (yield from _watched(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Raise StandstillError for a failure while the machine stood still."""
    return (yield from _watched(item))
