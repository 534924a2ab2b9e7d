"""An assembler for the filters that seccomp(2) takes: classic BPF over one system call.

A piece of code is a list of instructions in which every path returns.  So pieces are put together
without labels: a test is followed by the piece for one answer, then by the piece for the other
one.  Source: Documentation/userspace-api/seccomp_filter.rst, <linux/seccomp.h>, <linux/filter.h>.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

INSTRUCTION = struct.Struct("=HBBI")
"""struct sock_filter: code, jt, jf, k."""
MAX_INSTRUCTIONS = 4096
"""BPF_MAXINSNS."""
_LONGEST_JUMP = 255

LOAD, JUMP, JUMP_IF_EQUAL, JUMP_IF_AT_LEAST, AND, RETURN = 0x20, 0x05, 0x15, 0x35, 0x54, 0x06
"""BPF_LD|W|ABS, BPF_JMP|JA, BPF_JMP|JEQ|K, BPF_JMP|JGE|K, BPF_ALU|AND|K, BPF_RET|K."""

# struct seccomp_data.
NUMBER_OFFSET, ARCHITECTURE_OFFSET, ARGUMENTS_OFFSET = 0, 4, 16
DATA_BYTES = 64

AUDIT_ARCH_X86_64 = 0xC000_003E

KILL_PROCESS = 0x8000_0000
ALLOW = 0x7FFF_0000
ALL_BITS = 0xFFFF_FFFF
OWN_PID = 0x7FFF_FFFE
"""Stands for the process's own number, which ``seccomp.enter`` fills in.  No process has it: Linux
numbers processes below 2^22."""


def refuse_with(error: int) -> int:
    """Return the action that has a system call fail with ``error``, an errno."""
    return 0x0005_0000 | error


class Instruction(NamedTuple):
    """One struct sock_filter."""

    code: int
    constant: int = 0
    if_true: int = 0
    if_false: int = 0


Code = list[Instruction]


class Test(NamedTuple):
    """True if argument ``argument`` (0 to 5), of which only ``mask`` counts, is in ``values``.

    Only the lower 32 bits are looked at.  So a test is good for arguments of 32 bits, and for flags
    of which Linux heeds none above them.
    """

    argument: int
    values: tuple[int, ...]
    mask: int = ALL_BITS


Alternatives = Sequence[Sequence[Test]]
"""Allowed if all tests of any of them are true.  An empty alternative is always true."""


def returns(action: int) -> Code:
    """Return the code that ends with ``action``."""
    return [Instruction(RETURN, action)]


def choose(test: Test, hit: Code, miss: Code) -> Code:
    """Return the code that goes on with ``hit`` if ``test`` is true, else with ``miss``."""
    offset = ARGUMENTS_OFFSET + 8 * test.argument  # x86 is little-endian: the lower half is first
    code = [Instruction(LOAD, offset)]
    if test.mask != ALL_BITS:
        code.append(Instruction(AND, test.mask))
    *others, last = test.values
    rest = _branch(JUMP_IF_EQUAL, last, hit, miss, longest=_LONGEST_JUMP - len(others))
    to_hit = len(others) + rest[0].if_true
    code += [
        Instruction(JUMP_IF_EQUAL, value, if_true=to_hit - at) for at, value in enumerate(others)
    ]
    return code + rest


def merged(alternatives: Alternatives) -> Alternatives:
    """Return ``alternatives``, those of one test on the same bits of an argument made one."""
    values: dict[tuple[int, int], list[int]] = {}
    others: list[Sequence[Test]] = []
    for tests in alternatives:
        if not tests:
            return [()]
        if len(tests) == 1:
            values.setdefault((tests[0].argument, tests[0].mask), []).extend(tests[0].values)
        else:
            others.append(tests)
    return [
        *((Test(argument, tuple(dict.fromkeys(found)), mask),)
          for (argument, mask), found in values.items()),
        *others,
    ]


def decide(alternatives: Alternatives, otherwise: int) -> Code:
    """Return the code that allows by ``alternatives``, or ends with ``otherwise``."""
    code = returns(otherwise)
    for tests in reversed(alternatives):
        hit = returns(ALLOW)
        for test in reversed(tests):
            hit = choose(test, hit, code)
        code = hit
    return code


def search(pieces: Sequence[tuple[int, Code]]) -> Code:
    """Return a balanced search of the system call's number, which is loaded.

    ``pieces`` are ascending ``(first number, code)``, from 0 on; each is good up to the next one.
    """
    if len(pieces) == 1:
        return pieces[0][1]
    middle = len(pieces) // 2
    return _branch(
        JUMP_IF_AT_LEAST, pieces[middle][0], search(pieces[middle:]), search(pieces[:middle])
    )


def _branch(
    code: int, constant: int, hit: Code, miss: Code, *, longest: int = _LONGEST_JUMP
) -> Code:
    """Return a jump with the piece for each answer, over ``longest`` instructions at most.

    The shorter piece comes first.
    """
    if len(miss) <= min(len(hit), longest):
        return [Instruction(code, constant, if_true=len(miss)), *miss, *hit]
    if len(hit) <= longest:
        return [Instruction(code, constant, if_false=len(hit)), *hit, *miss]
    far = Instruction(JUMP, len(hit))
    return [Instruction(code, constant, if_true=1), far, *hit, *miss]


def program(decisions: Mapping[int, Code], *, often: Sequence[int] = ()) -> Code:
    """Return the filter that treats the system calls in ``decisions``, by number, as they say.

    It kills the process for every other number, and for every other architecture (32-bit code).
    The numbers of the x32 ABI are above all others.  ``often`` are looked for first.
    """
    killing = returns(KILL_PROCESS)
    pieces: list[tuple[int, Code]] = [(0, killing)]
    for number, code in sorted(decisions.items()):
        if number not in often:
            pieces += [(number, code), (number + 1, killing)]
    code = search(_without_repeats(pieces))
    for number in reversed(often):
        code = _branch(JUMP_IF_EQUAL, number, decisions[number], code)
    whole = [
        Instruction(LOAD, ARCHITECTURE_OFFSET),
        Instruction(JUMP_IF_EQUAL, AUDIT_ARCH_X86_64, if_true=1),
        *killing,
        Instruction(LOAD, NUMBER_OFFSET),
        *code,
    ]
    if len(whole) > MAX_INSTRUCTIONS:
        raise ValueError(f"a filter of {len(whole)} instructions: {MAX_INSTRUCTIONS} is the limit")
    return whole


def _without_repeats(pieces: Sequence[tuple[int, Code]]) -> list[tuple[int, Code]]:
    """Return ``pieces`` without those that are good for no number, or repeat the one before."""
    found: list[tuple[int, Code]] = []
    for first, code in pieces:
        if found and found[-1][0] == first:
            found.pop()
        if not found or found[-1][1] != code:
            found.append((first, code))
    return found


def assemble(code: Code) -> bytes:
    """Return the bytes of ``code``; struct.error if a jump is too long."""
    return b"".join(
        INSTRUCTION.pack(one.code, one.if_true, one.if_false, one.constant) for one in code
    )


def places_of_pid(code: Code) -> tuple[int, ...]:
    """Return the offsets in the assembled ``code`` at which OWN_PID must be filled in."""
    return tuple(
        at * INSTRUCTION.size + 4
        for at, one in enumerate(code)
        if (one.code, one.constant) == (JUMP_IF_EQUAL, OWN_PID)
    )
