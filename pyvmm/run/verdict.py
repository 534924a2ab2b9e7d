"""The one place that turns evidence into an outcome: how the run ended, and why.

Evidence comes from the console (``console/watch.py``), pvpanic, the ports that reset or power off,
and KVM's exits.  ``Verdict`` collects it, ends the run where that is due, and judges at the end.
docs/architecture.md, "Outcomes", has the table and the reasons.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from pyvmm.console.watch import Finding, Sign
from pyvmm.kvm import abi
from pyvmm.kvm.exits import Exit, HltExit, ShutdownExit, SystemEventExit
from pyvmm.run.outcome import MAYBE_SILENT, Kind, Outcome
from pyvmm.startup.types import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pyvmm.run.io_loop import Deadline

PANIC_GRACE_S = 2.0
"""Seconds after a panic's first line in which the guest may go on printing or reboot."""
SILENCE_S = 3.0
"""Seconds that a kernel may print nothing on a KVM that is known to be incomplete."""
INCOMPLETE_KVM = "/sys/module/kvm_pvm"
"""Exists if this host's KVM emulates ring 0 and lacks something that every stock kernel needs."""
_IN_THE_LAB = "the same command behind `pyvmm lab --`"
_EXPLAINED_BY_PANIC = (
    Kind.PANIC, Kind.RESET, Kind.SHUTDOWN, Kind.TRIPLE_FAULT, Kind.TIMEOUT
)
"""Ends that a panic brings about."""
_EXPLAINED_BY_GIVING_UP = (Kind.SHUTDOWN, Kind.RESET, Kind.TIMEOUT)
_TOO_EARLY = {Kind.SHUTDOWN: Kind.EARLY_HALT, Kind.RESET: Kind.EARLY_RESET}
"""The same ends, of a Linux that had not finished its boot."""


class Run(Protocol):
    """The part of the Runner that Verdict needs."""

    def finish(self, outcome: Outcome) -> None:
        """See ``Runner.finish``."""

    def finish_after(self, delay_s: float, outcome: Outcome) -> Deadline:
        """See ``Runner.finish_after``."""

    def call_after(self, delay_s: float, callback: Callable[[], None]) -> object:
        """See ``Runner.call_after``."""

    def watch_for_halt(self) -> None:
        """See ``Runner.watch_for_halt``."""


class Evidence:
    """Facts about the guest so far, for the verdict and for whoever explains it."""

    def __init__(self) -> None:
        self.has_printed = False
        self.waits_for_root = False
        """The kernel said that it waits for its root (``rootwait``)."""
        self.reached_init = False
        """The kernel said that it starts an init, our init said that it runs, or user space had
        the kernel end: no boot ends so by itself."""
        self.user_space_seen_s: float | None = None
        """The time at which our init said that it runs, on CLOCK_BOOTTIME."""
        self.panic: str | None = None
        """The reason of the first panic on the console."""
        self.is_panic_reported = False
        """The guest told pvpanic that it panicked."""
        self.mount_error = ""
        """Our initramfs's reason for not mounting the root."""
        self.gave_up: str | None = None
        """The last words of an early stage that halted for good."""

    @property
    def has_panicked(self) -> bool:
        """True if the console or pvpanic told of a panic."""
        return self.panic is not None or self.is_panic_reported

    @property
    def panic_reason(self) -> str:
        """Return the panic's first line, and the mount error that our initramfs printed before."""
        reason = "reported through pvpanic" if self.panic is None else self.panic
        return f"{reason} ({self.mount_error})" if self.mount_error else reason

    def wants_explanation(self, outcome: Outcome) -> bool:
        """True if ``outcome`` is one that ``cli/explain.py`` may have a remedy for."""
        if outcome.kind not in MAYBE_SILENT:
            return False
        if outcome.kind in (Kind.PANIC, Kind.GAVE_UP, Kind.EARLY_HALT, Kind.EARLY_RESET):
            return True
        return not self.has_printed or (outcome.kind is Kind.TIMEOUT and not self.reached_init)


class Verdict:
    """Collects the evidence of one run, and says how it ended.

    All methods but ``judge`` may be called from any thread.  ``is_linux`` is False for a guest that
    is known to be something else: it owes nobody an init.
    """

    def __init__(self, run: Run, *, is_linux: bool) -> None:
        self.evidence = Evidence()
        self._run = run
        self._is_linux = is_linux
        self._is_deaf = False
        self._ends: list[Deadline] = []
        """Ends of the run that the evidence has made due."""

    def save(self) -> dict[str, object]:
        """Return the evidence so far (docs/architecture.md, "State"), without its time."""
        return {k: v for k, v in vars(self.evidence).items() if k != "user_space_seen_s"}

    def forget_ends(self) -> None:
        """Take back the ends that are due, because the guest is another one now.

        From now on until ``restore`` nothing is heard: it is of the guest that was.
        """
        self._is_deaf = True
        while self._ends:
            self._ends.pop().cancel()

    def restore(self, data: object) -> None:
        """Take what ``save`` returned; StateError."""
        self._is_deaf = False
        from pyvmm.run.verdict_state import restore_evidence  # not on the boot path

        restore_evidence(self.evidence, data)

    def go_on(self) -> None:
        """End a restored guest that had panicked or given up when it was saved."""
        if self.evidence.has_panicked:
            self._finish_soon()
        if self.evidence.gave_up is not None:
            self._run.watch_for_halt()

    def end(self, kind: Kind, value: int = 0) -> None:
        """End the run: the guest has asked for it at one of its ports."""
        self._run.finish(Outcome(kind, value))

    def hear(self, finding: Finding) -> None:
        """Take ``finding`` from the console as evidence."""
        if self._is_deaf:
            return
        seen = self.evidence
        match finding.sign:
            case Sign.FIRST_OUTPUT:
                seen.has_printed = True
            case Sign.WAITS_FOR_ROOT:
                seen.waits_for_root = True
            case Sign.NO_ROOT:
                seen.mount_error = finding.text
            case Sign.INIT_STARTS:
                seen.reached_init = True
            case Sign.USER_SPACE:
                seen.reached_init = True
                if seen.user_space_seen_s is None:
                    seen.user_space_seen_s = time.clock_gettime(time.CLOCK_BOOTTIME)
            case Sign.GAVE_UP:
                seen.gave_up = finding.text
                self._run.watch_for_halt()
            case Sign.PANIC if seen.panic is None:
                seen.panic = finding.text
                self._finish_soon()
            case Sign.PANIC_ENDS:
                if seen.panic is None:  # its first line was torn
                    seen.panic = finding.text
                self._run.finish(Outcome(Kind.PANIC, detail=seen.panic_reason))
            case Sign.RESTARTS:
                seen.reached_init = True
            case Sign.HALTS:
                seen.reached_init = True
                self._run.watch_for_halt()

    def panic_reported(self) -> None:
        """Note that the guest told pvpanic of a panic: its output before says why."""
        self.evidence.is_panic_reported = True
        self._finish_soon()

    def _finish_soon(self) -> None:
        """End the run after PANIC_GRACE_S, in which the guest may reboot or print more."""
        self._ends.append(self._run.finish_after(
            PANIC_GRACE_S, Outcome(Kind.PANIC, detail=self.evidence.panic_reason)
        ))

    def doubt_silence(
        self, report: Callable[[str], None], incomplete_kvm: str = INCOMPLETE_KVM
    ) -> None:
        """Report a Linux that prints nothing for SILENCE_S, if this KVM is incomplete."""

        def look() -> None:
            if not self.evidence.has_printed and os.path.exists(incomplete_kvm):
                report(
                    f"the kernel has printed nothing for {SILENCE_S:g} s: this host's KVM is "
                    f"{os.path.basename(incomplete_kvm)}, which cannot run a stock Linux kernel; "
                    f"{_IN_THE_LAB} boots it on an emulated host"
                )

        if self._is_linux:
            self._run.call_after(SILENCE_S, look)

    def judge(
        self, outcome: Outcome, runs_program: Callable[[], bool] = lambda: False
    ) -> Outcome:
        """Return the true outcome of a run that ended by ``outcome``.

        Call it once all threads of the run are done and the console's last words are heard.
        ``runs_program`` returns True if a vCPU was in the context of a program when it ran for
        the last time.  It is called only if all other evidence leaves open how far a Linux came.
        """
        seen, kind = self.evidence, outcome.kind
        if kind in _EXPLAINED_BY_PANIC and seen.has_panicked:
            return Outcome(Kind.PANIC, detail=seen.panic_reason)
        if kind in _EXPLAINED_BY_GIVING_UP and not seen.reached_init:
            has_given_up = seen.gave_up is not None
            is_in_doubt = kind in _TOO_EARLY and self._is_linux
            if (has_given_up or is_in_doubt) and runs_program():
                return outcome
            if has_given_up:
                return Outcome(Kind.GAVE_UP, detail=seen.gave_up or "for no reason given")
            if is_in_doubt and (seen.has_printed or kind is Kind.RESET):
                return outcome.replace(kind=_TOO_EARLY[kind])
        if kind is Kind.SHUTDOWN and not seen.has_printed:
            # A system that halts says so; a kernel that died early says nothing.
            return outcome.replace(kind=Kind.SILENT_HALT)
        if kind is Kind.INTERNAL_ERROR:
            hint = (
                "\nif this happens with every kernel, this host's KVM is not complete: `pyvmm"
                f" doctor` says so, and {_IN_THE_LAB} runs where it is"
            )
            return outcome.replace(detail=outcome.detail + hint)
        return outcome


def outcome_of_exit(seen: Exit, registers: Callable[[], str]) -> Outcome:
    """Return the outcome of an exit from KVM that no device answers."""
    match seen:
        case ShutdownExit():
            return Outcome(Kind.TRIPLE_FAULT, detail=registers())
        case HltExit():
            # Only without an in-kernel irqchip: nothing could ever wake this vCPU.
            return Outcome(Kind.SHUTDOWN, detail="halted")
        case SystemEventExit():
            kinds = {
                abi.KVM_SYSTEM_EVENT_SHUTDOWN: Kind.SHUTDOWN,
                abi.KVM_SYSTEM_EVENT_RESET: Kind.RESET,
                abi.KVM_SYSTEM_EVENT_CRASH: Kind.PANIC,
            }
            return Outcome(kinds.get(seen.type, Kind.INTERNAL_ERROR), detail=str(seen))
        case _:
            return outcome_of_failure(str(seen), registers)


def outcome_of_failure(what: str, registers: Callable[[], str]) -> Outcome:
    """Return the outcome of a run that KVM cannot continue."""
    return Outcome(Kind.INTERNAL_ERROR, detail=f"{what}\n{registers()}")


def outcome_of_halt() -> Outcome:
    """Return the outcome of a run in which every vCPU halts and nothing will wake one."""
    return Outcome(Kind.SHUTDOWN, detail="halted with interrupts off")
