"""The virtual machines of a pytest session, by scope and by test."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence

import pytest

from pyvmm.errors import PyvmmError
from pyvmm.pytest_plugin import lab
from pyvmm.pytest_plugin.clones import Origins
from pyvmm.pytest_plugin.guests import Guest, Guests
from pyvmm.pytest_plugin.kernels import ids_of
from pyvmm.pytest_plugin.logs import Logs
from pyvmm.pytest_plugin.machines import OwnMachine
from pyvmm.pytest_plugin.marker import OF_ONE_BOOT, ArgumentsError, arguments_of, checked
from pyvmm.pytest_plugin.options import Options
from pyvmm.pytest_plugin.plan import Plan, make_plan
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from pyvmm.api.machine import Machine
    from pyvmm.launcher.vm import Vm

Node = pytest.Item | pytest.Collector
Section = tuple[str, str]
BY_FIXTURE = {
    "vm_module": "module", "pyvmm_boot_module": "module",
    "vm_session": "session", "pyvmm_boot_session": "session",
}
"""The scope of the guests that a test uses because it names a fixture."""


class Session:
    """All that the plugin keeps between two hooks; ``config.stash`` has it."""

    def __init__(self, config: pytest.Config, options: Options) -> None:
        self._config = config
        self._options = options
        worker = os.environ.get("PYTEST_XDIST_WORKER", "")
        self._logs = Logs(options.logs, worker)
        self._scopes: list[Scope] = []
        self._machines: list[OwnMachine] = []
        self._of_item: dict[str, list[Guest]] = {}
        self.why_no_lab = lab.obstacle(options)
        """The reason why tests that need the lab fail instead."""
        self.current = ""
        """The test that runs."""

    # The lab

    def go_to_lab(self, reason: str) -> None:
        """Have this command run again in the lab; return if the tests are to fail instead."""
        if self.why_no_lab:
            return
        note = getattr(self._config, "workerinput", {}).get("pyvmm_note")
        if hasattr(self._config, "workerinput"):
            if note is None or not lab.write_note(note, reason):
                self.why_no_lab = "this worker of pytest-xdist is on another host"
            return
        lab.go(self._config, self._options, reason, self.write_line)

    def write_line(self, line: str) -> None:
        """Write a line to pytest's terminal."""
        reporter = self._config.pluginmanager.getplugin("terminalreporter")
        if reporter is not None:
            reporter.ensure_newline()
            reporter.write_line(line)

    def check_host(self, plan: Plan) -> None:
        """Fail the test that runs if this host cannot run the machine of ``plan``."""
        if reason := lab.problem(os.fsdecode(plan.config.kernel)):
            lab.refuse(reason, self.why_no_lab)

    # Plans

    def scope_of(self, node: Node) -> str:
        """Return the scope of the fixture ``vm`` for a test."""
        return str(arguments_of(node).get("scope", "function"))

    def plan(self, node: Node, kernel: str | None, changes: dict[str, object]) -> Plan:
        """Return the plan of a boot; ``changes`` are checked arguments that win."""
        return self._plan(node, kernel, changes, in_process=False)

    def _plan(
        self, node: Node, kernel: str | None, changes: dict[str, object], *, in_process: bool
    ) -> Plan:
        try:
            return make_plan(
                {**arguments_of(node), **changes}, kernel=kernel, disks=self._options.disks,
                root=self._config.rootpath, is_lab=bool(os.environ.get("PYVMM_LAB")),
                in_process=in_process,
            )
        except ArgumentsError as error:
            problem = str(error)
        except PyvmmError as error:
            problem = f"pyvmm: {error}"
        # Not within the clauses: pytest would print the text of their exception too.
        pytest.fail(problem, pytrace=False)

    # Guests

    @contextlib.contextmanager
    def scope(self, name: str, node: Node, kernel: str | None) -> Iterator[Scope]:
        """Make the guests of a scope; they are closed when the context is left."""
        if name == "function":
            log_file = functools.partial(self._logs.of_test, node.nodeid)
        else:
            shown = ids_of(self._options.kernels)[self._options.kernels.index(kernel)] if (
                kernel in self._options.kernels and len(self._options.kernels) > 1
            ) else ""
            place = node.nodeid if name == "module" else ""
            log_file = functools.partial(self._logs.of_shared, place, shown)
        label = "vm" if name == "function" else f"vm of the {name}"
        guests = Guests(label=label, log_file=log_file, is_shared=name != "function")
        scope = Scope(self, name, node, kernel, guests)
        self._scopes.append(scope)
        try:
            yield scope
        finally:
            try:
                guests.close()
            finally:
                self._scopes.remove(scope)

    @contextlib.contextmanager
    def machine(self, node: pytest.Item, kernel: str | None) -> Iterator[Machine]:
        """Make the in-process machine of a test; it is closed when the context is left."""
        plan = self._plan(node, kernel, {}, in_process=True)
        self.check_host(plan)
        own = OwnMachine(plan, self._logs.of_test(node.nodeid))
        self._machines.append(own)
        try:
            yield own.machine
        finally:
            try:
                own.close()
            finally:
                self._machines.remove(own)

    @contextlib.contextmanager
    def origins(self) -> Iterator[Origins]:
        """Make what the session's clones come from; it is removed when the context is left."""
        guests = Guests(
            label="vm that is cloned", log_file=self._logs.of_origin, is_shared=True
        )
        with contextlib.closing(Origins(guests)) as origins:
            yield origins

    # Tests

    def begin_test(self, item: pytest.Item) -> None:
        """Mark the beginning of ``item`` in the logs of the guests that it shares."""
        self.current = item.nodeid
        self._of_item = {item.nodeid: []}
        for guest in self._shared_by(item):
            self.use(guest, item.nodeid)

    def use(self, guest: Guest, nodeid: str) -> None:
        """Note that a test uses ``guest``: it is judged with it, and in its report."""
        guests = self._of_item.setdefault(nodeid, [])
        if guest not in guests:
            guests.append(guest)
            guest.begin_test(nodeid)

    def check(self, item: pytest.Item) -> None:
        """Raise the verdict on a guest of ``item`` that no call has raised."""
        for guest in self._guests_of(item):
            error = guest.untold()
            if error is not None:
                raise error

    def sections(self, item: pytest.Item, error: BaseException | None) -> list[Section]:
        """Return the parts of the report on a failed test."""
        found: list[Section] = []
        for guest in self._guests_of(item):
            found += guest.sections(error)
        for machine in self._machines:
            found += machine.sections()
        return _harmless(found)

    def _guests_of(self, item: pytest.Item) -> Sequence[Guest]:
        own = list(self._of_item.get(item.nodeid, ()))
        return own + [guest for guest in self._shared_by(item) if guest not in own]

    def _shared_by(self, item: pytest.Item) -> Iterator[Guest]:
        names = getattr(item, "fixturenames", ())
        wanted = {BY_FIXTURE[name] for name in names if name in BY_FIXTURE}
        for scope in self._scopes:
            if scope.name in wanted:
                yield from scope.guests.all


def _harmless(sections: Sequence[Section]) -> list[Section]:
    """Return ``sections``, which quote guests, without commands to GitHub's runner."""
    from pyvmm.testing.annotations import defused, is_wanted

    if not is_wanted(os.environ):
        return list(sections)
    return [
        (title, "\n".join(map(defused, text.split("\n")))) for title, text in sections
    ]


class Scope:
    """The guests of a scope as the fixtures hand them out."""

    def __init__(
        self, session: Session, name: str, node: Node, kernel: str | None, guests: Guests
    ) -> None:
        self._session = session
        self._node = node
        self._kernel = kernel
        self.name = name
        self.guests = guests

    def boot(self, **changes: object) -> Vm:
        """Boot a machine and return its ``Vm``; the arguments are those of the marker."""
        __tracebackhide__ = True
        plan = self._planned("pyvmm_boot", changes)
        nodeid = self._current(self._node)
        with self._noting(nodeid):
            return self.guests.boot(plan, nodeid).vm

    def shared(self, node: Node) -> Vm:
        """Return the ``Vm`` that tests with equal markers share in this scope."""
        __tracebackhide__ = True
        plan = self._session.plan(node, self._kernel, {})
        self._session.check_host(plan)
        nodeid = self._current(node)
        with self._noting(nodeid):
            guest = self.guests.shared(plan, nodeid)
        self._session.use(guest, nodeid)
        return guest.vm

    def clone(
        self, origins: Origins, prepare: Callable[[Vm], object], **changes: object
    ) -> Vm:
        """Return the ``Vm`` of a new clone; the arguments are those of the marker."""
        __tracebackhide__ = True
        plan = self._planned("pyvmm_clone", changes)
        nodeid = self._current(self._node)
        snapshot = origins.snapshot(plan, nodeid, prepare)
        with self._noting(nodeid):
            return self.guests.clone(plan, snapshot, nodeid).vm

    def _planned(self, call: str, changes: dict[str, object]) -> Plan:
        """Return the plan for the arguments of ``call``; the test fails if it cannot be."""
        __tracebackhide__ = True
        try:
            own = checked(call, changes, OF_ONE_BOOT)
        except ArgumentsError as error:
            raise TypeError(str(error)) from None
        plan = self._session.plan(self._node, self._kernel, own)
        self._session.check_host(plan)
        return plan

    @contextlib.contextmanager
    def _noting(self, nodeid: str) -> Iterator[None]:
        """Note each guest that is new when the context is left, also if it failed to boot."""
        before = len(self.guests.all)
        try:
            yield
        finally:
            for guest in self.guests.all[before:]:
                self._session.use(guest, nodeid)

    def _current(self, node: Node) -> str:
        """Return the test that runs: the scope's node may be a module."""
        if isinstance(node, pytest.Item):
            return node.nodeid
        return self._session.current or node.nodeid
