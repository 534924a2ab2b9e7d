"""A booted Linux for each test: a clone, or with --boot-each a boot, to see the difference."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import pyvmm


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option by which the clones are compared with boots."""
    parser.addoption("--boot-each", action="store_true", help="boot a machine for each test")


@pytest.fixture(scope="session")
def pyvmm_prepare() -> Callable[[pyvmm.Vm], object]:
    """Return what is done once, after the boot: each clone begins behind it."""
    def prepare(vm: pyvmm.Vm) -> None:
        vm.write("/root/numbers", "".join(f"{number}\n" for number in range(1000)))

    return prepare


@pytest.fixture
def guest(request: pytest.FixtureRequest, pyvmm_prepare: Callable[[pyvmm.Vm], object]) -> pyvmm.Vm:
    """Return the test's own machine."""
    if not request.config.getoption("--boot-each"):
        clone: pyvmm.Vm = request.getfixturevalue("vm_clone")
        return clone
    booted: pyvmm.Vm = request.getfixturevalue("vm")
    pyvmm_prepare(booted)
    return booted
