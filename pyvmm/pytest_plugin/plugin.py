"""The entry point for pytest: hooks and fixtures.  docs/pytest.md is the page for users.

This module is imported in every pytest session of an environment that has pyvmm: so it imports
nothing of pyvmm that a session without virtual machines does not need.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import TYPE_CHECKING

import pytest

from pyvmm.pytest_plugin.options import Options, add_options, read_options

if TYPE_CHECKING:
    from pyvmm.api.machine import Machine
    from pyvmm.launcher.vm import Vm
    from pyvmm.pytest_plugin.clones import Origins
    from pyvmm.pytest_plugin.session import Scope, Session

OPTIONS = pytest.StashKey[Options]()
SESSION = pytest.StashKey["Session"]()
FIXTURES = frozenset(
    ("vm", "vm_module", "vm_session", "pyvmm_boot", "pyvmm_boot_module", "pyvmm_boot_session",
     "vm_clone", "pyvmm_clone", "machine")
)
"""A test that names one of these, itself or by its fixtures, has a virtual machine."""
MARKER_LINE = (
    "pyvmm(kernel=, disk=, disks=, initrd=, memory=, cpus=, append=, timeout=, boot_timeout=, "
    "agent=, fail_on=, scope=, may_end=): the virtual machine of a test (docs/pytest.md)"
)


# Options


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the plugin's options."""
    add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Read the options and declare the marker."""
    config.addinivalue_line("markers", MARKER_LINE)
    config.stash[OPTIONS] = read_options(config)
    if config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput"):
        from pyvmm.pytest_plugin.xdist import Controller

        def go_to_lab(reason: str) -> None:
            session_of(config).go_to_lab(reason)

        config.pluginmanager.register(Controller(config, go_to_lab), "pyvmm-xdist")


def session_of(config: pytest.Config) -> Session:
    """Return the session's virtual machines: made when the first test asks for one."""
    from pyvmm.pytest_plugin.session import Session

    if SESSION not in config.stash:
        config.stash[SESSION] = Session(config, config.stash[OPTIONS])
    return config.stash[SESSION]


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Return a line about kernels and the lab, in sessions that have to do with either."""
    import os

    options = config.stash[OPTIONS]
    said = [f"kernels {', '.join(options.kernels)}"] if options.kernels else []
    if os.environ.get("PYVMM_LAB"):
        said.append("in the lab: emulated, time limits of guests are ten times as long")
    return [f"pyvmm: {'; '.join(said)}"] if said else []


# Collection


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Check the markers, and run a test with each of several kernels."""
    has_marker = next(metafunc.definition.iter_markers("pyvmm"), None) is not None
    if not has_marker and "pyvmm_kernel" not in metafunc.fixturenames:
        return
    from pyvmm.pytest_plugin.kernels import ids_of
    from pyvmm.pytest_plugin.marker import ArgumentsError, arguments_of

    try:
        own = arguments_of(metafunc.definition).get("kernel")
    except ArgumentsError as error:
        raise pytest.Collector.CollectError(str(error)) from None
    if "pyvmm_kernel" not in metafunc.fixturenames:
        return
    options = metafunc.config.stash[OPTIONS]
    if isinstance(own, (list, tuple)):
        kernels = [str(metafunc.config.rootpath / kernel) for kernel in own]
    else:
        kernels = list(options.kernels) if own is None else []
    if len(kernels) > 1:
        metafunc.parametrize(
            "pyvmm_kernel", kernels, ids=ids_of(kernels), indirect=True, scope="session"
        )


def has_machine(item: pytest.Item) -> bool:
    """True if a test has a virtual machine, as far as the names of its fixtures tell.

    A project may have a ``vm`` of its own: ours bring ``pyvmm_kernel``.
    """
    names = getattr(item, "fixturenames", ())
    return "pyvmm_kernel" in names and not FIXTURES.isdisjoint(names)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """In a worker of pytest-xdist, go to the lab before the controller learns of the tests."""
    if hasattr(session.config, "workerinput"):
        _go_to_lab_if_need_be(session)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Go to the lab, before the first test runs, if the tests need it."""
    if not hasattr(session.config, "workerinput"):
        _go_to_lab_if_need_be(session)


def _go_to_lab_if_need_be(session: pytest.Session) -> None:
    items = [item for item in session.items if has_machine(item)]
    if session.config.option.collectonly or not items:
        return
    from pyvmm.pytest_plugin import lab

    options = session.config.stash[OPTIONS]
    for item in items:
        if reason := lab.problem_of(item, options):
            session_of(session.config).go_to_lab(reason)
            return


# Tests


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fail a test that needs a virtual machine where there can be none."""
    if not has_machine(item):
        return
    from pyvmm.pytest_plugin import lab

    options = item.config.stash[OPTIONS]
    if reason := lab.problem_of(item, options, is_surely_linux=True):
        lab.refuse(reason, session_of(item.config).why_no_lab)
    if SESSION in item.config.stash:
        item.config.stash[SESSION].begin_test(item)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Fail a test during which its guest earned a verdict that no call has raised."""
    result = yield
    if SESSION in item.config.stash:
        item.config.stash[SESSION].check(item)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add outcome, console, kernel's messages and registers to the report of a failed test."""
    if SESSION not in item.config.stash or call.excinfo is None:
        return (yield)
    from pyvmm.pytest_plugin.tracebacks import is_ours, shorten

    has_frames = True
    if is_ours(call.excinfo.value) and not item.config.option.fulltrace:
        has_frames = shorten(call.excinfo)
    report = yield
    if report.failed:
        if not has_frames:
            report.longrepr = call.excinfo.getrepr(style="no", chain=False)
        report.sections += item.config.stash[SESSION].sections(item, call.excinfo.value)
    return report


# Fixtures


@pytest.fixture(scope="session")
def pyvmm_kernel(request: pytest.FixtureRequest) -> str | None:
    """The path of the kernel that the test's virtual machines boot; None if there is none yet."""
    kernels = request.config.stash[OPTIONS].kernels
    found: str | None = getattr(request, "param", kernels[0] if kernels else None)
    return found


def _scope(request: pytest.FixtureRequest, kernel: str | None, name: str) -> Iterator[Scope]:
    with session_of(request.config).scope(name, request.node, kernel) as scope:
        yield scope


@pytest.fixture(scope="session")
def _pyvmm_session(
    request: pytest.FixtureRequest, pyvmm_kernel: str | None
) -> Iterator[Scope]:
    yield from _scope(request, pyvmm_kernel, "session")


@pytest.fixture(scope="module")
def _pyvmm_module(request: pytest.FixtureRequest, pyvmm_kernel: str | None) -> Iterator[Scope]:
    yield from _scope(request, pyvmm_kernel, "module")


@pytest.fixture
def _pyvmm_function(request: pytest.FixtureRequest, pyvmm_kernel: str | None) -> Iterator[Scope]:
    yield from _scope(request, pyvmm_kernel, "function")


@pytest.fixture
def pyvmm_boot(_pyvmm_function: Scope) -> Callable[..., Vm]:
    """Return a function that boots a virtual machine, for this test, and returns its ``Vm``.

    Its arguments are those of the marker, over which they win.
    """
    return _pyvmm_function.boot


@pytest.fixture(scope="module")
def pyvmm_boot_module(_pyvmm_module: Scope) -> Callable[..., Vm]:
    """Return a function as ``pyvmm_boot``, for machines that last until the module's end."""
    return _pyvmm_module.boot


@pytest.fixture(scope="session")
def pyvmm_boot_session(_pyvmm_session: Scope) -> Callable[..., Vm]:
    """Return a function as ``pyvmm_boot``, for machines that last until the session's end."""
    return _pyvmm_session.boot


@pytest.fixture
def vm(request: pytest.FixtureRequest, pyvmm_kernel: str | None) -> Vm:
    """Return a virtual machine that has booted: the test's own, or as the marker's scope says."""
    name = session_of(request.config).scope_of(request.node)
    scope: Scope = request.getfixturevalue(f"_pyvmm_{name}")
    return scope.boot() if name == "function" else scope.shared(request.node)


@pytest.fixture(scope="module")
def vm_module(request: pytest.FixtureRequest, _pyvmm_module: Scope) -> Vm:
    """Return a virtual machine that the tests of the module share."""
    return _pyvmm_module.shared(request.node)


@pytest.fixture(scope="session")
def vm_session(request: pytest.FixtureRequest, _pyvmm_session: Scope) -> Vm:
    """Return a virtual machine that all tests share."""
    return _pyvmm_session.shared(request.node)


@pytest.fixture(scope="session")
def _pyvmm_origins(request: pytest.FixtureRequest) -> Iterator[Origins]:
    with session_of(request.config).origins() as origins:
        yield origins


def _prepare_nothing(_vm: Vm) -> None:
    """The guest is saved as it has booted."""


@pytest.fixture(scope="session")
def pyvmm_prepare() -> Callable[[Vm], object]:
    """Return the function that prepares a booted machine before it is cloned: yours, if need be.
    """
    return _prepare_nothing


@pytest.fixture
def pyvmm_clone(
    _pyvmm_function: Scope, _pyvmm_origins: Origins, pyvmm_prepare: Callable[[Vm], object]
) -> Callable[..., Vm]:
    """Return a function that clones a machine, which the session boots once, for this test.

    Its arguments are those of the marker, over which they win.  Each clone is a machine of its
    own: what a test does to it no other test sees.
    """
    return partial(_pyvmm_function.clone, _pyvmm_origins, pyvmm_prepare)


@pytest.fixture
def vm_clone(pyvmm_clone: Callable[..., Vm]) -> Vm:
    """Return a fresh clone, for this test alone, of a machine that the session boots once."""
    return pyvmm_clone()


@pytest.fixture
def machine(request: pytest.FixtureRequest, pyvmm_kernel: str | None) -> Iterator[Machine]:
    """Return a ``pyvmm.Machine`` in this process, not started yet: for hooks and for learning."""
    with session_of(request.config).machine(request.node, pyvmm_kernel) as made:
        yield made
