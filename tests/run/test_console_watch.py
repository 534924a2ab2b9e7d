"""ConsoleWatch: what the guest says on its console, and what that makes of a run's end."""

from __future__ import annotations

import contextlib
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.run.console_watch import SENT_LIMIT, ConsoleWatch, texts
from pyvmm.run.outcome import Kind, Outcome


class FakeRunner:
    """Stands in for the Runner: remembers what was asked of it."""

    def __init__(self) -> None:
        self.finished: list[Outcome] = []
        self.later: list[Outcome] = []
        self.halt_watches = 0

    def finish(self, outcome: Outcome) -> None:
        self.finished.append(outcome)

    def finish_after(self, delay_s: float, outcome: Outcome) -> None:
        assert delay_s > 0
        self.later.append(outcome)

    def watch_for_halt(self) -> None:
        self.halt_watches += 1


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner()


PANIC = b"[    1.25] Kernel panic - not syncing: VFS: Unable to mount root fs\r\n"


def test_a_panic_explains_the_reboot_that_follows(runner: FakeRunner) -> None:
    watch = ConsoleWatch(runner)
    watch.feed(PANIC)
    outcome = watch.judge(Outcome(Kind.RESET))
    assert outcome == Outcome(Kind.PANIC, detail="VFS: Unable to mount root fs")


def test_a_panic_without_reboot_ends_the_run_in_a_while(runner: FakeRunner) -> None:
    watch = ConsoleWatch(runner)
    watch.feed(PANIC)
    assert [o.kind for o in runner.later] == [Kind.PANIC]
    assert runner.finished == []
    watch.feed(b"[    1.30] ---[ end Kernel panic - not syncing: VFS ]---\n")
    assert [o.kind for o in runner.finished] == [Kind.PANIC]


def test_the_status_a_guest_reports_stands_whatever_it_printed(runner: FakeRunner) -> None:
    watch = ConsoleWatch(runner)
    watch.feed(PANIC)
    assert watch.judge(Outcome(Kind.GUEST_STATUS, 3)) == Outcome(Kind.GUEST_STATUS, 3)


@pytest.mark.parametrize("text", [
    b"echo Kernel panic - not syncing: no\n", b"grep: Kernel panic - not syncing\n",
    b"[    1.0] x: Kernel panic - not syncing\n", b"x Kernel panic - not syncing\n",
])
def test_text_that_only_quotes_a_panic_is_none(runner: FakeRunner, text: bytes) -> None:
    watch = ConsoleWatch(runner)
    watch.feed(text)
    assert watch.judge(Outcome(Kind.RESET)).kind is Kind.RESET


def test_without_time_stamps_too(runner: FakeRunner) -> None:
    watch = ConsoleWatch(runner)
    watch.feed(b"Kernel panic - not syncing: bad\n")
    assert watch.judge(Outcome(Kind.TRIPLE_FAULT)).kind is Kind.PANIC


@pytest.mark.parametrize("line", [b"reboot: System halted\n", b"[ 9.1] reboot: Power down\n"])
def test_a_halt_is_watched_for(runner: FakeRunner, line: bytes) -> None:
    ConsoleWatch(runner).feed(line)
    assert runner.halt_watches == 1


def test_user_space_is_timed_once(runner: FakeRunner) -> None:
    watch = ConsoleWatch(runner)
    assert not watch.user_space_seen_s
    before_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    watch.feed(b"pyvmm-init: user space reached (Linux 6.1)\r\n")
    first_s = watch.user_space_seen_s
    assert first_s
    assert first_s >= before_s
    watch.feed(b"pyvmm-init: user space reached (Linux 6.1)\r\n")
    assert watch.user_space_seen_s == first_s


def test_an_internal_error_points_to_the_doctor(runner: FakeRunner) -> None:
    outcome = ConsoleWatch(runner).judge(Outcome(Kind.INTERNAL_ERROR, detail="suberror 17"))
    assert "suberror 17" in outcome.detail
    assert "pyvmm doctor" in outcome.detail


def test_a_panic_behind_an_unfinished_line_is_seen(runner: FakeRunner) -> None:
    watch = ConsoleWatch(runner)
    watch.feed(b"hello[    0.53] Kernel panic - not syncing: Attempted to kill init!\n")
    assert watch.judge(Outcome(Kind.RESET)).detail == "Attempted to kill init!"


def test_with_time_stamps_an_unstamped_panic_is_a_quotation(runner: FakeRunner) -> None:
    watch = ConsoleWatch(runner)
    watch.feed(b"[    0.000000] Linux version 6.1\nKernel panic - not syncing: quoted\n")
    assert runner.later == []
    assert watch.judge(Outcome(Kind.RESET)).kind is Kind.RESET


@given(st.lists(st.sampled_from(
    [b"[", b"] ", b"]", b" ", b"12", b".", b"-", b"x", b"[ 1.5] ", b"\xb2"]
), max_size=16).map(b"".join))
def test_messages_are_what_follows_each_time_stamp(line: bytes) -> None:
    stamps = re.finditer(rb"(?=(\[ *\d+\.\d+\] ))", line)
    assert texts(line) == [*reversed([line[stamp.end(1) :] for stamp in stamps]), line]


def test_a_panic_that_pvpanic_reports_is_one_without_any_console(runner: FakeRunner) -> None:
    watch = ConsoleWatch(runner)
    watch.panic_reported()
    said = Outcome(Kind.PANIC, detail="reported through pvpanic")
    assert runner.later == [said], "the guest has a while to reboot"
    assert watch.judge(Outcome(Kind.RESET)) == said
    assert not watch.has_printed


def test_the_console_says_why_pvpanic_was_told(runner: FakeRunner) -> None:
    watch = ConsoleWatch(runner)
    watch.panic_reported()
    watch.feed(PANIC)
    assert watch.judge(Outcome(Kind.RESET)).detail == "VFS: Unable to mount root fs"


@pytest.mark.parametrize("kind", [Kind.GUEST_STATUS, Kind.POWER_OFF, Kind.SIGNAL, Kind.QUIT])
def test_an_end_that_no_panic_brings_about_stays(runner: FakeRunner, kind: Kind) -> None:
    watch = ConsoleWatch(runner)
    watch.panic_reported()
    assert watch.judge(Outcome(kind)).kind is kind


def test_our_initramfs_has_the_reason_of_its_panic(runner: FakeRunner) -> None:
    watch = ConsoleWatch(runner)
    watch.feed(b"[    1.20] virtio_blk: loaded\n"
               b"pyvmm-initramfs: cannot mount the root: no /dev/vdz after 10 s\n"
               b"[    1.25] Kernel panic - not syncing: Attempted to kill init!\n")
    assert watch.judge(Outcome(Kind.RESET)).detail == (
        "Attempted to kill init! (cannot mount the root: no /dev/vdz after 10 s)"
    )


def test_what_the_initramfs_says_without_a_panic_is_no_end(runner: FakeRunner) -> None:
    watch = ConsoleWatch(runner)
    watch.feed(b"pyvmm-initramfs: cannot mount the root: \xff\xfe\n")
    assert (runner.finished, runner.later) == ([], [])
    assert watch.judge(Outcome(Kind.RESET)).kind is Kind.RESET


def test_a_halt_is_an_end_of_those_who_have_said_something(runner: FakeRunner) -> None:
    watch = ConsoleWatch(runner)
    halt = Outcome(Kind.SHUTDOWN, detail="halted with interrupts off")
    assert watch.judge(halt) == Outcome(Kind.SILENT_HALT, detail="halted with interrupts off")
    assert watch.judge(halt).exit_status == 121
    watch.feed(b"bye")
    assert watch.judge(halt) == halt


def send(watch: ConsoleWatch, *sent: tuple[str, bytes]) -> bytes:
    """Send pieces through one tap, each from the vCPU named; what came out, which was fed."""
    out = bytearray()
    transmit = watch.tap(out.extend)
    with contextlib.ExitStack() as stack:
        vcpus = {
            name: stack.enter_context(ThreadPoolExecutor(1)) for name in sorted(dict(sent))
        }
        for name, data in sent:
            vcpus[name].submit(transmit, data).result()
    watch.feed(bytes(out))
    return bytes(out)


TORN = (
    ("tty", b"[    0.1] Linux version 6.12\r\n1000"), ("panic", b"[    5.538225] Kern"),
    ("tty", b"15\r\n10016"), ("panic", b"el panic - not syncing: sysrq triggered crash\r\n[    5."),
    ("tty", b"10017\r\n10018"), ("panic", b"566511] CPU: 3\r\n"), ("tty", b"\r\n"),
)
"""As Debian's 6.12 printed it: another CPU goes on sending what a program has written."""


@pytest.mark.parametrize("reported", [False, True])
def test_a_panic_that_another_vcpu_writes_into_is_read_all_the_same(
    runner: FakeRunner, reported: bool
) -> None:
    watch = ConsoleWatch(runner)
    sent = send(watch, *TORN)
    assert sent == b"".join(data for _, data in TORN)
    if reported:
        watch.panic_reported()
    said = Outcome(Kind.PANIC, detail="sysrq triggered crash")
    assert watch.judge(Outcome(Kind.RESET)) == said
    assert watch.judge(Outcome(Kind.POWER_OFF)).kind is Kind.POWER_OFF


def test_a_torn_panic_without_reboot_is_told_by_its_last_line(runner: FakeRunner) -> None:
    watch = ConsoleWatch(runner)
    send(watch, *TORN, ("panic", b"[    5.9] ---[ end Kernel panic - not syncing: torn ]---\r\n"))
    assert runner.finished == [Outcome(Kind.PANIC, detail="torn")]


def test_what_two_vcpus_print_is_no_panic_if_neither_says_so(runner: FakeRunner) -> None:
    watch = ConsoleWatch(runner)
    send(
        watch, ("a", b"[    0.1] Linux version 6.12\r\n[    5.5] echo"),
        ("b", b"Kernel panic - not syncing: quoted\n"), ("a", b" Kernel panic - not syncing: no\n"),
    )
    assert watch.judge(Outcome(Kind.RESET)).kind is Kind.RESET


def test_the_last_that_each_vcpu_has_sent_is_kept_and_no_more(runner: FakeRunner) -> None:
    watch = ConsoleWatch(runner)
    much = b"x\n" * SENT_LIMIT
    send(watch, ("panic", much), ("tty", much), *TORN)
    assert watch.judge(Outcome(Kind.RESET)).detail == "sysrq triggered crash"
    watch = ConsoleWatch(runner)
    send(watch, *TORN, ("panic", much), ("tty", much))
    assert watch.judge(Outcome(Kind.RESET)).kind is Kind.RESET


@pytest.mark.parametrize(("line", "reached"), [
    (b"[    0.4] Run /sbin/init as init process\n", True),
    (b"[    0.4] Run /init as init process\n", True),
    (b"pyvmm-init: user space reached after 0.3 s\n", True),
    (b"[    0.4] Run /sbin/init as init\n", False),
    (b"[    0.4] VFS: Mounted root (ext4 filesystem) readonly on device 254:0.\n", False),
])
def test_whether_the_kernel_came_as_far_as_an_init(
    runner: FakeRunner, line: bytes, reached: bool
) -> None:
    watch = ConsoleWatch(runner)
    assert not watch.reached_init
    watch.feed(line)
    assert watch.reached_init is reached
    assert not watch.waits_for_root


def test_a_kernel_that_waits_for_its_root(runner: FakeRunner) -> None:
    watch = ConsoleWatch(runner)
    watch.feed(b"[    0.4] Waiting for root device /dev/vda...\r\n")
    assert (watch.waits_for_root, watch.reached_init) == (True, False)
