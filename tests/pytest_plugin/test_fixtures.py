"""The fixtures, with guests of a few bytes: who gets which machine, and when it is gone."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.bare


def test_a_test_has_a_machine_of_its_own(inner: pytest.Pytester) -> None:
    inner.makepyfile("""
        import os
        import pytest

        pytestmark = pytest.mark.pyvmm(kernel="ready", agent=False)
        seen = []

        @pytest.mark.parametrize("number", [1, 2])
        def test_own(vm, number):
            vm.console.expect("ready", timeout_s=30)
            seen.append(vm.pid)

        def test_gone():
            assert len(set(seen)) == 2
            for pid in seen:
                with pytest.raises(ProcessLookupError):
                    os.kill(pid, 0)
    """)
    inner.runpytest_subprocess().assert_outcomes(passed=3)


def test_the_factory_boots_several_with_arguments_of_their_own(inner: pytest.Pytester) -> None:
    inner.makepyfile("""
        import pytest

        @pytest.mark.pyvmm(kernel="ready", agent=False, memory="64M")
        def test_two(pyvmm_boot):
            first = pyvmm_boot()
            second = pyvmm_boot(kernel="spins", memory="32M")
            assert first.pid != second.pid
            for vm in first, second:
                vm.console.expect("ready", timeout_s=30)
            assert first.memory.read((64 << 20) - 1, 1) == b"\\0"
            with pytest.raises(Exception, match="is not RAM"):
                second.memory.read(32 << 20, 1)

        def test_bad(pyvmm_boot):
            with pytest.raises(TypeError, match="pyvmm_boot: there is no argument 'kernal'"):
                pyvmm_boot(kernal="x")
    """)
    inner.runpytest_subprocess().assert_outcomes(passed=2)


def test_a_module_and_a_session_share_a_machine(inner: pytest.Pytester) -> None:
    for name in ("test_one.py", "test_two.py"):
        inner.path.joinpath(name).write_text("""if True:
            import pytest

            pytestmark = pytest.mark.pyvmm(kernel="ready", agent=False, scope="module")

            def test_a(vm, vm_module, pyvmm_boot_session, in_session):
                assert vm is vm_module
                assert vm.pid != in_session.pid
                print(f"PIDS {vm.pid} {in_session.pid}")

            def test_b(vm, in_session):
                print(f"PIDS {vm.pid} {in_session.pid}")

            @pytest.mark.pyvmm(memory="64M")
            def test_other_plan(vm, vm_module):
                assert vm is not vm_module

            @pytest.mark.pyvmm(scope="session")
            class TestSession:
                def test_first(self, vm):
                    print(f"SESSION {vm.pid}")
        """)
    inner.makeconftest("""
        import pytest

        @pytest.fixture(scope="session")
        def in_session(pyvmm_boot_session):
            return pyvmm_boot_session(kernel="ready", agent=False)
    """)
    done = inner.runpytest_subprocess("-s")
    done.assert_outcomes(passed=8)
    assert len({line for line in done.outlines if "SESSION" in line}) == 1
    pids = [line.split("PIDS ")[1].split() for line in done.outlines if "PIDS " in line]
    assert pids[0] == pids[1] != pids[2] == pids[3]
    assert len({session for _, session in pids}) == 1


def test_a_users_fixture_of_the_module_builds_on_the_modules_machine(
    inner: pytest.Pytester
) -> None:
    inner.makepyfile("""
        import pytest

        pytestmark = pytest.mark.pyvmm(kernel="ready", agent=False)

        @pytest.fixture(scope="module")
        def prepared(vm_module, pyvmm_boot_module):
            vm_module.console.expect("ready", timeout_s=30)
            return pyvmm_boot_module(kernel="spins")

        @pytest.mark.parametrize("number", [1, 2])
        def test_it(prepared, vm_module, number):
            assert prepared.outcome is None
            assert vm_module.outcome is None
    """)
    inner.runpytest_subprocess().assert_outcomes(passed=2)


def test_a_shared_machine_that_has_failed_is_not_the_next_tests(inner: pytest.Pytester) -> None:
    inner.makepyfile("""
        import pytest
        import pyvmm

        pytestmark = pytest.mark.pyvmm(kernel="ready", agent=False, scope="module")
        pids = []

        def test_stops_it(vm):
            pids.append(vm.pid)
            vm.stop()

        def test_next(vm):
            assert vm.outcome is None
            assert vm.pid != pids[0]
    """)
    inner.runpytest_subprocess().assert_outcomes(passed=2)


def test_every_kernel_gets_the_same_tests(inner: pytest.Pytester) -> None:
    inner.makepyfile("""
        import pytest

        @pytest.mark.pyvmm(agent=False)
        def test_it(vm, pyvmm_kernel):
            vm.console.expect("ready", timeout_s=30)
            assert pyvmm_kernel.endswith(("/ready", "/spins"))

        @pytest.mark.pyvmm(kernel="reports", agent=False)
        def test_own_kernel(vm):
            assert vm.wait().exit_status == 0
    """)
    done = inner.runpytest_subprocess(
        "-v", "--pyvmm-kernel", "ready", "--pyvmm-kernel", "spins"
    )
    done.assert_outcomes(passed=3)
    done.stdout.fnmatch_lines(["*test_it?ready? PASSED*", "*test_it?spins? PASSED*"])


def test_a_machine_in_this_process_takes_hooks(inner: pytest.Pytester) -> None:
    inner.makepyfile("""
        import pytest
        import pyvmm

        @pytest.mark.pyvmm(kernel="reports")
        def test_it(machine):
            ports = []
            machine.on_port(0xF4, lambda access: ports.append(access.value))
            assert machine.run().kind is pyvmm.Kind.GUEST_STATUS
            assert ports == [0]
            assert "ready" in machine.console.text
    """)
    inner.runpytest_subprocess("--pyvmm-logs", "logs").assert_outcomes(passed=1)
    log = next(inner.path.glob("logs/*/test_it.log"))
    assert "ready" in log.read_text()


@pytest.mark.parametrize(("mark", "message"), [
    ("", "no kernel: name one with --pyvmm-kernel K*`pyvmm kernel fetch debian`*"),
    ("kernel='missing', agent=False", "*missing: cannot open: No such file*"),
    ("kernel='ready', agent=False, memory='5'", "*memory '5': has no unit*"),
    ("kernel='ready', agent=False, disk='missing.img'", "*missing.img*"),
])
def test_a_machine_that_cannot_be_made_says_why(
    inner: pytest.Pytester, mark: str, message: str
) -> None:
    inner.makepyfile(f"""
        import pytest

        @pytest.mark.pyvmm({mark})
        def test_it(vm):
            pass
    """)
    done = inner.runpytest_subprocess()
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines([message])
    done.stdout.no_fnmatch_line("*another exception*")


def test_the_users_image_is_not_written_unless_told(inner: pytest.Pytester) -> None:
    inner.path.joinpath("d.img").write_bytes(bytes(1 << 20))
    inner.makepyfile("""
        import subprocess
        import pytest

        def words(vm):
            return open(f"/proc/{vm.pid}/cmdline").read().split("\\0")

        @pytest.mark.pyvmm(kernel="ready", agent=False)
        class TestDisks:
            def test_option(self, vm):
                assert any(w.startswith("--disk=") and ",snapshot" in w for w in words(vm))

            @pytest.mark.pyvmm(disk="d.img,rw")
            def test_told(self, vm):
                (disk,) = [w for w in words(vm) if w.startswith("--disk=")]
                assert disk.endswith("d.img")

            @pytest.mark.pyvmm(disks=["d.img,ro", "d.img"])
            def test_two(self, vm):
                assert [w.rsplit("d.img")[1] for w in words(vm) if w.startswith("--disk=")] == [
                    ",ro", ",snapshot"]

            @pytest.mark.pyvmm(disks=[])
            def test_none(self, vm):
                assert not [w for w in words(vm) if w.startswith("--disk=")]
    """)
    inner.runpytest_subprocess("--pyvmm-disk", "d.img").assert_outcomes(passed=4)
