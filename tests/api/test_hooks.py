"""Hooks on ports, addresses and exits, with vCPUs made of Python: no KVM needed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from pyvmm.api.hook_calls import REFUSE
from pyvmm.api.hooked_bus import Access
from pyvmm.api.hooks import MAX_MMIO_BYTES, Hooks
from pyvmm.board.board import Board
from pyvmm.board.polled_uart import POLLED_BYTES, PolledUart
from pyvmm.devices.serial import Register, Serial
from pyvmm.kvm.exits import CoalescedRing, Direction, Exit, IoExit, MmioExit
from pyvmm.memory import GuestMemory
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.run.runner import Runner
from pyvmm.run.vcpu_loop import Exits
from pyvmm.x86 import layout
from tests.support.hooked_machine import (
    DATA_OFFSET,
    PAGE,
    PORT,
    RAM_BYTES,
    Machine,
    Remembering,
    memory_access,
    port_read,
    port_write,
)


@pytest.fixture
def machine() -> Iterator[Machine]:
    with contextlib.ExitStack() as stack:
        memory = GuestMemory.over(bytearray(RAM_BYTES))
        runner = stack.enter_context(contextlib.closing(Runner(print)))
        made = Machine(Board(memory, stack, maps_pages=False, report=print), runner)
        made.add_vcpu()
        yield made


# Ports


def test_a_hook_that_returns_none_only_watches(machine: Machine) -> None:
    device = Remembering()
    seen: list[Access] = []
    machine.board.pio.add(PORT, 2, device)
    Hooks(machine).on_port(PORT, seen.append)
    assert machine.run(port_write(PORT, 0x12), port_read(PORT)).kind is Kind.SHUTDOWN
    assert device.written == [(0, 1, 0x12)]
    assert machine.answers[1][0] == 0x5A
    assert seen == [
        Access(address=PORT, size=1, is_write=True, value=0x12, vcpu=0),
        Access(address=PORT, size=1, is_write=False, value=None, vcpu=0),
    ]


def test_a_number_answers_a_read_and_replaces_a_write(machine: Machine) -> None:
    device = Remembering()
    machine.board.pio.add(PORT, 2, device)
    Hooks(machine).on_port(PORT, lambda access: 0x77)
    machine.run(port_write(PORT, 0x12), port_read(PORT))
    assert device.written == [(0, 1, 0x77)]
    assert machine.answers[1][0] == 0x77


def test_refuse_means_that_nobody_is_there(machine: Machine) -> None:
    device = Remembering()
    machine.board.pio.add(PORT, 2, device)
    Hooks(machine).on_port(PORT, lambda access: REFUSE)
    machine.run(port_write(PORT, 0x12, size=2), port_read(PORT, size=2))
    assert device.written == []
    assert machine.answers[1][:2] == b"\xff\xff"


def test_exactly_the_ports_named_are_hooked_claimed_or_not(machine: Machine) -> None:
    device, seen = Remembering(), []
    machine.board.pio.add(PORT, 4, device)
    Hooks(machine).on_port(range(PORT + 2, PORT + 6), lambda access: seen.append(access.address))
    machine.run(*(port_write(PORT + at, at) for at in range(8)), port_read(PORT + 5))
    assert seen == [PORT + 2, PORT + 3, PORT + 4, PORT + 5, PORT + 5]
    assert device.written == [(at, 1, at) for at in range(4)]
    assert machine.answers[8][0] == 0xFF


def test_an_access_that_leaves_its_device_finds_nobody_with_a_hook_as_without(
    machine: Machine,
) -> None:
    device = Remembering()
    seen: list[Access] = []
    machine.board.pio.add(PORT, 2, device)
    Hooks(machine).on_port(PORT + 1, seen.append)
    machine.run(port_write(PORT + 1, 0x1234, size=2), port_read(PORT + 1, size=4))
    assert device.written == []
    assert machine.answers[1][:4] == b"\xff" * 4
    assert len(seen) == 2


def test_every_port_there_is_can_be_hooked_also_the_last(machine: Machine) -> None:
    seen: list[int] = []
    Hooks(machine).on_port(range(1 << 16), lambda access: seen.append(access.address))
    machine.run(port_write(0, 1), port_read(0xFFFF, size=4))
    assert seen == [0, 0xFFFF]


def test_hooks_are_asked_in_order_until_one_answers(machine: Machine) -> None:
    device, asked = Remembering(), []
    machine.board.pio.add(PORT, 1, device)
    hooks = Hooks(machine)
    for name, answer in (("first", None), ("second", 2), ("third", 3)):
        def hook(access: Access, name: str = name, answer: int | None = answer) -> int | None:
            asked.append(name)
            return answer

        hooks.on_port(range(PORT, PORT + 1), hook)
    machine.run(port_write(PORT, 9))
    assert asked == ["first", "second"]
    assert device.written == [(0, 1, 2)]


def test_each_item_of_a_string_is_an_access(machine: Machine) -> None:
    seen: list[int | None] = []
    Hooks(machine).on_port(PORT, lambda access: seen.append(access.value))
    machine.run(port_write(PORT, 0xAB, count=3))
    assert seen == [0xAB] * 3


# MMIO


def test_addresses_within_a_page_are_hooked_and_the_rest_is_not(machine: Machine) -> None:
    device, seen = Remembering(), []
    machine.board.mmio.add(PAGE, 4096, device)

    def hook(access: Access) -> int:
        seen.append(access)
        return 0x99

    Hooks(machine).on_mmio(range(PAGE + 8, PAGE + 16), hook)
    machine.run(
        memory_access(PAGE + 4, value=1), memory_access(PAGE + 8, value=2),
        memory_access(PAGE + 12), memory_access(PAGE + 16),
    )
    assert device.written == [(4, 4, 1), (8, 4, 0x99)]
    assert [(access.address, access.value) for access in seen] == [(PAGE + 8, 2), (PAGE + 12, None)]
    assert [answer[4] for answer in machine.answers[2:]] == [0x99, 0x5A]


def test_two_hooks_in_one_page_see_their_own_addresses(machine: Machine) -> None:
    hooks = Hooks(machine)
    hooks.on_mmio(PAGE, lambda access: 1)
    hooks.on_mmio(range(PAGE, PAGE + 8192), lambda access: 2)
    machine.run(*(memory_access(PAGE + at) for at in (0, 4, 4096, 8192)))
    assert [answer[4] for answer in machine.answers] == [1, 2, 2, 0xFF]


def test_refused_memory_is_all_ones(machine: Machine) -> None:
    machine.board.mmio.add(PAGE, 4096, Remembering())
    Hooks(machine).on_mmio(PAGE, lambda access: REFUSE)
    machine.run(memory_access(PAGE))
    assert machine.answers[0][4:] == b"\xff" * 4


@pytest.mark.parametrize(("addresses", "problem"), [
    (range(RAM_BYTES - 1, RAM_BYTES + 1), "has RAM in it"),
    (0, "has RAM in it"),
    (range(PAGE, PAGE + MAX_MMIO_BYTES + 1), "more than 1 GiB"),
    (1 << 64, "outside 0 to"),
    (-1, "outside 0 to"),
    (range(PAGE, PAGE), "is empty"),
])
def test_addresses_that_cannot_be_hooked(
    machine: Machine, addresses: int | range, problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        Hooks(machine).on_mmio(addresses, lambda access: None)


# Exits


def test_an_exit_hook_sees_all_exits_and_answers_some(machine: Machine) -> None:
    device, seen = Remembering(), []
    machine.board.pio.add(PORT, 1, device)
    machine.board.mmio.add(PAGE, 4096, device)

    def hook(vcpu: int, left: Exit) -> int | None:
        seen.append((vcpu, left))
        is_read = isinstance(left, IoExit) and left.direction == Direction.IN
        is_read = is_read or (isinstance(left, MmioExit) and not left.is_write)
        return 0x33 if is_read else None

    Hooks(machine).on_exit(hook)
    outcome = machine.run(
        port_write(PORT, 0x41, count=2), port_read(PORT, count=2),
        memory_access(PAGE, value=0x42), memory_access(PAGE),
    )
    assert outcome.kind is Kind.SHUTDOWN
    assert [type(left).__name__ for _, left in seen] == [
        "IoExit", "IoExit", "MmioExit", "MmioExit", "HltExit"
    ]
    assert seen[0] == (0, IoExit(Direction.OUT, 1, PORT, 2, DATA_OFFSET, b"AA"))
    assert device.written == [(0, 1, 0x41), (0, 1, 0x41), (0, 4, 0x42)]
    assert machine.answers[1][:2] == b"\x33\x33"
    assert machine.answers[3][4:] == b"\x33\0\0\0"
    assert machine.loops[0].exits == Exits(mmio=2, io=2, other=1)


def test_an_exit_hook_replaces_and_refuses_writes(machine: Machine) -> None:
    device, seen = Remembering(), []
    machine.board.pio.add(PORT, 1, device)
    machine.board.mmio.add(PAGE, 4096, device)
    answers = iter([7, REFUSE, 8, REFUSE, REFUSE, REFUSE, None])
    hooks = Hooks(machine)
    hooks.on_exit(lambda vcpu, left: next(answers))
    hooks.on_port(PORT, lambda access: seen.append(access.value))
    machine.run(
        port_write(PORT, 1), port_write(PORT, 2),
        memory_access(PAGE, value=3), memory_access(PAGE, value=4),
        port_read(PORT), memory_access(PAGE),
    )
    assert device.written == [(0, 1, 7), (0, 4, 8)]
    assert seen == [7]
    assert machine.answers[4][0] == 0xFF
    assert machine.answers[5][4:] == b"\xff" * 4
    assert machine.loops[0].exits == Exits(mmio=3, io=3, other=1)


def test_exits_that_ask_nothing_cannot_be_answered(machine: Machine) -> None:
    Hooks(machine).on_exit(lambda vcpu, left: 1)
    outcome = machine.run()
    assert outcome.kind is Kind.HOST_ERROR
    assert "on_exit hook" in outcome.detail
    assert "asks nothing (HLT)" in outcome.detail


def test_without_hooks_the_loop_enters_kvm_itself(machine: Machine) -> None:
    """Free when none is installed: nothing of a hook is between the loop and KVM, or a device."""
    device = Remembering()
    machine.board.pio.add(PORT, 1, device)
    before = machine.board.pio.find
    Hooks(machine)
    assert machine.loops[0].enter is machine.loops[0].vcpu.enter
    assert machine.board.pio.find is before
    assert machine.board.pio.find(PORT) == (PORT, PORT + 1, device)


# The serial port


def test_a_hook_on_the_serial_port_sees_what_kvm_would_gather(machine: Machine) -> None:
    sent = bytearray()
    asked: list[bool] = []
    serial = Serial(sent.extend, lambda level: None, lambda: None)
    with memoryview(bytearray(4096)) as view:
        ring = CoalescedRing(view)
        uart = PolledUart(serial, ring=ring, gather=asked.append, begin=lambda: None)
        machine.board.pio.add(layout.SERIAL_PORT, Serial.LENGTH, uart)

        def poll(count: int) -> None:
            for _ in range(count):
                machine.board.pio.read(layout.SERIAL_PORT + Register.LSR, 1)
                machine.board.pio.write(layout.SERIAL_PORT, 1, 0x41)

        poll(POLLED_BYTES)
        assert asked == [True]
        Hooks(machine).on_port(layout.SERIAL_PORT, lambda access: None)
        assert asked == [True, False]
        poll(3 * POLLED_BYTES)
        assert asked == [True, False]
        assert sent == b"A" * (4 * POLLED_BYTES)
        ring.release()


# Bad input


def broken(access: object) -> None:
    raise LookupError("no such thing")


def test_a_hook_that_raises_ends_the_run_and_is_named(machine: Machine) -> None:
    device = Remembering()
    calls: list[Access] = []
    machine.board.pio.add(PORT, 1, device)
    hooks = Hooks(machine)
    hooks.on_port(PORT, broken)
    hooks.on_port(PORT + 1, calls.append)
    outcome = machine.run(
        port_write(PORT, 1), port_read(PORT), port_read(PORT + 1), port_write(PORT, 2)
    )
    assert outcome.kind is Kind.HOST_ERROR
    assert outcome.detail.startswith("the on_port hook broken (")
    assert "test_hooks.py:" in outcome.detail
    assert "raised LookupError: no such thing\nTraceback (most recent call last):" in outcome.detail
    assert 'raise LookupError("no such thing")' in outcome.detail
    assert "hook_calls.py" not in outcome.detail
    # Nobody is there meanwhile, and no hook is called any more.
    assert device.written == []
    assert all(answer[0] == 0xFF for answer in machine.answers[1:3])
    assert calls == []


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), UnprintableError()])
def test_whatever_a_hook_raises_ends_the_run(machine: Machine, error: BaseException) -> None:
    def hook(vcpu: int, left: Exit) -> None:
        raise error

    Hooks(machine).on_exit(hook)
    outcome = machine.run(port_read(PORT))
    assert outcome.kind is Kind.HOST_ERROR
    assert type(error).__name__ in outcome.detail


@pytest.mark.parametrize(("answer", "told"), [
    ("text", "returned a str"), (True, "returned True"), (1.5, "returned a float"),
    (-1, "returned -1"), (256, "returned 256"),
])
def test_an_answer_that_is_none_ends_the_run(
    machine: Machine, answer: object, told: str
) -> None:
    hook: Callable[[Access], int | None] = lambda access: answer  # type: ignore[assignment,return-value]  # noqa: E731
    Hooks(machine).on_port(PORT, hook)
    outcome = machine.run(port_read(PORT))
    assert outcome.kind is Kind.HOST_ERROR
    assert f"{told}; for this access it may return None, an int from 0 to 0xff, or REFUSE" in (
        outcome.detail
    )


@pytest.mark.parametrize("call", ["wait", "pause", "stop"])
def test_a_hook_that_waits_for_its_own_machine_gets_a_runtime_error(
    machine: Machine, call: str
) -> None:
    def hook(access: Access) -> None:
        arguments = [Outcome(Kind.QUIT)] if call == "stop" else []
        getattr(machine.runner, call)(*arguments)

    Hooks(machine).on_port(PORT, hook)
    outcome = machine.run(port_read(PORT))
    assert outcome.kind is Kind.HOST_ERROR
    assert "hook" in outcome.detail
    assert f"RuntimeError: {call}() in a thread of the run would wait for ever" in outcome.detail


@pytest.mark.parametrize(("ports", "error", "problem"), [
    ("0x60", TypeError, "on_port takes a port or a range of them, not str"),
    (True, TypeError, "not bool"),
    ([1, 2], TypeError, "not list"),
    (-1, ValueError, "-0x1 is outside 0 to 0xffff"),
    (0x10000, ValueError, "0x10000 is outside 0 to 0xffff"),
    (range(0xFFFF, 0x10001), ValueError, "0x10000 is outside"),
    (range(0), ValueError, "is empty"),
])
def test_ports_that_cannot_be_hooked(
    machine: Machine, ports: int | range, error: type[Exception], problem: str
) -> None:
    with pytest.raises(error, match=problem):
        Hooks(machine).on_port(ports, lambda access: None)


@pytest.mark.parametrize("method", ["on_port", "on_mmio", "on_request"])
def test_a_hook_must_be_a_function(machine: Machine, method: str) -> None:
    with pytest.raises(TypeError, match=f"{method} takes a function to call, not int"):
        getattr(Hooks(machine), method)(PAGE if method == "on_mmio" else 0, 5)
    with pytest.raises(TypeError, match="on_exit takes a function to call, not NoneType"):
        Hooks(machine).on_exit(None)  # type: ignore[arg-type]


def test_exit_and_request_hooks_come_before_the_start(machine: Machine) -> None:
    hooks = Hooks(machine)
    machine.run()
    with pytest.raises(RuntimeError, match=r"on_exit\(\) comes before the start"):
        hooks.on_exit(lambda vcpu, left: None)
    with pytest.raises(RuntimeError, match=r"on_request\(\) comes before the start"):
        hooks.on_request(0, lambda request: None)


def test_run_hook_ends_the_run_by_what_it_calls(machine: Machine) -> None:
    hooks = Hooks(machine)
    lines: list[object] = []
    hooks.run_hook("console.on_line", lines.append, "hello")
    assert lines == ["hello"]
    hooks.run_hook("console.on_line", broken, "hello")
    assert "the console.on_line hook broken (" in machine.run().detail
