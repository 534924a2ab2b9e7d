"""The boot timer: marks with their times, and the lines of ``pyvmm run --timing``."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from pyvmm.devices.boot_timer import BootTimer, Mark, Stage, timing_lines


def test_marks_are_kept_with_their_times() -> None:
    times = iter([1.5, 2.5])
    timer = BootTimer(lambda: next(times))
    timer.write(0, 1, Stage.INIT)
    timer.write(0, 1, 0x80)
    assert timer.marks == (Mark(Stage.INIT, 1.5), Mark(0x80, 2.5))
    assert timer.dropped == 0


def test_times_are_those_of_the_kernels_clock() -> None:
    before_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    timer = BootTimer()
    timer.write(0, 1, 7)
    assert before_s <= timer.marks[0].at_s <= time.clock_gettime(time.CLOCK_BOOTTIME)


def test_a_guest_that_marks_for_ever_fills_nothing() -> None:
    timer = BootTimer()
    for _ in range(1000):
        timer.write(0, 1, 9)
    assert len(timer.marks) == BootTimer.MAX_MARKS
    assert timer.dropped == 1000 - BootTimer.MAX_MARKS


def test_it_reads_as_nothing_does() -> None:
    assert BootTimer().read(0, 1) == 0xFF


def test_the_stages_of_a_run() -> None:
    marks = [Mark(1, 10.75), Mark(0x80, 10.8), Mark(2, 10.875), Mark(3, 12.875)]
    assert timing_lines(marks, process_start_s=10.0, guest_start_s=10.25, end_s=13.0) == [
        "start-up       0.250 s, from 0.000 s",
        "kernel         0.500 s, from 0.250 s",
        "init           0.125 s, from 0.750 s",
        "user space     2.000 s, from 0.875 s",
        "shutdown       0.125 s, from 2.875 s",
        "mark 128   at 0.800 s",
        "total          3.000 s",
    ]


def test_a_guest_that_marks_nothing_was_in_its_kernel_all_along() -> None:
    assert timing_lines([], process_start_s=0.0, guest_start_s=0.5, end_s=2.5) == [
        "start-up       0.500 s, from 0.000 s",
        "kernel         2.000 s, from 0.500 s",
        "total          2.500 s",
    ]


@given(values=st.lists(st.integers(0, 0xFF), max_size=BootTimer.MAX_MARKS))
def test_any_marks_in_any_order_give_one_line_each(values: list[int]) -> None:
    timer = BootTimer(lambda: 1.0)
    for value in values:
        timer.write(0, 1, value)
    lines = timing_lines(timer.marks, process_start_s=0.0, guest_start_s=0.5, end_s=2.0)
    assert len(lines) == len(values) + 3
