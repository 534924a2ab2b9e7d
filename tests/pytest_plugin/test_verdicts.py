"""Each verdict on a guest fails its test by a name of its own, with a report, at any moment."""

from __future__ import annotations

import pytest

from tests.support.tiny_guests import SPIN, prints, write_guest

pytestmark = pytest.mark.bare

VERDICTS = [
    ("panic", "KernelPanic"), ("oops", "KernelOops"), ("warning", "KernelWarning"),
    ("lockup", "Lockup"), ("root", "RootNotMounted"), ("triple-fault", "TripleFault"),
    ("reboots", "GuestEnded"), ("reports", "GuestEnded"),
]


@pytest.mark.parametrize(("kernel", "name"), VERDICTS)
def test_a_test_that_waits_gets_the_verdict(
    inner: pytest.Pytester, kernel: str, name: str
) -> None:
    inner.makepyfile(f"""
        import pytest
        import pyvmm

        @pytest.mark.pyvmm(kernel="{kernel}", agent=False)
        def test_waits(vm):
            vm.console.expect("a word that never comes", timeout_s=60)

        @pytest.mark.pyvmm(kernel="{kernel}", agent=False)
        def test_expects(vm):
            with pytest.raises(pyvmm.{name}):
                vm.console.expect("a word that never comes", timeout_s=60)

        @pytest.mark.pyvmm(kernel="{kernel}", agent=False)
        def test_does_not_look(vm):
            import time
            deadline = 600 + time.monotonic()
            while vm.failure is None and time.monotonic() < deadline:
                time.sleep(0.01)
    """)
    done = inner.runpytest_subprocess()
    done.assert_outcomes(passed=1, failed=2)
    done.stdout.fnmatch_lines([f"FAILED *::test_waits - *{name}*"])
    done.stdout.fnmatch_lines([f"FAILED *::test_does_not_look - *{name}*"])
    done.stdout.fnmatch_lines(["*pyvmm vm: last lines of the console*", "*ready*"])
    done.stdout.fnmatch_lines(["*pyvmm vm: registers*", "*rip*"])


def test_a_time_limit_is_a_verdict(inner: pytest.Pytester) -> None:
    inner.makepyfile("""
        import pytest
        import pyvmm

        @pytest.mark.pyvmm(kernel="spins", agent=False, timeout=1)
        def test_waits(vm):
            with pytest.raises(pyvmm.RunTimeout):
                vm.console.expect("a word that never comes", timeout_s=60)

        @pytest.mark.pyvmm(kernel="spins", agent="image", boot_timeout=1)
        def test_no_agent(vm):
            pass
    """)
    done = inner.runpytest_subprocess()
    done.assert_outcomes(passed=1, errors=1)
    done.stdout.fnmatch_lines(["ERROR *::test_no_agent - *BootTimeout: *"])
    done.stdout.fnmatch_lines(["*pyvmm vm: last lines of the console*", "*ready*"])


def test_fail_on_is_the_users(inner: pytest.Pytester) -> None:
    inner.makepyfile("""
        import time
        import pytest
        import pyvmm

        def settled(vm):
            vm.console.expect(r"\\[ +1\\.0\\].*\\n", timeout_s=60)
            time.sleep(0.1)

        @pytest.mark.pyvmm(kernel="warning", agent=False, fail_on=pyvmm.FAIL_ON.without("warning"))
        def test_forgiven(vm):
            settled(vm)

        @pytest.mark.pyvmm(kernel="oops", agent=False, fail_on=pyvmm.FAIL_ON.allowing("NULL p"))
        def test_allowed(vm):
            settled(vm)

        @pytest.mark.pyvmm(kernel="colour", agent=False)
        def test_harmless(vm):
            settled(vm)

        @pytest.mark.pyvmm(kernel="colour", agent=False, fail_on=pyvmm.FAIL_ON.also("sky is green"))
        def test_own(vm):
            settled(vm)
    """)
    done = inner.runpytest_subprocess()
    done.assert_outcomes(passed=3, failed=1)
    done.stdout.fnmatch_lines(["FAILED *::test_own - *FailedOn: *the sky is green*"])


def test_an_end_that_the_test_knows_of_is_none(inner: pytest.Pytester) -> None:
    inner.makepyfile("""
        import time
        import pytest
        import pyvmm

        @pytest.mark.pyvmm(kernel="reports", agent=False)
        def test_waits(vm):
            assert vm.wait().kind is pyvmm.Kind.GUEST_STATUS

        @pytest.mark.pyvmm(kernel="reboots", agent=False, may_end=True)
        def test_may(vm):
            time.sleep(1)

        @pytest.mark.pyvmm(kernel="ready", agent=False)
        def test_stops(vm):
            assert vm.stop().kind is pyvmm.Kind.STOPPED
    """)
    inner.runpytest_subprocess().assert_outcomes(passed=3)


def test_a_shared_guest_fails_the_test_that_ran(inner: pytest.Pytester) -> None:
    inner.makepyfile("""
        import time
        import pytest

        pytestmark = pytest.mark.pyvmm(kernel="oops", agent=False, scope="session")

        def test_it(vm):
            time.sleep(1)

        @pytest.mark.pyvmm(kernel="ready")
        def test_next(vm):
            vm.console.expect("ready", timeout_s=30)
    """)
    done = inner.runpytest_subprocess()
    done.assert_outcomes(failed=1, passed=1)
    done.stdout.fnmatch_lines(["*pyvmm vm of the session: registers*"])


def test_the_traceback_ends_in_the_test(inner: pytest.Pytester) -> None:
    inner.makepyfile("""
        import pytest

        @pytest.mark.pyvmm(kernel="panic", agent=False)
        def test_it(vm):
            vm.console.expect("a word that never comes", timeout_s=60)
    """)
    short = inner.runpytest_subprocess()
    short.stdout.no_fnmatch_line("*/pyvmm/*.py:*")
    short.stdout.fnmatch_lines([">*vm.console.expect(*"])
    full = inner.runpytest_subprocess("--full-trace")
    full.stdout.fnmatch_lines(["*/pyvmm/*.py:*"])


def test_a_guest_gives_githubs_runner_no_commands(
    inner: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runner obeys lines that begin with ``::``: what a guest prints is quoted unindented."""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    write_guest(inner.path / "obeyed", prints(b"::add-mask::e\r\n ##[group]x\r\nready\r\n"), SPIN)
    inner.makepyfile("""
        import pytest

        @pytest.mark.pyvmm(kernel="obeyed", agent=False)
        def test_it(vm):
            vm.console.expect("ready", timeout_s=60)
            assert False
    """)
    done = inner.runpytest_subprocess()
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(
        ["*last lines of the console*", "[\\]x3a:add-mask::e", " ##[\\]x5bgroup]x"]
    )
    done.stdout.no_fnmatch_line("::*")
