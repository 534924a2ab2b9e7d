"""Kernels as parameters: short names without slashes, no two of them equal."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvmm.pytest_plugin.kernels import ids_of
from tests.support.kernels import bzimage


@pytest.mark.parametrize(("kernels", "ids"), [
    ([], []),
    (["/boot/vmlinuz-6.1.0-50-amd64"], ["vmlinuz-6.1.0-50-amd64"]),
    (["/a/one", "/b/two"], ["one", "two"]),
    (["/a/bzImage", "/b/bzImage"], ["a-bzImage", "b-bzImage"]),
    (["/a/x/bzImage", "/b/x/bzImage", "/c"], ["a-x-bzImage", "b-x-bzImage", "c"]),
    (["/bzImage", "/b/bzImage"], ["bzImage", "b-bzImage"]),
    (["/k/a b[1]", "/k/a/b"], ["a_b_1_", "b"]),
    (["/k/a b", "/k/a_b"], ["a_b-0", "a_b-1"]),
])
def test_the_name_of_each(kernels: list[str], ids: list[str]) -> None:
    assert ids_of(kernels) == ids


def test_a_plain_name_gets_the_release(tmp_path: Path) -> None:
    kernel = tmp_path / "bzImage"
    kernel.write_bytes(bzimage())
    (found,) = ids_of([str(kernel)])
    assert found.startswith("bzImage")
    assert "/" not in found


def test_each_kernel_is_a_run_of_the_test(pytester: pytest.Pytester) -> None:
    for name in ("one", "two", "three"):
        pytester.path.joinpath(name).touch()
    pytester.makepyfile("""
        import pytest

        def test_of_the_command_line(pyvmm_kernel):
            pass

        @pytest.mark.pyvmm(kernel=["one", "three"])
        def test_of_the_marker(pyvmm_kernel):
            pass

        @pytest.mark.pyvmm(kernel="three")
        def test_of_one(pyvmm_kernel):
            pass

        def test_without():
            pass
    """)
    done = pytester.runpytest_inprocess(
        "--pyvmm-kernel", "one", "--pyvmm-kernel", "two", "--collect-only", "-q"
    )
    assert sorted(line.partition("::")[2] for line in done.outlines if "::" in line) == [
        "test_of_one", "test_of_the_command_line[one]", "test_of_the_command_line[two]",
        "test_of_the_marker[one]", "test_of_the_marker[three]", "test_without",
    ]


def test_one_kernel_changes_no_name(pytester: pytest.Pytester) -> None:
    pytester.path.joinpath("one").touch()
    pytester.makepyfile("def test_a(pyvmm_kernel):\n    assert pyvmm_kernel.endswith('/one')")
    done = pytester.runpytest_inprocess("--pyvmm-kernel", "one", "-v")
    done.stdout.fnmatch_lines(["*::test_a PASSED*"])
