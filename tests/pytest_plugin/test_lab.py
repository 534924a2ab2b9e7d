"""Without a KVM that runs Linux: the same command in the lab, or failures that say why."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvmm.pytest_plugin import lab
from pyvmm.pytest_plugin.options import read_options
from tests.support.patience import patient

NO_KVM = """
from pyvmm.testing import usable_kvm

usable_kvm.kvm_problem = lambda: "this host's KVM is made of wood"
usable_kvm.problem_for = lambda kernel: usable_kvm.kvm_problem()
"""
FAKE_LAB = NO_KVM + """
import os
from pyvmm.pytest_plugin import lab

def execve(program, words, environment):
    line = " ".join(words)
    os.write(1, f"EXEC {line}\\n".encode())
    os._exit(42)

lab.os.execve = execve
"""
TESTS = """
    import pytest

    @pytest.mark.pyvmm(kernel="ready", agent=False)
    def test_vm(vm):
        vm.console.expect("ready", timeout_s=600)

    @pytest.fixture
    def mine(pyvmm_boot_module):
        pass

    def test_of_a_fixture(mine):
        assert False

    def test_plain():
        pass
"""


@pytest.fixture
def host(inner: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """An inner session on a host without KVM, which may go to the lab: a stand-in."""
    monkeypatch.delenv("PYVMM_LAB", raising=False)
    inner.makeini("[pytest]\n")
    inner.makeconftest(FAKE_LAB)
    inner.makepyfile(test_x=TESTS)
    return inner


def test_the_command_runs_again_in_the_lab_and_its_status_is_ours(host: pytest.Pytester) -> None:
    junit = host.path / "junit.xml"
    junit.write_text("of the lab")
    done = host.runpytest_subprocess("-q", f"--junitxml={junit}", "-p", "no:cacheprovider")
    assert done.ret == 42
    done.stdout.fnmatch_lines([
        "pyvmm: this host's KVM is made of wood",
        "pyvmm: running this command again in the lab, *",
        f"EXEC * -m pyvmm lab --memory 2G --rw {host.path} -- * -q --junitxml={junit} -p *",
    ])
    assert junit.read_text() == "of the lab", "this session wrote no report over the lab's"


@pytest.mark.parametrize("options", [
    ("-k", "plain"), ("--collect-only",), ("--pyvmm-lab", "never", "-k", "plain"),
])
def test_a_session_that_needs_no_machine_stays_here(
    host: pytest.Pytester, options: tuple[str, ...]
) -> None:
    done = host.runpytest_subprocess(*options)
    assert done.ret == 0
    done.stdout.no_fnmatch_line("EXEC*")


def test_never_fails_the_tests_and_says_why(host: pytest.Pytester) -> None:
    done = host.runpytest_subprocess("--pyvmm-lab", "never", "-rA")
    done.assert_outcomes(passed=1, failed=1, errors=1)
    done.stdout.fnmatch_lines([
        "no virtual machine: this host's KVM is made of wood; and no lab: --pyvmm-lab never.*",
    ])
    assert done.ret == 1


def test_in_the_lab_nobody_asks_again(
    host: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYVMM_LAB", "1")
    done = host.runpytest_subprocess("-k", "plain or of_a_fixture")
    done.assert_outcomes(passed=1, failed=1)
    done.stdout.fnmatch_lines(["pyvmm: in the lab: *"])


def test_a_test_that_is_skipped_needs_no_lab(host: pytest.Pytester) -> None:
    host.makepyfile(test_x="""
        import pytest

        @pytest.mark.skip(reason="not today")
        def test_vm(vm):
            pass
    """)
    host.runpytest_subprocess().assert_outcomes(skipped=1)


def test_a_projects_own_fixture_of_that_name_is_none_of_ours(host: pytest.Pytester) -> None:
    host.makepyfile(test_x="""
        import pytest

        @pytest.fixture
        def vm():
            return "their own"

        def test_vm(vm):
            assert vm == "their own"
    """)
    host.runpytest_subprocess().assert_outcomes(passed=1)


def test_with_xdist_the_controller_goes(host: pytest.Pytester) -> None:
    done = host.runpytest_subprocess("-n", "2")
    assert done.ret == 42
    done.stdout.fnmatch_lines([
        "pyvmm: this host's KVM is made of wood", "EXEC * -m pyvmm lab * -- * -n 2",
    ])
    plain = host.runpytest_subprocess("-n", "2", "-k", "plain")
    plain.assert_outcomes(passed=1)
    never = host.runpytest_subprocess("-n", "2", "--pyvmm-lab", "never")
    never.assert_outcomes(passed=1, failed=1, errors=1)
    never.stdout.fnmatch_lines(["no virtual machine: *made of wood; and no lab: *"])


def test_reports_are_written_where_they_were_asked_for(
    pytester: pytest.Pytester, tmp_path: Path
) -> None:
    project = pytester.mkdir("project")
    project.joinpath(".git").mkdir()
    elsewhere = tmp_path / "elsewhere"
    for name in ("a", "b"):
        elsewhere.joinpath(name).mkdir(parents=True)
    config = pytester.parseconfigure(
        f"--junitxml={elsewhere}/a/j.xml", f"--log-file={elsewhere}/a/b/log", "--pyvmm-logs",
        "project/logs", "--pyvmm-lab-rw", f"{elsewhere}/b",
    )
    found = lab.writable_directories(config, read_options(config))
    assert found == sorted([pytester.path, elsewhere / "a", elsewhere / "b"])


@pytest.mark.lab
def test_the_lab_itself(host: pytest.Pytester, tmp_path: Path) -> None:
    host.makeconftest(NO_KVM)
    reports = tmp_path / "reports"
    done = host.runpytest_subprocess(
        "-v", "-k", "vm or plain", f"--junitxml={reports}/junit.xml", "--pyvmm-logs",
        f"{reports}/logs", timeout=patient(280),
    )
    assert done.ret == 0
    done.stdout.fnmatch_lines([
        "pyvmm: running this command again in the lab, *", "pyvmm: in the lab: *",
        "*test_vm PASSED*", "*test_plain PASSED*",
    ])
    assert 'tests="2"' in reports.joinpath("junit.xml").read_text()
    assert "ready" in reports.joinpath("logs/test_x.py/test_vm.log").read_text()
