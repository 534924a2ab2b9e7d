"""The guests of a session: booted, watched, logged, and closed with the scope that made them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from pyvmm.errors import HostError, PyvmmError
from pyvmm.launcher.vm import Vm, VmSnapshot, launch
from pyvmm.pytest_plugin.logs import write_mark
from pyvmm.pytest_plugin.plan import Plan
from pyvmm.report import escape
from pyvmm.run.outcome import Kind
from pyvmm.testing.kernel_log import bad_message
from pyvmm.testing.report import failure_report, read_kernel_log
from pyvmm.testing.verdicts import BootError, BootTimeout, GuestEnded, why_no_agent
from pyvmm.testing.watched import Watch, watch

Section = tuple[str, str]


class Guest:
    """A virtual machine in a process of its own, with the judge of its console.

    ``label`` names it in reports.  ``tests`` are the tests that have used it.  ``log`` is the file
    of its console; with ``is_shared`` it gets a mark where each of them begins.
    """

    def __init__(
        self, vm: Vm, plan: Plan, *, label: str, log: Path | None, is_shared: bool = False
    ) -> None:
        self.vm = vm
        self.plan = plan
        self.label = label
        self.tests: list[str] = []
        self._log = log
        self._shared_log = log if is_shared else None
        self._printed_bytes = 0
        self._watch: Watch = watch(vm, plan.fail_on)
        vm.on_output(self._count)
        self._final: list[Section] | None = None
        self._logged_to_s = -1.0

    def boot(self) -> None:
        """Wait until the guest takes orders; BootTimeout, or the verdict on a boot that failed."""
        if self.plan.has_agent:
            limit_s = self.plan.boot_timeout_s
            until_s = time.monotonic() + limit_s
            try:
                self.vm.wait_for_agent(limit_s)
            except BootError:
                raise
            except PyvmmError as error:
                if self.vm.outcome is not None or time.monotonic() < until_s:
                    raise
                raise BootTimeout(
                    f"the guest's agent has not taken orders in {limit_s:g} s: "
                    f"{why_no_agent(error)}",
                    before=self._watch.judge.last_lines,
                ) from error
            self._watch.boot_is_over()
        if self.plan.may_end:
            self._watch.expect_end()

    def begin_test(self, nodeid: str) -> None:
        """Note that the test ``nodeid`` uses the guest."""
        if nodeid not in self.tests:
            self.tests.append(nodeid)
            write_mark(self._shared_log, f"{nodeid} begins")

    @property
    def is_fit(self) -> bool:
        """True if another test may use the guest: it runs, and no verdict was given."""
        return (
            self._watch.error is None and self.vm.failure is None and self.vm.outcome is None
            and not self.vm.is_paused
        )

    def untold(self) -> BootError | None:
        """Return the verdict on the guest that no call has raised yet; None if there is none."""
        is_told = self._watch.error is not None and self._watch.error.__traceback__ is not None
        # First, because the guest's answer comes behind much of what it has printed.
        found = self._bad_message() if self._watch.error is None else None
        with contextlib.suppress(PyvmmError, RuntimeError):
            self.vm.settle()  # it may raise the verdict
        self._watch.judge.end()
        error = found or self._watch.error
        return None if error is None or is_told or self._is_expected(error) else error

    def _bad_message(self) -> BootError | None:
        """Return the verdict on what the kernel has logged since the last look.

        With ``quiet``, and on many systems, warnings do not reach the console.
        """
        if not self.plan.has_agent or self.vm.is_paused:
            return None
        new = [one for one in read_kernel_log(self.vm) if one.at_s > self._logged_to_s]
        self._logged_to_s = max((one.at_s for one in new), default=self._logged_to_s)
        found = bad_message(new, self.plan.fail_on)
        if found is not None:
            self.vm.fail(found.error())
            failure = self.vm.failure
            return failure if isinstance(failure, BootError) else None
        return None

    def _is_expected(self, error: BootError) -> bool:
        """True for the end that our own stop makes, and for a clean one that the test knows of."""
        if not error.line and error.outcome is not None and error.outcome.kind is Kind.STOPPED:
            return True
        return isinstance(error, GuestEnded) and self.vm.is_end_told

    def sections(self, error: BaseException | None) -> list[Section]:
        """Return the parts of a failure's report; of a closed guest those from before its end."""
        if self._final is not None:
            return self._final
        try:
            report = failure_report(self.vm, error)
        except (PyvmmError, RuntimeError) as problem:
            return [(f"pyvmm {self.label}", f"no report: {escape(str(problem))}")]
        return [(f"pyvmm {self.label}: {title}", text) for title, text in report.sections()]

    def close(self) -> None:
        """Stop the guest and free all that it has; a verdict that nobody knows of is raised.

        Without one, HostError if the file of the console has not all of it.  The machine ends
        whatever is raised meanwhile, as pytest-timeout does.
        """
        try:
            self._close_for(self.untold())
        finally:
            self.vm.close()
            self._watch.close()

    def _close_for(self, error: BootError | None) -> None:
        try:
            if error is not None:
                self._final = self.sections(error)
        finally:
            self._final = self._final or []
            self.vm.close()
        if error is None:
            error = self.untold()
        if error is not None:
            raise error
        self._check_log()

    def _count(self, data: bytes) -> None:
        self._printed_bytes += len(data)

    def _check_log(self) -> None:
        """Raise HostError if the console's file is too short, which a full disk makes it."""
        if self._log is None:
            return
        printed = self._printed_bytes + self.vm.console.lost_bytes
        try:
            size = self._log.stat().st_size
        except OSError as error:
            raise HostError(f"--pyvmm-logs {self._log}: {error.strerror}") from error
        if size < printed:
            raise HostError(
                f"--pyvmm-logs {self._log}: has {size} of {printed} bytes: the disk is full, or "
                "somebody else changed it"
            )


class Guests:
    """The guests of one scope: of a test, a module or the session.  ``close`` ends them all.

    ``log_file`` makes the file for the console of the next guest; None without logs.  ``label``
    names the scope in reports.  With ``is_shared`` several tests use them.
    """

    def __init__(
        self, *, label: str, log_file: Callable[[], Path | None], is_shared: bool
    ) -> None:
        self._label = label
        self._log_file = log_file
        self._is_shared = is_shared
        self.all: list[Guest] = []
        self._shared: dict[str, Guest] = {}

    def boot(self, plan: Plan, nodeid: str) -> Guest:
        """Return a new guest, for the test ``nodeid``, that has booted."""
        guest = self._add(lambda log: launch(plan.config, console_log=log), plan, nodeid)
        guest.boot()
        return guest

    def clone(self, plan: Plan, snapshot: VmSnapshot, nodeid: str) -> Guest:
        """Return a new guest, for the test ``nodeid``: a clone that takes orders."""
        guest = self._add(
            lambda log: snapshot.clone(console_log=log, timeout_s=plan.config.timeout_s),
            plan, nodeid,
        )
        guest.boot()
        return guest

    def forget(self, guest: Guest) -> None:
        """Have ``guest``, which was closed, closed no more."""
        self.all.remove(guest)

    def _add(self, start: Callable[[Path | None], Vm], plan: Plan, nodeid: str) -> Guest:
        """Return the guest of the machine that ``start`` starts, whose console goes to a log."""
        log = self._log_file()
        number = f" {len(self.all) + 1}" if self.all else ""
        vm = start(log)
        try:
            guest = Guest(
                vm, plan, label=f"{self._label}{number}", log=log, is_shared=self._is_shared
            )
        except BaseException:
            vm.close()
            raise
        self.all.append(guest)
        guest.begin_test(nodeid)
        return guest

    def shared(self, plan: Plan, nodeid: str) -> Guest:
        """Return the guest that tests with an equal plan share; a new one if it is not fit."""
        guest = self._shared.get(plan.key)
        if guest is not None and not guest.is_fit:
            del self._shared[plan.key]
            with contextlib.suppress(BootError):  # told in the test before
                guest.close()
            guest = None
        if guest is None:
            guest = self._shared[plan.key] = self.boot(plan, nodeid)
        guest.begin_test(nodeid)
        return guest

    def close(self) -> None:
        """Close all guests, the last one first; the first failure is raised when all are closed.

        One that is no verdict, as an interrupt or pytest-timeout's, goes before the others.
        """
        failures: list[BaseException] = []
        for guest in reversed(self.all):
            try:
                guest.close()
            except BaseException as error:  # none may leave the other guests' machines behind
                failures.append(error)
        if failures:
            raise min(failures, key=lambda error: isinstance(error, Exception))
