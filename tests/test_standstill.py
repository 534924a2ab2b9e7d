"""A test that failed while its machine stood still is run again, and no other."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.support import standstill
from tests.support.patience import patient
from tests.support.standstill import Heartbeat

CONFTEST = """
import os, signal, time
import pytest

pytest_plugins = ("tests.support.standstill",)


def pytest_configure(config):
    standstill = config.pluginmanager.get_plugin("tests.support.standstill")
    standstill.STANDSTILL_S = 1.5
    config.addinivalue_line("markers", "kvm: Linux")


@pytest.fixture
def stop(request):
    def stop():
        plugin = request.config.pluginmanager.get_plugin("tests.support.standstill")
        heart = request.config.stash[plugin._HEART]
        time.sleep(0.5)  # it has begun
        os.kill(heart.pid, signal.SIGSTOP)
        time.sleep(2)
        os.kill(heart.pid, signal.SIGCONT)
        time.sleep(0.5)
    return stop
"""
TESTS = """
import pytest

runs = []


@pytest.mark.kvm
def test_once_in_a_pause(stop):
    runs.append(1)
    if len(runs) == 1:
        stop()
        raise AssertionError("too late")


@pytest.mark.kvm
def test_wrong_without_one():
    raise AssertionError("wrong")


@pytest.mark.kvm
def test_fails_twice_in_a_pause(stop):
    stop()
    raise AssertionError("always")


@pytest.mark.kvm
def test_passes_in_a_pause(stop):
    stop()
"""


def test_a_pause_is_seen_and_a_load_is_not() -> None:
    heart = Heartbeat(least_s=patient(2.0))
    try:
        assert heart.new_s(patient(1.0)) == []
        os.kill(heart.pid, signal.SIGSTOP)
        time.sleep(patient(3.0))
        os.kill(heart.pid, signal.SIGCONT)
        assert max(heart.new_s(patient(20.0))) >= patient(2.0)
        assert len(heart.seen_s) == 1
    finally:
        heart.close()


def test_what_failed_in_a_pause_is_run_again(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(TESTS)
    result = pytester.runpytest_subprocess("-ra", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=2, failed=2)
    result.stdout.fnmatch_lines(["*2 rerun*"])
    assert standstill.StandstillError.__name__ in result.stdout.str()
