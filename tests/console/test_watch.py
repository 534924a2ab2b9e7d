"""ConsoleWatch: what the lines of the guest's console mean."""

from __future__ import annotations

import contextlib
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.console.watch import SENT_LIMIT, ConsoleWatch, Finding, Sign, texts
from pyvmm.errors import StateError

PANIC = b"[    1.25] Kernel panic - not syncing: VFS: Unable to mount root fs\r\n"
STAMP = b"[    0.000000] Linux version 6.1\r\n"


class Heard:
    """A watch, and what it found but for FIRST_OUTPUT."""

    def __init__(self) -> None:
        self.all: list[Finding] = []
        self.watch = ConsoleWatch(self.all.append)

    @property
    def findings(self) -> list[Finding]:
        return [finding for finding in self.all if finding.sign is not Sign.FIRST_OUTPUT]

    def hear(self, *pieces: bytes) -> list[Finding]:
        """Return the findings of a watch that was fed ``pieces``, once the run was over."""
        for piece in pieces:
            self.watch.feed(piece)
        self.watch.end()
        return self.findings


@pytest.fixture
def heard() -> Heard:
    return Heard()


def test_the_first_output_is_told_once(heard: Heard) -> None:
    heard.watch.feed(b"b")
    heard.watch.feed(b"ye\n")
    assert heard.all == [Finding(Sign.FIRST_OUTPUT)]


@pytest.mark.parametrize(("line", "finding"), [
    (PANIC, Finding(Sign.PANIC, "VFS: Unable to mount root fs")),
    (b"Kernel panic - not syncing: bad\n", Finding(Sign.PANIC, "bad")),
    (b"hello[    0.53] Kernel panic - not syncing: Attempted to kill init!\n",
     Finding(Sign.PANIC, "Attempted to kill init!")),
    (b"[    1.30] ---[ end Kernel panic - not syncing: VFS ]---\n",
     Finding(Sign.PANIC_ENDS, "VFS")),
    (b"reboot: System halted\n", Finding(Sign.HALTS)),
    (b"[ 9.1] reboot: Power down\n", Finding(Sign.HALTS)),
    (b"[ 9.1] reboot: Restarting system\n", Finding(Sign.RESTARTS)),
    (b"[ 9.1] reboot: Restarting system with command 'x'\n", Finding(Sign.RESTARTS)),
    (b"pyvmm-init: user space reached (Linux 6.1)\r\n", Finding(Sign.USER_SPACE)),
    (b"[    0.4] Run /sbin/init as init process\n", Finding(Sign.INIT_STARTS)),
    (b"[    0.4] Waiting for root device /dev/vda...\r\n", Finding(Sign.WAITS_FOR_ROOT)),
    (b"pyvmm-initramfs: cannot mount the root: no /dev/vdz after 10 s\n",
     Finding(Sign.NO_ROOT, "cannot mount the root: no /dev/vdz after 10 s")),
    (b"pyvmm-initramfs: cannot mount the root: \xff\xfe\n",
     Finding(Sign.NO_ROOT, "cannot mount the root: \ufffd\ufffd")),
    (b"PANIC: early exception 0x0d IP 10:ffffffff81000000 error 0 cr2 0x0\r\n",
     Finding(Sign.GAVE_UP, "PANIC: early exception 0x0d IP 10:ffffffff81000000 error 0 cr2 0x0")),
    (b"No setup signature found...\r\n", Finding(Sign.GAVE_UP, "No setup signature found...")),
])
def test_a_line_means_one_thing(heard: Heard, line: bytes, finding: Finding) -> None:
    assert heard.hear(line) == [finding]


@pytest.mark.parametrize("line", [
    b"echo Kernel panic - not syncing: no\n", b"grep: Kernel panic - not syncing\n",
    b"[    1.0] x: Kernel panic - not syncing\n", b"x Kernel panic - not syncing\n",
    b"[    0.4] Run /sbin/init as init\n", b"x -- System halted\n",
    STAMP + b"Kernel panic - not syncing: quoted\n", STAMP + b"reboot: Restarting system\n",
    b"[    0.4] VFS: Mounted root (ext4 filesystem) readonly on device 254:0.\n",
])
def test_a_line_that_only_quotes_means_nothing(heard: Heard, line: bytes) -> None:
    assert heard.hear(line) == []


@pytest.mark.parametrize("reason", [
    # lib/decompress_*.c and arch/x86/boot/compressed/misc.c
    b"Decoding failed", b"XZ-compressed data is corrupt", b"uncompression error",
    b"Input is not in the ZSTD format (wrong magic bytes)", b"Kernel is not a valid ELF file",
])
@pytest.mark.parametrize("step", [1, 7, 1000])
def test_fault_36_an_early_stage_that_gives_up_has_its_reason(
    heard: Heard, reason: bytes, step: int
) -> None:
    """As arch/x86/boot/compressed/error.c prints it: the last line has no end."""
    said = b"\r\nDecompressing Linux... \r\n\r\n" + reason + b"\r\n\r\n -- System halted"
    for at in range(0, len(said), step):
        heard.watch.feed(said[at : at + step])
    told = [Finding(Sign.GAVE_UP, reason.decode())]
    assert heard.findings == told, "before the line ends, which it never does"
    assert heard.hear() == told
    assert heard.hear(b"\n") == told


def test_fault_36_a_stage_that_gives_no_reason_gave_up_too(heard: Heard) -> None:
    assert heard.hear(b"-- System halted") == [Finding(Sign.GAVE_UP)]


@given(st.lists(st.sampled_from(
    [b"[", b"] ", b"]", b" ", b"12", b".", b"-", b"x", b"[ 1.5] ", b"\xb2"]
), max_size=16).map(b"".join))
def test_messages_are_what_follows_each_time_stamp(line: bytes) -> None:
    stamps = re.finditer(rb"(?=(\[ *\d+\.\d+\] ))", line)
    assert texts(line) == [*reversed([line[stamp.end(1) :] for stamp in stamps]), line]


def test_a_stamp_may_name_the_caller() -> None:
    """CONFIG_PRINTK_CALLER, kernel/printk/printk.c: print_caller()."""
    message = b"Kernel panic - not syncing: x"
    for caller in (b"[    T1]", b"[    C0]", b"[T12345]"):
        line = b"[    1.234567]" + caller + b" " + message
        assert texts(line) == [message, line]
    assert texts(b"[    X1] x] y") == [b"[    X1] x] y"]


def send(heard: Heard, *sent: tuple[str, bytes]) -> bytes:
    """Send pieces through one tap, each from the vCPU named; what came out, which was fed."""
    out = bytearray()
    transmit = heard.watch.tap(out.extend)
    with contextlib.ExitStack() as stack:
        vcpus = {
            name: stack.enter_context(ThreadPoolExecutor(1)) for name in sorted(dict(sent))
        }
        for name, data in sent:
            vcpus[name].submit(transmit, data).result()
    heard.watch.feed(bytes(out))
    return bytes(out)


TORN = (
    ("tty", b"[    0.1] Linux version 6.12\r\n1000"), ("panic", b"[    5.538225] Kern"),
    ("tty", b"15\r\n10016"), ("panic", b"el panic - not syncing: sysrq triggered crash\r\n[    5."),
    ("tty", b"10017\r\n10018"), ("panic", b"566511] CPU: 3\r\n"), ("tty", b"\r\n"),
)
"""As Debian's 6.12 printed it: another CPU goes on sending what a program has written."""


def test_a_panic_that_another_vcpu_writes_into_is_found_in_the_end(heard: Heard) -> None:
    sent = send(heard, *TORN)
    assert sent == b"".join(data for _, data in TORN)
    assert heard.findings == []
    assert heard.hear() == [Finding(Sign.PANIC, "sysrq triggered crash")]


def test_a_panic_that_was_seen_is_not_searched_for(heard: Heard) -> None:
    send(heard, *TORN, ("panic", PANIC))
    assert heard.hear() == [Finding(Sign.PANIC, "VFS: Unable to mount root fs")]


def test_what_two_vcpus_print_is_no_panic_if_neither_says_so(heard: Heard) -> None:
    send(
        heard, ("a", b"[    0.1] Linux version 6.12\r\n[    5.5] echo"),
        ("b", b"Kernel panic - not syncing: quoted\n"), ("a", b" Kernel panic - not syncing: no\n"),
    )
    assert heard.hear() == []


def test_the_last_that_each_vcpu_has_sent_is_kept_and_no_more(heard: Heard) -> None:
    much = b"x\n" * SENT_LIMIT
    send(heard, ("panic", much), ("tty", much), *TORN)
    assert heard.hear() == [Finding(Sign.PANIC, "sysrq triggered crash")]
    heard = Heard()
    send(heard, *TORN, ("panic", much), ("tty", much))
    assert heard.hear() == []


# Saved and restored

CONSOLE = b"".join([
    STAMP, b"some Kernel panic - not syncing: quoted\n", PANIC, b"PANIC: early exception 1\n",
    b"reason\n\n -- System halted", b"\n---[ end Kernel panic - not syncing: x ]---\n",
])


@given(st.integers(0, len(CONSOLE)), st.integers(0, len(CONSOLE)))
def test_a_restored_watch_goes_on_as_the_one_that_was_saved(first: int, second: int) -> None:
    cut, end = sorted((first, second))
    original, copy = Heard(), Heard()
    original.watch.feed(CONSOLE[:cut])
    state = original.watch.save()
    copy.watch.feed(b"what another guest has said: [    0.1] Kernel panic - ")
    copy.watch.restore(state)
    assert copy.watch.save() == state
    before, after = len(original.all), len(copy.all)
    original.hear(CONSOLE[cut:end])
    copy.hear(CONSOLE[cut:end])
    assert copy.all[after:] == original.all[before:]


@given(
    st.sampled_from(sorted(ConsoleWatch(lambda _: None).save())),
    st.none() | st.integers() | st.binary(max_size=2000) | st.booleans() | st.text(),
)
def test_a_bad_state_of_a_watch_is_refused_or_right(name: str, value: object) -> None:
    watch = ConsoleWatch(lambda _: None)
    state = watch.save() | {name: value}
    try:
        watch.restore(state)
    except StateError:
        assert watch.save() == ConsoleWatch(lambda _: None).save()
    else:
        assert watch.save() == state
