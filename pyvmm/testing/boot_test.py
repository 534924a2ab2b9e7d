"""One boot test, from the start of a machine to a result: ``pyvmm test`` and the matrix run it."""

from __future__ import annotations

import errno
import functools
import math
import os
import shlex
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence

from pyvmm.api.config import MachineConfig
from pyvmm.config import MAX_TIMEOUT_S
from pyvmm.errors import AgentError, ConfigError, PyvmmError
from pyvmm.launcher.completed import Completed
from pyvmm.launcher.errors import EndedError
from pyvmm.launcher.limits import boot_timeout_s
from pyvmm.launcher.vm import Vm
from pyvmm.launcher.vm import launch as launch_vm
from pyvmm.report import escape
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.startup.types import TYPE_CHECKING, Record
from pyvmm.testing import own_verdicts as own
from pyvmm.testing.boot_result import BootResult
from pyvmm.testing.expectations import Expectations
from pyvmm.testing.fail_on import FAIL_ON, FailOn, check_pattern
from pyvmm.testing.kernel_log import bad_message, warnings_of
from pyvmm.testing.own_verdicts import Failed, check_completed
from pyvmm.testing.report import (
    MAX_WARNINGS,
    STOP_TIMEOUT_S,
    last_lines,
    read_kernel_log,
    read_registers,
)
from pyvmm.testing.sink import Sink
from pyvmm.testing.timeline import Timeline
from pyvmm.testing.verdicts import (
    HOST_STATUS,
    TIMEOUT_STATUS,
    AgentLost,
    BootError,
    BootTimeout,
    RunFailed,
    error_of_outcome,
    why_no_agent,
)
from pyvmm.testing.watched import Watch

if TYPE_CHECKING:
    from os import PathLike

    Launch = Callable[..., Vm]

TIMEOUT_S = 600.0
EXPECT_GRACE_S = 5.0
"""Seconds that a console may lag behind the command that printed on it."""


class BootTest(Record):
    """One machine and what it must do.

    ``command`` runs in the guest, by the agent; without one the test is over once the console has
    shown all of ``expect``.  These are regular expressions; each must come in a line of the
    console, in any order.  The agent must be ready ``boot_timeout_s`` after the start (without a
    command: the console must have shown all), by default after 60 s, in the lab 300.  The command
    must end after ``timeout_s``.  ``puts`` are (source here, target there), copied before the
    command; ``gets`` (source there, target here), copied after it, even if it failed.
    ``console_log`` is a file for all that the guest prints.  A machine without an
    agent gets ``agent="inject"`` if the test needs one.

    ConfigError for what cannot be.
    """

    machine: MachineConfig
    command: Sequence[str] = ()
    name: str = ""
    env: Mapping[str, str] | None = None
    cwd: str = ""
    expect: Sequence[str] = ()
    fail_on: FailOn = FAIL_ON
    boot_timeout_s: float | None = None
    timeout_s: float = TIMEOUT_S
    puts: Sequence[tuple[str, str]] = ()
    gets: Sequence[tuple[str, str]] = ()
    console_log: str | PathLike[str] | None = None

    def __post_init__(self) -> None:
        for what in ("command", "expect"):
            if isinstance(getattr(self, what), (str, bytes)):
                raise TypeError(f"{what} is a list of texts, not a text")
        for pattern in self.expect:
            check_pattern("expect", pattern)
        for name in ("boot_timeout_s", "timeout_s"):
            value = getattr(self, name)
            if value is None and name == "boot_timeout_s":
                continue
            if not 0 < value <= MAX_TIMEOUT_S or math.isnan(value):
                raise ConfigError(
                    f"{name} {value:g}", f"must be seconds above 0, at most {MAX_TIMEOUT_S:.0f}"
                )
        if not self.command and not self.expect:
            raise ConfigError("a boot test", "has nothing to do: give a command or expect")
        if not self.command and (self.puts or self.gets):
            raise ConfigError("a boot test", "copies files only for a command: give one")

    @property
    def boot_limit_s(self) -> float:
        """Return ``boot_timeout_s``, or this host's default."""
        return boot_timeout_s() if self.boot_timeout_s is None else self.boot_timeout_s

    @property
    def shown_name(self) -> str:
        """Return ``name``, or the command, or the kernel."""
        return self.name or shlex.join(self.command) or os.fspath(self.machine.kernel)

    def config(self) -> MachineConfig:
        """Return the machine's configuration, with an agent if the test needs one."""
        if self.command and self.machine.agent in (False, "none"):
            return self.machine.replace(agent="inject")
        return self.machine


def run_boot_test(
    test: BootTest,
    *,
    on_console: Callable[[bytes], object] | None = None,
    on_stdout: Callable[[bytes], object] | None = None,
    on_stderr: Callable[[bytes], object] | None = None,
    on_phase: Callable[[str], object] | None = None,
    on_vm: Callable[[Vm], object] | None = None,
    report: Callable[[str], None] | None = None,
    launch: Launch = launch_vm,
) -> BootResult:
    """Run ``test`` and return its result; ConfigError or HostError if no machine can be started.

    ``on_console``, ``on_stdout`` and ``on_stderr`` get bytes as they come, the first one in another
    thread.  ``on_phase`` gets the name of each phase as it begins.  ``on_vm`` gets the machine; if
    another thread stops that, or KeyboardInterrupt is raised in this one, the result is
    "interrupted".  It touches no signals, may run in any thread, and leaves nothing behind.
    """
    return _Run(test, on_phase, on_stdout, on_stderr).run(launch, on_console, on_vm, report)


class _Run:
    """The state of one test."""

    def __init__(
        self,
        test: BootTest,
        on_phase: Callable[[str], object] | None,
        on_stdout: Callable[[bytes], object] | None,
        on_stderr: Callable[[bytes], object] | None,
    ) -> None:
        self._test = test
        self._timeline = Timeline(on_phase)
        self._stdout, self._stderr = Sink(on_stdout), Sink(on_stderr)
        self._expectations = Expectations(test.expect, clock=self._timeline.now_s)
        self._completed: Completed | None = None
        self._problems: list[str] = []
        self._registers: tuple[str, ...] = ()
        self._warnings: tuple[str, ...] = ()

    def run(
        self,
        launch: Launch,
        on_console: Callable[[bytes], object] | None,
        on_vm: Callable[[Vm], object] | None,
        report: Callable[[str], None] | None,
    ) -> BootResult:
        """See ``run_boot_test``."""
        with launch(
            self._test.config(), console_log=self._test.console_log,
            report=report or self._note,
        ) as vm:
            self._timeline.begin("kernel")
            watch = Watch(vm, self._test.fail_on)
            for observe in (self._timeline.feed, self._expectations.feed, on_console):
                if observe is not None:
                    vm.on_output(observe)
            if on_vm is not None:
                on_vm(vm)
            error: BaseException | None = None
            try:
                self._steps(vm, watch)
            except (Failed, PyvmmError, KeyboardInterrupt) as caught:
                error = caught
            except RuntimeError as caught:
                # A call that came when another thread had closed the machine, or it had ended.
                if vm.failure is None and vm.outcome is None:
                    raise
                error = vm.failure or error_of_outcome(vm.outcome or Outcome(Kind.STOPPED))
                error.__cause__ = caught
            self._timeline.end()
            try:
                verdict = self._verdict(error, vm)
                self._finish(vm, watch, verdict)
            except KeyboardInterrupt as caught:  # a second one: no more is gathered
                verdict = self._verdict(caught, vm)
            finally:
                watch.close()
            return self._result(vm, watch, verdict)

    # The steps of a test

    def _steps(self, vm: Vm, watch: Watch) -> None:
        test = self._test
        if not test.command:
            self._wait_for_console(vm, watch)
            return
        self._wait_for_agent(vm, watch)
        self._timeline.begin("agent")
        for source, target in test.puts:
            self._copy(f"put {source}", functools.partial(vm.put, source, target))
        self._timeline.begin("command")
        self._completed = self._command(vm)
        for source, target in test.gets:
            try:
                self._copy(f"get {source}", functools.partial(vm.get, source, target))
            except Failed as error:
                # The command's own failure counts for more than a file that it did not make.
                if self._completed.is_success:
                    raise
                self._problems.append(str(error))
        check_completed(self._completed, escape(test.shown_name), test.timeout_s)
        self._settle(vm)
        if not self._expectations.are_met.wait(EXPECT_GRACE_S):
            raise self._not_shown(f"{EXPECT_GRACE_S:g} s after the command")
        self._read_log(vm)
        watch.check()

    def _wait_for_console(self, vm: Vm, watch: Watch) -> None:
        until_s = self._test.boot_limit_s
        while not self._expectations.are_met.wait(0.05):
            if vm.failure is not None:
                raise vm.failure
            if vm.outcome is not None:
                raise error_of_outcome(vm.outcome, watch.judge.last_lines)
            if self._timeline.now_s() > until_s:
                raise self._not_shown(f"{until_s:g} s after the start (--boot-timeout)")
        watch.check()

    def _wait_for_agent(self, vm: Vm, watch: Watch) -> None:
        left_s = max(0.1, self._test.boot_limit_s - self._timeline.now_s())
        begin_s = self._timeline.now_s()
        try:
            vm.wait_for_agent(left_s)
        except AgentError as error:
            if self._timeline.now_s() - begin_s < left_s:
                raise AgentLost(str(error), before=watch.judge.last_lines) from None
            raise BootTimeout(
                f"no agent after {self._test.boot_limit_s:g} s: {why_no_agent(error)}",
                before=watch.judge.last_lines,
            ) from None
        watch.boot_is_over()

    def _note(self, line: str) -> None:
        if not line.endswith("..."):  # it tells of work under way: nothing is odd
            self._problems.append(line)

    def _copy(self, what: str, copy: Callable[[], object]) -> None:
        try:
            copy()
        except (BootError, EndedError):
            raise
        except (PyvmmError, OSError, ValueError, TypeError) as error:
            raise Failed(own.COPY, HOST_STATUS, f"{what}: {error}") from None

    def _command(self, vm: Vm) -> Completed:
        test = self._test
        try:
            with vm.begin(
                list(test.command), env=test.env, cwd=test.cwd, timeout_s=test.timeout_s,
                has_input=False,
            ) as command:
                return command.wait(
                    stdout=self._stdout, stderr=self._stderr,  # type: ignore[arg-type]
                )
        except AgentError as error:
            code = getattr(error, "errno", 0)
            if code == errno.ENOENT:
                raise Failed(own.NOT_RUN, own.NOT_FOUND_STATUS, str(error)) from None
            if code:
                raise Failed(own.NOT_RUN, own.NOT_EXECUTABLE_STATUS, str(error)) from None
            raise AgentLost(str(error)) from None

    def _not_shown(self, when: str) -> Failed:
        missing = ", ".join(repr(pattern) for pattern in self._expectations.missing)
        return Failed(
            own.EXPECT, TIMEOUT_STATUS, f"the console did not show {missing} {when}"
        )

    def _settle(self, vm: Vm) -> None:
        """Have the console's lines here that the machine had before the command's end."""
        settle = getattr(vm, "settle", None)
        if settle is not None:
            settle()

    def _read_log(self, vm: Vm) -> None:
        """Judge the kernel's log too: ``quiet`` keeps warnings from the console."""
        messages = read_kernel_log(vm)
        self._warnings = warnings_of(messages)[-MAX_WARNINGS:]
        if found := bad_message(messages, self._test.fail_on):
            raise found.error()

    # The end

    def _verdict(self, error: BaseException | None, vm: Vm) -> Failed | BootError | None:
        """Return the verdict for what ended the steps; None if the test passed."""
        if isinstance(error, EndedError):
            error = error_of_outcome(error.outcome)
        if isinstance(error, KeyboardInterrupt):
            number = int(getattr(error, "number", signal.SIGINT))
            return Failed(own.INTERRUPTED, 128 + number, f"interrupted by signal {number}")
        if isinstance(error, RunFailed) and error.outcome is not None and (
            error.outcome.kind in (Kind.STOPPED, Kind.QUIT, Kind.SIGNAL)
        ):
            number = error.outcome.value or int(signal.SIGINT)
            return Failed(
                own.INTERRUPTED, 128 + number, f"somebody ended the machine: {error.outcome}"
            )
        if isinstance(error, BootError | Failed) or error is None:
            return error
        return AgentLost(str(error)) if isinstance(error, AgentError) else RunFailed(str(error))

    def _finish(self, vm: Vm, watch: Watch, verdict: Failed | BootError | None) -> None:
        """Gather what is told of a failure, and stop the machine."""
        watch.expect_end()
        if verdict is not None and vm.failure is None and vm.outcome is None:
            if self._completed is not None and not self._warnings:
                self._warnings = warnings_of(read_kernel_log(vm))[-MAX_WARNINGS:]
            is_alive = self._completed is not None and not self._completed.timed_out
            if not is_alive:  # a command's own failure is not told by registers
                self._registers = read_registers(vm, self._test.machine.cpus)
        elif verdict is not None and vm.wait(STOP_TIMEOUT_S) is not None:
            self._registers = read_registers(vm, self._test.machine.cpus)
        vm.stop()

    def _problems_left(self, vm: Vm) -> Iterator[str]:
        """Yield the lines about what is odd that do not only repeat the outcome."""
        outcome = set(map(escape, str(vm.outcome).split("\n")))
        for line in self._problems:
            if (shown := escape(line)) not in outcome:
                yield shown

    def _result(
        self, vm: Vm, watch: Watch, verdict: Failed | BootError | None
    ) -> BootResult:
        test, completed = self._test, self._completed
        bad = verdict if isinstance(verdict, BootError) else None
        if verdict is None:
            name, status, message = own.PASSED, 0, f"{escape(test.shown_name)}: passed"
        elif bad is not None:
            name, status, message = bad.name, bad.exit_status, str(bad)
        else:
            assert isinstance(verdict, Failed)
            name, status, message = verdict.verdict, verdict.exit_status, str(verdict)
        log = test.console_log
        outcome = (bad.outcome if bad is not None else None) or vm.outcome
        # An end that the test itself brought about is no news.
        is_ours = (
            outcome is not None and outcome.kind is Kind.STOPPED and name != own.INTERRUPTED
        )
        return BootResult(
            name=escape(test.shown_name), verdict=name, exit_status=status,
            message=escape(message), command=tuple(map(escape, test.command)),
            status=None if completed is None else completed.status,
            signal=None if completed is None else completed.signal,
            outcome=None if is_ours else outcome,
            line="" if bad is None else bad.line, before=() if bad is None else bad.before,
            trace=() if bad is None else bad.trace, expected=self._expectations.found,
            began_at_s=self._timeline.began_at_s, seconds=round(self._timeline.now_s(), 3),
            phases=self._timeline.phases,
            stdout_bytes=self._stdout.bytes, stderr_bytes=self._stderr.bytes,
            stdout_tail=self._stdout.tail, stderr_tail=self._stderr.tail,
            console_tail=last_lines(vm.console.text),
            console_log="" if log is None else os.fspath(log),
            lost_console_bytes=vm.console.lost_bytes, warnings=self._warnings,
            registers=self._registers, problems=tuple(self._problems_left(vm)),
        )
