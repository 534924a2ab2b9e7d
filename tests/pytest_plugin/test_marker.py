"""The marker's arguments: checked by name, merged from the nearest marker outwards."""

from __future__ import annotations

import pytest

from pyvmm.pytest_plugin.marker import ARGUMENTS, OF_ONE_BOOT, ArgumentsError, checked
from pyvmm.testing.fail_on import FAIL_ON

GOOD: dict[str, object] = {
    "kernel": "bzImage", "disks": ["a.img"], "initrd": "i", "memory": "512M", "cpus": 2,
    "cpu": "host", "append": "quiet", "cmdline": "console=ttyS0", "timeout": 5, "agent": "image",
    "boot_timeout": 0.5, "fail_on": FAIL_ON, "scope": "module", "may_end": True, "mmio": "mapped",
    "serve": "exit", "rtc": "utc", "discovery": "acpi",
}


def test_every_argument_is_taken() -> None:
    assert {*GOOD, "disk"} == set(ARGUMENTS)
    assert checked("here", GOOD) == GOOD
    assert checked("here", {"disk": "a.img"}) == {"disks": ["a.img"]}


@pytest.mark.parametrize(("name", "value", "words"), [
    ("kernal", "x", "did you mean kernel?"),
    ("speed", 1, "it takes kernel, disk,"),
    ("kernel", 5, "a path or a list of paths"),
    ("kernel", [], "a path or a list of paths"),
    ("kernel", ["a", None], "a path or a list of paths"),
    ("disks", None, "a list of disks"),
    ("disk", {"a": 1}, "a list of disks"),
    ("memory", True, "a text as '512M' or bytes"),
    ("cpus", 0, "a whole number from 1 on"),
    ("cpus", "2", "a whole number from 1 on"),
    ("append", ["quiet"], "a text"),
    ("timeout", 0, "seconds, more than 0"),
    ("timeout", "1m", "seconds, more than 0"),
    ("agent", "yes", "True, False or one of none, image, inject"),
    ("fail_on", "warning", "a pyvmm.FailOn"),
    ("scope", "class", "one of function, module, session"),
    ("may_end", 1, "True or False"),
])
def test_a_bad_argument_is_named_with_what_it_takes(name: str, value: object, words: str) -> None:
    with pytest.raises(ArgumentsError) as caught:
        checked("test_x.py::test_a: @pytest.mark.pyvmm", {name: value})
    assert str(caught.value).startswith("test_x.py::test_a: @pytest.mark.pyvmm: ")
    assert name in str(caught.value)
    assert words in str(caught.value)


def test_a_disk_is_given_once() -> None:
    with pytest.raises(ArgumentsError, match="disk and disks are the same"):
        checked("here", {"disk": "a", "disks": ["b"]})


def test_a_boot_has_no_scope() -> None:
    with pytest.raises(ArgumentsError, match="no argument 'scope'"):
        checked("pyvmm_boot", {"scope": "module"}, OF_ONE_BOOT)


@pytest.mark.parametrize("mark", ["kernal='x'", "'bzImage'"])
def test_a_bad_marker_is_an_error_of_collection(pytester: pytest.Pytester, mark: str) -> None:
    pytester.makepyfile(f"""
        import pytest

        @pytest.mark.pyvmm({mark})
        def test_a():
            pass
    """)
    done = pytester.runpytest_inprocess()
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines(["*::test_a: @pytest.mark.pyvmm*"])
    assert done.ret == pytest.ExitCode.INTERRUPTED


def test_the_nearest_marker_counts_argument_by_argument(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import pytest
        from pyvmm.pytest_plugin.marker import arguments_of

        pytestmark = pytest.mark.pyvmm(memory="1G", append="module", disk="m.img")

        @pytest.mark.pyvmm(append="class", cpus=2)
        class TestIt:
            @pytest.mark.pyvmm(cpus=4, disks=[])
            def test_a(self, request):
                assert arguments_of(request.node) == {
                    "memory": "1G", "append": "class", "cpus": 4, "disks": [],
                }
    """)
    pytester.runpytest_inprocess("--strict-markers").assert_outcomes(passed=1)


def test_fault_13_the_marker_is_declared_so_strict_markers_pass(
    pytester: pytest.Pytester
) -> None:
    done = pytester.runpytest_inprocess("--markers")
    done.stdout.fnmatch_lines(["@pytest.mark.pyvmm(kernel=*"])
