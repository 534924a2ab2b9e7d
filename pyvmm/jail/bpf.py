"""An assembler for the filters that seccomp(2) takes: classic BPF over one system call.

A filter is a graph of two kinds of nodes: ``Return`` ends with an action, ``Branch`` goes on to
one of two nodes.  Equal nodes are one in the assembled program.  So nobody places labels, and a
small table gives a small program, which the kernel loads sooner.

Source: Documentation/userspace-api/seccomp_filter.rst, <linux/seccomp.h>, <linux/filter.h>.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

INSTRUCTION = struct.Struct("=HBBI")
"""struct sock_filter: code, jt, jf, k."""
LONGEST_JUMP = 255

LOAD, AND, RETURN = 0x20, 0x54, 0x06
"""BPF_LD|W|ABS, BPF_ALU|AND|K, BPF_RET|K."""
IF_EQUAL, IF_AT_LEAST = 0x15, 0x35
"""BPF_JMP|JEQ|K, BPF_JMP|JGE|K."""

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


class Return(NamedTuple):
    """The end: the action of the filter."""

    action: int


class Branch(NamedTuple):
    """Loads, as ``(code, constant)``, then jumps to ``hit`` if any comparison of ``jumps`` holds.

    Goes on to ``miss`` if none does.  A jump is ``(code, constant)`` too.
    """

    loads: tuple[tuple[int, int], ...]
    jumps: tuple[tuple[int, int], ...]
    hit: Return | Branch
    miss: Return | Branch


Node = Return | Branch


class Program(NamedTuple):
    """An assembled filter: an array of struct sock_filter.

    The process's number, 32 bits wide, must be written at each of the offsets ``pid_places``.
    """

    data: bytes
    pid_places: tuple[int, ...]


class Condition(NamedTuple):
    """True if argument ``argument`` (0 to 5), of which only ``mask`` counts, is in ``values``.

    Only the lower 32 bits are looked at.  So it is good for arguments of 32 bits, and for flags of
    which Linux heeds none above them.
    """

    argument: int
    values: tuple[int, ...]
    mask: int = ALL_BITS


Alternatives = Sequence[Sequence[Condition]]
"""True if all conditions of any alternative are.  An empty alternative is always true."""


def decide(alternatives: Alternatives, otherwise: int) -> Node:
    """Return the node that allows by ``alternatives``, else ends with the action ``otherwise``."""
    node: Node = Return(otherwise)
    for conditions in reversed(_merged(alternatives)):
        hit: Node = Return(ALLOW)
        for condition in reversed(conditions):
            hit = _choose(condition, hit, node)
        node = hit
    return node


def _choose(condition: Condition, hit: Node, miss: Node) -> Node:
    # x86 is little-endian: the lower half of an argument is the first.
    loads = [(LOAD, ARGUMENTS_OFFSET + 8 * condition.argument)]
    if condition.mask != ALL_BITS:
        loads.append((AND, condition.mask))
    jumps = tuple((IF_EQUAL, value) for value in condition.values)
    return Branch(tuple(loads), jumps, hit, miss)


def _merged(alternatives: Alternatives) -> Alternatives:
    """Return ``alternatives``, those of one condition on the same bits of an argument made one."""
    values: dict[tuple[int, int], list[int]] = {}
    others: list[Sequence[Condition]] = []
    for conditions in alternatives:
        if not conditions:
            return [()]
        if len(conditions) == 1:
            (one,) = conditions
            values.setdefault((one.argument, one.mask), []).extend(one.values)
        else:
            others.append(conditions)
    single = [
        (Condition(argument, tuple(dict.fromkeys(found)), mask),)
        for (argument, mask), found in values.items()
    ]
    return [*single, *others]


def filter_of(decisions: Mapping[int, Node], *, first: Iterable[int] = ()) -> Node:
    """Return the filter that treats the system calls in ``decisions``, by number, as they say.

    It kills the process for every other number, and for every other architecture (32-bit code).
    The x32 ABI's numbers are above all others.  The numbers in ``first`` are looked for first.
    """
    killing = Return(KILL_PROCESS)
    pieces: list[tuple[int, Node]] = [(0, killing)]
    for number, node in sorted(decisions.items()):
        if number not in first:
            pieces += [(number, node), (number + 1, killing)]
    node = _search(_without_repeats(pieces))
    for number in first:
        node = Branch((), ((IF_EQUAL, number),), decisions[number], node)
    if isinstance(node, Branch):
        node = node._replace(loads=((LOAD, NUMBER_OFFSET),))
    is_ours = ((IF_EQUAL, AUDIT_ARCH_X86_64),)
    return Branch(((LOAD, ARCHITECTURE_OFFSET),), is_ours, node, killing)


def _without_repeats(pieces: Sequence[tuple[int, Node]]) -> list[tuple[int, Node]]:
    """Return ``pieces`` without those that are good for no number, or repeat the one before."""
    found: list[tuple[int, Node]] = []
    for first, node in pieces:
        if found and found[-1][0] == first:
            found.pop()
        if not found or found[-1][1] != node:
            found.append((first, node))
    return found


def _search(pieces: Sequence[tuple[int, Node]]) -> Node:
    """Return a balanced search of the system call's number, which is loaded.

    ``pieces`` are ascending ``(first number, node)``; each is good up to the next one.
    """
    if len(pieces) == 1:
        return pieces[0][1]
    middle = len(pieces) // 2
    return Branch(
        (), ((IF_AT_LEAST, pieces[middle][0]),), _search(pieces[middle:]), _search(pieces[:middle])
    )


def assemble(root: Node) -> Program:
    """Return the program that begins at ``root``; ValueError if a jump in it is too long."""
    places: dict[Node, int] = {}
    end = 0
    order = _in_order(root)
    for node in order:
        places[node] = end
        end += 1 if isinstance(node, Return) else len(node.loads) + len(node.jumps)
    data, pid_places = bytearray(), []
    for node in order:
        if isinstance(node, Return):
            data += INSTRUCTION.pack(RETURN, 0, 0, node.action)
            continue
        for code, constant in node.loads:
            data += INSTRUCTION.pack(code, 0, 0, constant)
        for code, constant in node.jumps:
            here = len(data) // INSTRUCTION.size
            is_last = here + 1 == places[node] + len(node.loads) + len(node.jumps)
            if_true = places[node.hit] - here - 1
            if_false = places[node.miss] - here - 1 if is_last else 0
            if max(if_true, if_false) > LONGEST_JUMP:
                raise ValueError(f"a jump over {max(if_true, if_false)} instructions is too long")
            if constant == OWN_PID:
                pid_places.append(len(data) + 4)
            data += INSTRUCTION.pack(code, if_true, if_false, constant)
    return Program(bytes(data), tuple(pid_places))


def _in_order(root: Node) -> list[Node]:
    """Return every node once, each before those it leads to: BPF jumps only forward."""
    found: dict[Node, None] = {}

    def visit(node: Node) -> None:
        if isinstance(node, Branch) and node not in found:
            visit(node.hit)
            visit(node.miss)
        found.setdefault(node)

    visit(root)
    return list(reversed(found))
