"""The pytest plugin with Linux: one inner session, a few boots, every part of a report."""

from __future__ import annotations

import pytest

from tests.support.guest import IMAGE, KERNEL
from tests.support.patience import patient

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(900)]

TESTS = f"""
    import time
    import pytest
    import pyvmm

    pytestmark = pytest.mark.pyvmm(
        kernel={str(KERNEL)!r}, disk={str(IMAGE)!r}, memory="128M"
    )

    @pytest.mark.pyvmm(scope="module")
    class TestShared:
        def test_command(self, vm):
            assert vm.run(["cat", "/proc/sys/kernel/ostype"], check=True).stdout == "Linux\\n"
            vm.write("/tmp/left", "for the next test")

        def test_next(self, vm, vm_module):
            assert vm is vm_module
            assert vm.read("/tmp/left") == b"for the next test"

        def test_assertion(self, vm):
            vm.run(["sh", "-c", "echo 0 > /proc/self/oom_adj"], check=True)
            assert vm.run(["false"]).status == 0

        def test_warning_that_nobody_waits_for(self, vm):
            vm.write("/dev/kmsg", "<4>WARNING: CPU: 0 PID: 1 at a test\\n")
            time.sleep(2)  # the console is behind in the lab

    def test_panic(vm):
        with pytest.raises(pyvmm.KernelPanic, match="sysrq triggered crash"):
            vm.run(["sh", "-c", "echo c > /proc/sysrq-trigger"])

    def test_panic_fails(vm):
        vm.run(["sh", "-c", "echo c > /proc/sysrq-trigger"])

    @pytest.mark.pyvmm(disks=[], agent=False)
    def test_root(vm):
        with pytest.raises(pyvmm.RootNotMounted):
            vm.console.expect("never", timeout_s=600)
"""


def test_linux_in_an_inner_session(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    pytester.makepyfile(test_x=TESTS)
    done = pytester.runpytest_subprocess(
        "-v", "--pyvmm-logs", "logs", "--pyvmm-lab", "never", timeout=patient(600)
    )
    done.assert_outcomes(passed=4, failed=3)
    done.stdout.fnmatch_lines([
        "*_ TestShared.test_assertion _*", "*assert 1 == 0*",
        "*- pyvmm vm of the module: last lines of the console -*",
        "*- pyvmm vm of the module: kernel log, warn and worse -*", "*oom_adj is deprecated*",
        "*- pyvmm vm of the module: registers -*", "*rip*",
        "*KernelWarning*WARNING: CPU: 0 PID: 1 at a test*",
        "*_ test_panic_fails _*", "*KernelPanic*sysrq triggered crash*",
    ])
    logs = pytester.path / "logs" / "test_x.py"
    assert sorted(log.name for log in logs.iterdir()) == [
        "shared.log", "test_panic.log", "test_panic_fails.log", "test_root.log",
    ]
    assert "sysrq triggered crash" in logs.joinpath("test_panic_fails.log").read_text()
    assert logs.joinpath("shared.log").read_text().count(" begins ====") == 4
