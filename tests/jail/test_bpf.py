"""The assembler of filters: every program does what the decisions say."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.jail import bpf
from pyvmm.jail.bpf import ALLOW, KILL_PROCESS, Condition, Return
from tests.support.bpf_interpreter import X86_64, run

I386, X32_BIT = 0x40000003, 1 << 30


def assembled(decisions: dict[int, bpf.Node], first: tuple[int, ...] = ()) -> bytes:
    return bpf.assemble(bpf.filter_of(decisions, first=first)).data


def test_all_that_is_not_decided_kills() -> None:
    program = assembled({})
    assert {run(program, number) for number in (0, 1, 300, 1 << 30, -1)} == {KILL_PROCESS}


def test_other_architectures_are_killed_whatever_is_allowed() -> None:
    program = assembled({4: Return(ALLOW)}, first=(4,))
    assert run(program, 4) == ALLOW
    assert run(program, 4, arch=I386) == KILL_PROCESS
    assert run(program, 4 | X32_BIT) == KILL_PROCESS


def test_the_kernel_sees_the_lower_half_of_an_argument() -> None:
    program = assembled({1: bpf.decide([[Condition(2, (5,))]], KILL_PROCESS)})
    assert run(program, 1, (0, 0, 5)) == ALLOW
    assert run(program, 1, (0, 0, 5 | 7 << 32)) == ALLOW
    assert run(program, 1, (0, 5, 0)) == KILL_PROCESS


def test_a_test_that_fails_may_refuse() -> None:
    refused = bpf.refuse_with(errno.EACCES)
    program = assembled({1: bpf.decide([[Condition(0, (5, 6))]], refused), 2: Return(refused)})
    assert [run(program, 1, (value,)) for value in (4, 5, 6)] == [refused, ALLOW, ALLOW]
    assert run(program, 2) == refused == 0x00050000 | 13


def test_equal_nodes_are_one() -> None:
    few = assembled({1: Return(ALLOW)})
    more = assembled({number: Return(ALLOW) for number in (1, 3, 5, 7)})
    # A comparison for each end of each range; the two actions stand there once.
    assert len(more) - len(few) == 6 * bpf.INSTRUCTION.size


def test_a_jump_that_is_too_long_is_an_error() -> None:
    nodes: dict[int, bpf.Node] = {
        number: bpf.decide([[Condition(0, tuple(range(number, number + 40)))]], KILL_PROCESS)
        for number in range(0, 60, 2)
    }
    with pytest.raises(ValueError, match="is too long"):
        assembled(nodes)


def test_the_places_of_the_pid_are_those_of_the_constant() -> None:
    node = bpf.decide([[Condition(0, (bpf.OWN_PID,)), Condition(1, (3,))]], KILL_PROCESS)
    program = bpf.assemble(bpf.filter_of({62: node}))
    (place,) = program.pid_places
    patched = bytearray(program.data)
    struct.pack_into("<I", patched, place, 1234)
    assert run(bytes(patched), 62, (1234, 3)) == ALLOW
    assert run(bytes(patched), 62, (1235, 3)) == KILL_PROCESS
    assert run(bytes(patched), 62, (bpf.OWN_PID, 3)) == KILL_PROCESS


WORDS = st.sampled_from((0, 1, 2, 3, 4, 7, 0x80000000, 0xFFFFFFFF))
CONDITIONS = st.builds(
    Condition, st.integers(0, 2), st.lists(WORDS, min_size=1, max_size=4).map(tuple),
    st.sampled_from((0xFFFFFFFF, 4, 0xFF)),
)
ALTERNATIVES = st.lists(st.lists(CONDITIONS, max_size=3), max_size=4)
NUMBERS = st.integers(0, 40)


def holds(condition: Condition, arguments: tuple[int, ...]) -> bool:
    return arguments[condition.argument] & condition.mask & 0xFFFFFFFF in condition.values


@settings(deadline=None)
@given(
    table=st.dictionaries(NUMBERS, st.tuples(ALTERNATIVES, st.sampled_from(
        (KILL_PROCESS, bpf.refuse_with(1))
    )), max_size=12),
    first=st.lists(NUMBERS, max_size=2, unique=True), number=st.integers(0, 42),
    arguments=st.tuples(WORDS, WORDS, WORDS), arch=st.sampled_from((X86_64, X86_64, I386)),
)
def test_a_program_does_what_its_alternatives_say(
    table: dict[int, tuple[list[list[Condition]], int]], first: list[int], number: int,
    arguments: tuple[int, int, int], arch: int,
) -> None:
    program = assembled(
        {number: bpf.decide(*decision) for number, decision in table.items()},
        tuple(number for number in first if number in table),
    )
    expected = KILL_PROCESS
    if number in table and arch == X86_64:
        alternatives, expected = table[number]
        if any(all(holds(one, arguments) for one in conditions) for conditions in alternatives):
            expected = ALLOW
    assert run(program, number, arguments, arch=arch) == expected
