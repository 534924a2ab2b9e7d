"""The plugin below pytest-xdist: four tests at a time as one at a time."""

from __future__ import annotations

import re

import pytest

from tests.support.patience import patient
from tests.support.plugin_guests import guests_of, wait_until_gone

pytestmark = pytest.mark.bare

TESTS = """
    import pytest
    import pyvmm

    KERNELS = ["ready", "panic", "oops", "warning", "lockup", "root", "colour", "ready", "ready"]

    @pytest.mark.pyvmm(agent=False)
    @pytest.mark.parametrize("number", range(len(KERNELS)), ids=[f"a/{k}" for k in range(9)])
    def test_it(pyvmm_boot, number):
        vm = pyvmm_boot(kernel=KERNELS[number])
        vm.console.expect(r"\\[ +1\\.0\\]|ready", timeout_s=60)
        if KERNELS[number] != "ready":
            vm.console.expect(r"\\[ +1\\.0\\].*\\n", timeout_s=60)

    @pytest.mark.pyvmm(kernel="ready", agent=False, scope="session")
    @pytest.mark.parametrize("number", range(8))
    def test_shared(vm, number):
        assert vm.outcome is None
"""


def results(done: pytest.RunResult) -> dict[str, str]:
    """Return the result of each test by its name, from the lines of ``-rA``."""
    lines = (re.match(r"(PASSED|FAILED|ERROR) \S+::(\S+)", line) for line in done.outlines)
    return {found[2]: found[1] for found in lines if found}


def test_four_at_a_time_agree_with_one_at_a_time(inner: pytest.Pytester) -> None:
    inner.makepyfile(test_x=TESTS)
    one = inner.runpytest_subprocess("-rA", "--pyvmm-logs", "one")
    four = inner.runpytest_subprocess("-rA", "--pyvmm-logs", "four", "-n", "4")
    assert results(one) == results(four)
    assert list(results(one).values()).count("FAILED") == 5
    assert len(results(one)) == 17
    assert guests_of(inner.path) == []
    four.stdout.fnmatch_lines(["*pyvmm vm: registers*"])

    def of_tests(folder: str) -> dict[str, str]:
        return {
            str(log.relative_to(inner.path / folder)): log.read_text()
            for log in inner.path.joinpath(folder).rglob("test_it*.log")
        }

    assert of_tests("one") == of_tests("four")
    assert len(of_tests("one")) == 9
    shared = [log.read_text() for log in inner.path.joinpath("four").glob("session*.log")]
    assert 1 <= len(shared) <= 4
    marks = re.findall(r"^==== pyvmm: .*::test_shared\[(\d)\] begins ====$", "\n".join(shared),
                       re.MULTILINE)
    assert sorted(marks) == list("01234567")


def test_a_workers_guest_ends_with_the_worker(inner: pytest.Pytester) -> None:
    inner.makepyfile("""
        import os
        import pytest

        @pytest.mark.pyvmm(kernel="ready", agent=False)
        @pytest.mark.parametrize("number", range(4))
        def test_it(vm, number):
            if number == 2:
                os.kill(os.getpid(), 9)
    """)
    done = inner.runpytest_subprocess("-n", "2")
    done.assert_outcomes(passed=3, failed=1)
    assert wait_until_gone(inner.path, patient(15)) == []


def test_a_bad_marker_is_an_error_in_the_workers_too(inner: pytest.Pytester) -> None:
    inner.makepyfile("""
        import pytest

        @pytest.mark.pyvmm(kernal="ready")
        def test_it(vm):
            pass
    """)
    done = inner.runpytest_subprocess("-n", "2")
    done.stdout.fnmatch_lines(["*did you mean kernel?*"])
    assert done.ret != 0
