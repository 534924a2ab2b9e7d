"""Hooks on exits: a function before KVM_RUN, which shows each exit before a device sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pyvmm.api.hook_calls import BadAnswerError, Hook, HookCalls, Refusal, number
from pyvmm.kvm.exits import (
    EXIT_REASON_WORD,
    Direction,
    Exit,
    ExitReason,
    IoExit,
    MmioExit,
    decode,
)
from pyvmm.run.vcpu_loop import VcpuLoop

_NO_EXITS = (ExitReason.INTR, ExitReason.IRQ_WINDOW_OPEN)
"""KVM has returned without anything to do."""


def hooked_enter(
    loop: VcpuLoop, index: int, hooks: Sequence[Hook], calls: HookCalls
) -> Callable[[], None]:
    """Return a function in place of ``loop.enter``, for vCPU ``index``: it asks ``hooks``.

    An exit that is answered looks to the loop as if KVM had had nothing to say: KVM takes the
    answer from the run page when it is entered again, and never looks at the reason in it.
    """
    enter, page = loop.enter, loop.vcpu.page

    def enter_and_ask() -> None:
        enter()
        if page.exit_reason in _NO_EXITS:
            return
        seen = decode(page)
        answer = calls.ask("on_exit", hooks, (index, seen), lambda given: _judge(seen, given))
        if answer is None:
            return
        if isinstance(seen, IoExit):
            if _answer_io(loop, seen, answer):
                loop.answered_io += 1
                page.words[EXIT_REASON_WORD] = ExitReason.INTR
        elif isinstance(seen, MmioExit) and _answer_mmio(loop, seen, answer):
            loop.answered_mmio += 1
            page.words[EXIT_REASON_WORD] = ExitReason.INTR

    return enter_and_ask


def _judge(seen: Exit, answer: object) -> int | Refusal:
    if isinstance(seen, IoExit):
        return number(answer, seen.size)
    if isinstance(seen, MmioExit):
        return number(answer, seen.length)
    raise BadAnswerError(
        f"answered an exit that asks nothing ({seen}): there it may only return None"
    )


def _answer_io(loop: VcpuLoop, seen: IoExit, answer: int | Refusal) -> bool:
    """Answer a port access; False if a device still has to take what is written."""
    is_refused = isinstance(answer, Refusal)
    if seen.direction == Direction.OUT and is_refused:
        return True
    value = (1 << 8 * seen.size) - 1 if isinstance(answer, Refusal) else answer
    for item in range(seen.count):
        loop.vcpu.page.set_int(seen.data_offset + item * seen.size, seen.size, value)
    return seen.direction == Direction.IN


def _answer_mmio(loop: VcpuLoop, seen: MmioExit, answer: int | Refusal) -> bool:
    """Answer a memory access; False if a device still has to take what is written."""
    if isinstance(answer, Refusal):
        if not seen.is_write:
            loop.vcpu.page.set_mmio_data((1 << 64) - 1)
        return True
    loop.vcpu.page.set_mmio_data(answer)
    return not seen.is_write
