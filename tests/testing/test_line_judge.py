"""Lines of the console that fail a test: Linux's own texts, and whose they are."""

from __future__ import annotations

import pickle

import pytest

from pyvmm.errors import ConfigError
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.testing.fail_on import CLASSES, FAIL_ON, FailOn
from pyvmm.testing.line_judge import LINES_BEFORE, MAX_TRACE_LINES, Finding, LineJudge
from pyvmm.testing.verdicts import VERDICTS, BootError, KernelOops, error_of_outcome


class Court:
    """A judge and what it found."""

    def __init__(self, fail_on: FailOn = FAIL_ON) -> None:
        self.findings: list[Finding] = []
        self.suspects = 0
        self.judge = LineJudge(
            self.findings.append, fail_on=fail_on, on_suspect=self._suspected
        )

    def _suspected(self) -> None:
        self.suspects += 1

    def hear(self, *lines: str) -> Finding | None:
        """Judge ``lines`` to the end of the run."""
        for line in lines:
            self.judge.feed(line.encode() + b"\r\n")
        self.judge.end()
        return self.findings[0] if self.findings else None


STAMP = "[    1.234567] "
BAD = [
    ("panic", "Kernel panic - not syncing: sysrq triggered crash"),
    ("panic", "traps: PANIC: double fault, error_code: 0x0"),
    ("panic", "---[ end Kernel panic - not syncing: x ]---"),
    ("root", 'VFS: Cannot open root device "vda" or unknown-block(0,0): error -6'),
    ("root", 'VFS: Cannot open root device "/dev/vda" or unknown-block(254,0): error -19'),
    ("root", "Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)"),
    ("oops", "BUG: kernel NULL pointer dereference, address: 0000000000000000"),
    ("oops", "BUG: unable to handle page fault for address: ffffffffc0000000"),
    ("oops", "BUG: KASAN: slab-out-of-bounds in kmalloc_oob_right+0x42/0x60 [test_kasan]"),
    ("oops", "BUG: KFENCE: use-after-free read in x"),
    ("oops", "BUG: sleeping function called from invalid context at kernel/locking/mutex.c:580"),
    ("oops", "BUG: scheduling while atomic: swapper/0/0/0x00000002"),
    ("oops", "kernel BUG at fs/ext4/inode.c:2746!"),
    ("oops", "Oops: 0002 [#1] PREEMPT SMP NOPTI"),
    ("oops", "Oops: Oops: 0002 [#1] PREEMPT SMP NOPTI"),
    ("oops", "invalid opcode: 0000 [#1] SMP"),
    ("oops", "general protection fault, probably for non-canonical address 0xdead: 0000 [#1] SMP"),
    ("oops", "UBSAN: array-index-out-of-bounds in drivers/x.c:12:7"),
    ("oops", "KASAN: null-ptr-deref in range [0x0000000000000000-0x0000000000000007]"),
    ("warning", "WARNING: CPU: 0 PID: 1 at kernel/x.c:12 f+0x10/0x20"),
    ("warning", "WARNING: possible circular locking dependency detected"),
    ("warning", "WARNING: suspicious RCU usage"),
    ("warning", "INFO: trying to register non-static key."),
    ("lockup", "watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [cat:12]"),
    ("lockup", "NMI watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [x:1]"),
    ("lockup", "watchdog: Watchdog detected hard LOCKUP on cpu 1"),
    ("lockup", "watchdog: CPU2: Watchdog detected hard LOCKUP on cpu 2"),
    ("lockup", "NMI watchdog: Watchdog detected hard LOCKUP on cpu 0"),
    ("lockup", "rcu: INFO: rcu_preempt self-detected stall on CPU"),
    ("lockup", "rcu: INFO: rcu_sched detected stalls on CPUs/tasks:"),
    ("lockup", "rcu: INFO: rcu_preempt detected expedited stalls on CPUs/tasks: { 0-...! } 21 j"),
    ("lockup", "INFO: rcu_sched self-detected stall on CPU"),
    ("lockup", "INFO: task jbd2/vda-8:77 blocked for more than 120 seconds."),
    ("lockup", "BUG: workqueue lockup - pool cpus=0 node=0 flags=0x0 nice=0 stuck for 30s!"),
]
HARMLESS = (
    "Linux version 6.1.0 (gcc) #1 SMP", "clocksource: tsc: mask: 0xffffffffffffffff",
    "systemd[1]: WARNING: is only quoted", "EXT4-fs (vda): mounted filesystem",
    "rcu: Hierarchical RCU implementation.", "watchdog: Delayed init of the lockup detector: 0",
    "x86/fpu: Supporting XSAVE feature 0x001: 'x87'", "a [#1] b", "MDS CPU bug present",
)


@pytest.mark.parametrize(("kind", "message"), BAD)
def test_a_complaint_of_linux_has_its_class(kind: str, message: str) -> None:
    for stamp in (STAMP, "", "login: " + STAMP, "[    1.234567][    T1] "):
        found = Court().hear(stamp + message)
        assert found is not None, stamp
        assert (found.kind, found.line) == (kind, stamp + message)
        assert found.error().name == kind


@pytest.mark.parametrize("message", HARMLESS)
def test_other_lines_are_harmless(message: str) -> None:
    assert Court().hear(STAMP + message) is None
    assert Court().hear(message) is None


@pytest.mark.parametrize(("kind", "message"), BAD)
def test_a_program_that_quotes_the_kernel_fails_nothing(kind: str, message: str) -> None:
    """Once the kernel has printed a stamp."""
    assert Court().hear(f"{STAMP}Linux version 6.1.0", message, f"echo {message}") is None


def test_the_forty_lines_before_and_the_call_trace_are_kept() -> None:
    said = [f"{STAMP}line {number}" for number in range(100)]
    trace = [f"{STAMP}Call Trace:", f"{STAMP} <TASK>", f"{STAMP}---[ end trace 0000000000 ]---"]
    bug = f"{STAMP}BUG: kernel NULL pointer dereference, address: 0"
    court = Court()
    for line in (*said, bug, *trace):
        assert not court.findings
        court.judge.line(line)
    assert court.suspects == 1
    assert court.findings == [Finding(
        kind="oops", line=bug, before=tuple(said[-LINES_BEFORE:]), trace=tuple(trace),
    )]
    court.hear(f"{STAMP}Kernel panic - not syncing: Fatal exception")
    assert len(court.findings) == 1, "the first bad line decides"


def test_a_call_trace_is_bounded() -> None:
    court = Court()
    court.judge.line(STAMP + "BUG: x")
    for _ in range(MAX_TRACE_LINES):
        court.judge.line("y" * 5000)
    assert [len(finding.trace) for finding in court.findings] == [MAX_TRACE_LINES]


def test_a_panic_that_ends_at_once_is_a_finding() -> None:
    court = Court()
    court.judge.line(STAMP + "---[ end Kernel panic - not syncing: torn ]---")
    assert [finding.kind for finding in court.findings] == ["panic"]


def test_colours_and_control_characters_do_not_reach_whoever_shows_the_lines() -> None:
    found = Court().hear("\x1b[0;32m  OK  \x1b[0m\x1b]0;evil\x07", STAMP + "BUG: \x1b[2J\t\xad")
    assert found is not None
    assert found.before == ("  OK  \\x1b]0;evil\\x07",)
    assert found.line == STAMP + "BUG:     \\xad"


def test_bytes_that_are_no_text_are_spelled_out() -> None:
    court = Court()
    court.judge.feed(b"\xff\xfe\n[    1.000000] BUG: \xff\n")
    court.judge.end()
    assert court.findings[0].before == ("\\xff\\xfe",)
    assert court.findings[0].line.endswith("BUG: \\xff")


def test_classes_can_be_switched_off() -> None:
    warning, bug = STAMP + "WARNING: CPU: 0 PID: 1 at x", STAMP + "BUG: x"
    assert Court(FAIL_ON.without("warning")).hear(warning) is None
    assert Court(FAIL_ON.without("warning")).hear(warning, bug) is not None
    nothing = FAIL_ON.without("all")
    assert Court(nothing).hear(warning, bug, STAMP + "watchdog: BUG: soft lockup - CPU#0") is None
    found = Court(nothing).hear(STAMP + "Kernel panic - not syncing: x")
    assert found is not None, "no guest goes on after it"


def test_a_known_line_can_be_allowed_but_no_panic() -> None:
    allowing = FAIL_ON.allowing("at drivers/known", "panic")
    assert Court(allowing).hear(STAMP + "WARNING: CPU: 0 PID: 1 at drivers/known.c:7") is None
    assert Court(allowing).hear(STAMP + "WARNING: CPU: 0 PID: 1 at drivers/new.c:7") is not None
    assert Court(allowing).hear(STAMP + "Kernel panic - not syncing: x") is not None


def test_a_users_pattern_is_searched_in_every_line() -> None:
    own = FAIL_ON.also(r"test \d+ FAILED")
    found = Court(own).hear(STAMP + "Linux", "my test 12 FAILED badly")
    assert found is not None
    assert (found.kind, found.pattern) == ("fail-on", r"test \d+ FAILED")
    assert found.error().name == "fail-on"


@pytest.mark.parametrize("line", [
    "pyvmm-initramfs: cannot mount the root: no /dev/vda after 10 s; there are: nothing",
    "ALERT!  /dev/vda does not exist.  Dropping to a shell!",
])
def test_an_initramfs_without_a_root_is_known_until_user_space_runs(line: str) -> None:
    found = Court().hear(STAMP + "Linux", line)
    assert found is not None
    assert found.kind == "root"
    court = Court()
    court.judge.boot_is_over()
    assert court.hear(STAMP + "Linux", line) is None


@pytest.mark.parametrize(("make", "words"), [
    (lambda: FailOn.parse(add=["("], names=("--fail-on", "--no-fail-on", "--allow")),
     "--fail-on '(': is no regular expression: "),
    (lambda: FailOn.parse(add=[""]), "fail_on '': matches every line"),
    (lambda: FailOn.parse(allow=["*"]), "allow '*': is no regular expression"),
    (lambda: FailOn.parse(without=["warnings"]), "without warnings: is no class; there are root,"),
    (lambda: FAIL_ON.without("panic"), "without panic: cannot be: no guest goes on after it"),
    (lambda: FailOn(classes=("oops",)), "fail_on without root: cannot be"),
    (lambda: FailOn(classes=("nonsense",)), "fail_on nonsense: is no class"),
])
def test_a_wrong_pattern_or_class_is_one_line(make: object, words: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value).startswith(words)


def test_verdicts_have_names_of_their_own_and_can_be_sent() -> None:
    assert len({kind.name for kind in VERDICTS}) == len(VERDICTS)
    assert set(CLASSES) <= {kind.name for kind in VERDICTS}
    for kind in VERDICTS:
        error = kind("why", Outcome(Kind.PANIC), "line", ("b",), ("t",), "report")
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is kind
        assert vars(again) == vars(error)
        assert str(again) == "why"


@pytest.mark.parametrize(("outcome", "name", "status"), [
    (Outcome(Kind.POWER_OFF), "ended", 120),
    (Outcome(Kind.RESET), "ended", 120),
    (Outcome(Kind.GUEST_STATUS, 0), "ended", 120),
    (Outcome(Kind.SHUTDOWN), "ended", 120),
    (Outcome(Kind.PANIC, detail="x"), "panic", 121),
    (Outcome(Kind.PANIC, detail="VFS: Unable to mount root fs on x"), "root", 121),
    (Outcome(Kind.PANIC, detail="init died (cannot mount the root: x)"), "root", 121),
    (Outcome(Kind.EARLY_RESET), "boot-failed", 121),
    (Outcome(Kind.TRIPLE_FAULT, detail="rax\nrbx"), "triple-fault", 122),
    (Outcome(Kind.INTERNAL_ERROR), "internal-error", 123),
    (Outcome(Kind.TIMEOUT), "run-timeout", 124),
    (Outcome(Kind.HOST_ERROR, detail="\x1b[2J"), "host-error", 125),
])
def test_an_end_without_a_bad_line_has_a_verdict(outcome: Outcome, name: str, status: int) -> None:
    error = error_of_outcome(outcome, ["before"])
    assert (error.name, error.exit_status, error.before) == (name, status, ("before",))
    assert error.outcome is outcome
    assert str(error).isprintable(), "one line"


def test_a_verdict_is_an_error_of_pyvmms() -> None:
    import pyvmm

    assert issubclass(pyvmm.KernelOops, pyvmm.BootError)
    assert issubclass(BootError, pyvmm.PyvmmError)
    assert pyvmm.KernelOops is KernelOops
