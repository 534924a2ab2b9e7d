"""``vm_clone``: the session boots once, and each test has a machine of its own."""

from __future__ import annotations

import pytest

from tests.support.patience import patient
from tests.support.plugin_guests import LEFTOVERS, wait_until_gone

pytestmark = [pytest.mark.bare, pytest.mark.timeout(240)]

PREPARED = """
    from pathlib import Path
    import pytest
    import pyvmm

    pytestmark = pytest.mark.pyvmm(kernel="ready", agent=False)
    PIDS = []

    @pytest.fixture(scope="session")
    def pyvmm_prepare():
        def prepare(vm):
            vm.console.expect("ready", timeout_s=60)
            with Path("boots").open("a") as boots:
                boots.write("one\\n")
        return prepare
"""
TESTS = f"""{PREPARED}
    @pytest.mark.parametrize("number", range(12))
    def test_own(vm_clone, number):
        assert vm_clone.outcome is None
        assert vm_clone.pid not in PIDS
        PIDS.append(vm_clone.pid)
        assert vm_clone.pause()

    def test_broken(vm_clone):
        vm_clone.stop()

    def test_killed(vm_clone):
        import os, signal
        os.kill(vm_clone.pid, signal.SIGKILL)
        with pytest.raises(pyvmm.PyvmmError):
            vm_clone.console.expect("never", timeout_s=60)

    def test_several(pyvmm_clone):
        first, second = pyvmm_clone(), pyvmm_clone()
        assert first.pid != second.pid
        assert (first.outcome, second.outcome) == (None, None)
"""


def test_one_boot_and_a_clone_for_each_test(inner: pytest.Pytester) -> None:
    inner.makepyfile(test_x=TESTS)
    inner.makeconftest(LEFTOVERS)
    done = inner.runpytest_subprocess("-v", "-s", "--pyvmm-logs=logs", timeout=patient(100))
    outcomes = done.parseoutcomes()
    assert outcomes["passed"] == 15, done.stdout.str()
    assert (inner.path / "boots").read_text().split() == ["one"]
    logs = sorted(path.name for path in (inner.path / "logs").rglob("*.log"))
    assert "cloned.log" in logs
    assert "ready" in (inner.path / "logs" / "cloned.log").read_text()
    assert wait_until_gone(inner.path, patient(10)) == []
    done.stdout.no_fnmatch_line("LEFT BY*test_own*")


def test_other_arguments_are_another_boot(inner: pytest.Pytester) -> None:
    inner.makepyfile(test_x=f"""{PREPARED}
    def test_one(vm_clone):
        pass

    @pytest.mark.pyvmm(memory="64M")
    def test_other(vm_clone):
        pass

    def test_a_clone_with_an_argument(pyvmm_clone):
        pyvmm_clone(memory="64M")
        with pytest.raises(TypeError, match="pyvmm_clone: there is no argument 'memmory'"):
            pyvmm_clone(memmory="64M")
    """)
    done = inner.runpytest_subprocess(timeout=patient(100))
    done.assert_outcomes(passed=3)
    assert (inner.path / "boots").read_text().split() == ["one"] * 2


def test_a_preparation_that_fails_is_not_tried_again(inner: pytest.Pytester) -> None:
    inner.makepyfile(test_x="""
    from pathlib import Path
    import pytest

    pytestmark = pytest.mark.pyvmm(kernel="ready", agent=False)

    @pytest.fixture(scope="session")
    def pyvmm_prepare():
        def prepare(vm):
            with Path("tried").open("a") as tried:
                tried.write("once\\n")
            raise ValueError("the database is not filled")
        return prepare

    def test_one(vm_clone):
        pass

    def test_other(vm_clone):
        pass
    """)
    done = inner.runpytest_subprocess(timeout=patient(100))
    done.assert_outcomes(errors=2)
    assert done.stdout.str().count("ValueError: the database is not filled") >= 2
    assert (inner.path / "tried").read_text() == "once\n"
    assert wait_until_gone(inner.path, patient(10)) == []


def test_a_disk_that_is_written_in_place_is_refused_by_name(inner: pytest.Pytester) -> None:
    (inner.path / "disk.img").write_bytes(bytes(1 << 20))
    inner.makepyfile(test_x="""
    import pytest

    @pytest.mark.pyvmm(kernel="ready", agent=False, disk="disk.img,rw")
    def test_one(vm_clone):
        pass
    """)
    done = inner.runpytest_subprocess(timeout=patient(100))
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines(["*SnapshotError:*disk.img*"])
    assert wait_until_gone(inner.path, patient(10)) == []
