"""The options: on the command line, in pytest's configuration, and in sessions without either."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pyvmm.pytest_plugin.options import read_options


def test_a_session_without_virtual_machines_imports_little(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import sys

        def test_a():
            ours = {name for name in sys.modules if name.startswith("pyvmm")}
            assert ours == {
                "pyvmm", "pyvmm.pytest_plugin", "pyvmm.pytest_plugin.plugin",
                "pyvmm.pytest_plugin.options",
            }
    """)
    done = pytester.runpytest_subprocess()
    done.assert_outcomes(passed=1)
    done.stdout.no_fnmatch_line("pyvmm:*")


@pytest.mark.parametrize(("words", "problem"), [
    (["--pyvmm-kernel", "missing"], "--pyvmm-kernel */missing: there is no such file"),
    (["--pyvmm-disk", "missing,ro"], "--pyvmm-disk */missing,ro: there is no such file"),
    (["--pyvmm-kernel", "a", "--pyvmm-kernel", "./a"], "--pyvmm-kernel */a: given more than once"),
    (["-o", "pyvmm_lab=maybe"], "pyvmm_lab = maybe: must be auto or never"),
    (["--pyvmm-lab", "maybe"], "*--pyvmm-lab: invalid choice: 'maybe'*"),
])
def test_a_bad_option_ends_the_session_by_name(
    pytester: pytest.Pytester, words: list[str], problem: str
) -> None:
    pytester.path.joinpath("a").touch()
    done = pytester.runpytest_subprocess(*words)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines([f"*{problem}*"])


def test_the_configuration_file_says_the_same(pytester: pytest.Pytester) -> None:
    for name in ("k1", "k2"):
        pytester.path.joinpath(name).touch()
    pytester.makeini("""
        [pytest]
        pyvmm_kernel = k1
            k2
        pyvmm_disk = d.img,ro
            nbd://localhost/x
        pyvmm_logs = out/logs
        pyvmm_lab = never
        pyvmm_lab_memory = 3G
        pyvmm_lab_rw = out
    """)
    here = pytester.path
    found = read_options(pytester.parseconfigure())
    assert found.kernels == (str(here / "k1"), str(here / "k2"))
    assert found.disks == (f"{here}/d.img,ro", "nbd://localhost/x")
    assert found.logs == here / "out" / "logs"
    assert (found.lab, found.lab_memory, found.lab_writable) == ("never", "3G", (here / "out",))


def test_the_command_line_wins(pytester: pytest.Pytester) -> None:
    for name in ("k1", "k2", "b"):
        pytester.path.joinpath(name).touch()
    pytester.makeini("[pytest]\npyvmm_kernel = k1\npyvmm_disk = a\npyvmm_logs = l\npyvmm_lab=never")
    here = pytester.path
    found = read_options(pytester.parseconfigure(
        "--pyvmm-kernel", "k2", "--pyvmm-disk", "b,rw", "--pyvmm-logs", "m", "--pyvmm-lab", "auto"
    ))
    assert found.kernels == (str(here / "k2"),)
    assert found.disks == (f"{here}/b,rw",)
    assert found.logs == here / "m"
    assert found.lab == "auto"


def test_the_plugin_is_found_by_its_entry_point() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--trace-config", "--collect-only", "/dev/null"],
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )
    assert "pyvmm.pytest_plugin.plugin" in done.stdout or "pyvmm_kernel" in done.stdout or (
        "pyvmm-0.1.0" in done.stdout
    )


def test_a_kernel_of_the_configuration_that_is_not_built_concerns_only_its_tests(
    pytester: pytest.Pytester
) -> None:
    pytester.makeini("[pytest]\npyvmm_kernel = missing\npyvmm_lab = never")
    pytester.makepyfile("""
        import pytest

        def test_plain():
            pass

        @pytest.mark.pyvmm(agent=False)
        def test_boots(vm):
            pass
    """)
    done = pytester.runpytest_subprocess()
    done.assert_outcomes(passed=1, errors=1)
    done.stdout.fnmatch_lines(["*/missing: cannot open: No such file*"])
