"""``Machine.console`` without a machine: text, expectations, lines, typed bytes."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable

import pytest

from pyvmm.api.console import MAX_KEPT_BYTES, MAX_TYPED_BYTES, ConsoleHandle, ExpectError
from pyvmm.errors import PyvmmError
from tests.support.patience import patient


class Machine:
    """The parts of a machine that a console needs."""

    def __init__(self) -> None:
        self.woken = 0
        self.refused = False
        self.has_begun = True
        self.console = ConsoleHandle(
            refuse_own_threads=self.refuse, wake=self.wake, run_hook=self.run_hook,
            has_begun=lambda: self.has_begun,
        )

    def refuse(self, what: str) -> None:
        if self.refused:
            raise RuntimeError(what)

    def wake(self) -> None:
        self.woken += 1

    def run_hook(self, name: str, hook: Callable[[str], object], value: str) -> None:
        hook(value)


@pytest.fixture
def machine() -> Machine:
    return Machine()


def test_expectations_follow_one_another(machine: Machine) -> None:
    console = machine.console
    console.feed(b"login: root\r\nlogin: again\r\n# ")
    assert console.expect("login: (.*)$", 0).group(1) == "root"
    assert console.expect("login: (.*)$", 0).group(1) == "again"
    assert console.expect(re.compile("# "), 0).group() == "# "
    with pytest.raises(ExpectError, match=r"'# ' did not come: 0 s have passed; .*again"):
        console.expect("# ", 0)
    console.feed("grüße\r\nx".encode())
    assert console.expect("ü..", 0).group() == "üße"
    assert console.expect("\nx", 0).group() == "\nx"


def test_an_expectation_waits_for_what_comes_in_pieces(machine: Machine) -> None:
    found: list[str] = []
    thread = threading.Thread(
        target=lambda: found.append(machine.console.expect("re+ady", patient(10)).group())
    )
    thread.start()
    for byte in b"noise\nreeeady":
        machine.console.feed(bytes([byte]))
    thread.join(patient(10))
    assert found == ["reeeady"]


def test_a_line_begins_only_where_one_does(machine: Machine) -> None:
    console = machine.console
    console.feed(b"login: root\r\n# ")
    console.expect("login: ", 0)
    with pytest.raises(ExpectError):
        console.expect("^root", 0)
    assert console.expect("root\n", 0)
    assert console.expect("^# ", 0)
    console.feed(b"one\r\ntwo")
    assert console.expect("one\r?", 0)
    assert console.expect("^two", 0)


def test_nobody_waits_for_a_run_that_is_over(machine: Machine) -> None:
    machine.console.feed(b"Kernel panic")
    threading.Timer(0.05, machine.console.end).start()
    with pytest.raises(ExpectError, match="the run has ended; the console ends with 'Kernel pa"):
        machine.console.expect("login", patient(30))
    assert machine.console.expect("panic", 0).group() == "panic"


def test_a_hook_may_not_wait(machine: Machine) -> None:
    machine.refused = True
    with pytest.raises(RuntimeError, match=r"console\.expect\(\)"):
        machine.console.expect("x")


def test_a_guest_that_prints_for_ever_costs_no_more(machine: Machine) -> None:
    piece = b"x" * (1 << 20)
    for _ in range(20):
        machine.console.feed(piece)
    machine.console.feed(b"end")
    assert MAX_KEPT_BYTES <= len(machine.console.text) <= MAX_KEPT_BYTES + (1 << 20)
    assert machine.console.expect("xend", 0)


@pytest.mark.parametrize("pattern", [3, b"login", re.compile(b"login")])
def test_only_text_can_be_expected(machine: Machine, pattern: object) -> None:
    with pytest.raises(TypeError, match="takes a text or a pattern of text, not"):
        machine.console.expect(pattern, 0)  # type: ignore[arg-type]


def test_lines_come_whole_and_once(machine: Machine) -> None:
    lines: list[str] = []
    machine.console.feed(b"before\n")
    machine.console.on_line(lines.append)
    machine.console.feed(b"one\r\ntw")
    machine.console.feed(b"o\n\xff\nthree")
    assert lines == ["one", "two", "\ufffd"]
    with pytest.raises(TypeError, match="takes a function, not str"):
        machine.console.on_line("print")  # type: ignore[arg-type]


def test_typed_bytes_wait_for_room(machine: Machine) -> None:
    console, got = machine.console, bytearray()
    console.write("ls\n")
    console.write(b"exit\n")
    assert machine.woken == 2

    def receive(data: bytes) -> int:
        got.extend(data[:3])
        return len(data[:3]) if len(got) < 6 else 0

    assert console.hand_over(receive)
    assert bytes(got) == b"ls\nexi"
    assert not console.hand_over(len)
    console.write(bytes(MAX_TYPED_BYTES))
    with pytest.raises(PyvmmError, match=r"has not read \d+ bytes yet; at most 1048576 may wait"):
        console.write("x")
    with pytest.raises(TypeError, match="str or bytes, not int"):
        console.write(3)  # type: ignore[arg-type]
