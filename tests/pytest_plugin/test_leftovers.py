"""Nothing of a guest survives its test: no process, thread, descriptor or temporary file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.support.patience import patient
from tests.support.plugin_guests import LEFTOVERS, guests_of, wait_until_gone

pytestmark = pytest.mark.bare
BOOTS = 50


def test_fifty_boots_leave_nothing_behind(inner: pytest.Pytester) -> None:
    inner.makeconftest(LEFTOVERS)
    inner.path.joinpath("d.img").write_bytes(bytes(1 << 20))
    temporary = inner.mkdir("temporary")
    inner.makepyfile(f"""
        import pytest

        @pytest.mark.pyvmm(kernel="ready", agent=False, disk="d.img", memory="64M")
        @pytest.mark.parametrize("number", range({BOOTS}))
        def test_it(vm, number):
            vm.console.expect("ready", timeout_s=60)
            assert number % 10 != 7
    """)
    os.environ["TMPDIR"] = str(temporary)
    try:
        done = inner.runpytest_subprocess("-s", "--pyvmm-logs", "logs")
    finally:
        del os.environ["TMPDIR"]
    done.assert_outcomes(passed=BOOTS - 5, failed=5)
    assert [line for line in done.outlines if "LEFT BY" in line] == []
    assert guests_of(inner.path) == []
    assert list(temporary.iterdir()) == []
    logs = sorted(inner.path.glob("logs/*/test_it*.log"))
    assert len(logs) == BOOTS
    assert all("ready" in log.read_text() for log in logs)


@pytest.mark.parametrize(("body", "options"), [
    ("assert False", ()),
    ("raise KeyboardInterrupt", ()),
    ("pyvmm_boot(kernel='missing')", ()),
    ("pyvmm_boot(agent='image', boot_timeout=0.5)", ()),
    ("time.sleep(1000)", ("--timeout", "2", "--timeout-method", "signal")),
    ("vm.console.expect('never', timeout_s=1000)",
     ("--timeout", "2", "--timeout-method", "signal")),
    ("vm.console.expect('never', timeout_s=1000)",
     ("--timeout", "2", "--timeout-method", "thread")),
    ("os._exit(3)", ()),
    ("os.kill(os.getpid(), 9)", ()),
])
def test_a_guest_ends_with_its_test_however_that_ends(
    inner: pytest.Pytester, body: str, options: tuple[str, ...]
) -> None:
    inner.makepyfile(f"""
        import os
        import time
        import pytest

        @pytest.mark.pyvmm(kernel="ready", agent=False)
        def test_it(vm, pyvmm_boot):
            vm.console.expect("ready", timeout_s=60)
            {body}
    """)
    done = inner.runpytest_subprocess(*options)
    assert done.ret != 0
    assert wait_until_gone(inner.path, patient(15)) == []


def test_a_failing_setup_leaves_nothing(inner: pytest.Pytester) -> None:
    inner.makeconftest(LEFTOVERS)
    inner.makepyfile("""
        import pytest

        pytestmark = pytest.mark.pyvmm(kernel="ready", agent=False)

        @pytest.fixture
        def broken(vm):
            raise RuntimeError("no")

        def test_first(vm):
            pass

        def test_it(broken):
            pass

        def test_machine(machine):
            machine.start()
            assert False
    """)
    done = inner.runpytest_subprocess("-s")
    done.assert_outcomes(passed=1, errors=1, failed=1)
    assert [line for line in done.outlines if "LEFT BY" in line] == []
    assert guests_of(inner.path) == []


def test_ctrl_c_ends_the_guests_before_the_session(inner: pytest.Pytester) -> None:
    inner.makepyfile("""
        import time
        import pytest

        @pytest.mark.pyvmm(kernel="ready", agent=False, scope="session")
        def test_it(vm):
            print("RUNS", flush=True)
            time.sleep(1000)
    """)
    session = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-s"], stdout=subprocess.PIPE, text=True, cwd=inner.path,
        stdin=subprocess.DEVNULL, start_new_session=True,
    )
    assert session.stdout is not None
    try:
        while "RUNS" not in session.stdout.readline():
            pass
        time.sleep(0.2)
        assert len(guests_of(inner.path)) == 1
        os.killpg(session.pid, signal.SIGINT)
        output, _ = session.communicate(timeout=patient(60))
    finally:
        session.kill()
        session.wait()
    assert session.returncode == pytest.ExitCode.INTERRUPTED
    assert "KeyboardInterrupt" in output
    assert guests_of(inner.path) == []
