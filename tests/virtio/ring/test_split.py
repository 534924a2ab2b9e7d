"""Split rings, driven through the registers: bad inputs 18-42."""

from __future__ import annotations

import time

import pytest

from pyvmm.virtio.spec import Feature
from tests.support.patience import patient
from tests.support.rig import RAM_BYTES, Hooked, Rig
from tests.support.virtio_driver import (
    INDIRECT,
    NEXT,
    RAM_BASE,
    STATUS_POISON,
    WRITE,
    Descriptor,
    linked,
    readable,
    writable,
)
from tests.virtio.conftest import MakeRig

pytestmark = pytest.mark.usefixtures("both_paths")

RAM_END = RAM_BASE + RAM_BYTES
IN, FLUSH, GET_ID = 0, 4, 8
SIZE = 16


def flush_chain(rig: Rig) -> list[Descriptor]:
    """The two descriptors of a flush request."""
    driver = rig.driver
    return [readable(driver.header(FLUSH), 16), writable(driver.status_byte(), 1)]


def read_chain(rig: Rig, pieces: int) -> tuple[list[Descriptor], int, int]:
    """A read of sector 3 whose data is in ``pieces`` descriptors; data GPA, status GPA."""
    driver = rig.driver
    data, status = driver.alloc(512), driver.status_byte()
    chain = [readable(driver.header(IN, 3), 16)]
    chain += [writable(data + i, 1) for i in range(pieces - 1)]
    chain += [writable(data + pieces - 1, 512 - pieces + 1), writable(status, 1)]
    return chain, data, status


def assert_nothing_used(rig: Rig) -> None:
    assert rig.driver.reap() == []


def offer_at(rig: Rig, chain: list[Descriptor], head: int = 0) -> None:
    """``chain`` exactly as it is at index ``head``, offered and notified."""
    rig.driver.write_table(chain, head)
    rig.driver.offer(head)
    rig.driver.notify()


@pytest.mark.parametrize("ahead", [SIZE + 1, 0x7FFF, 0x8000, 0xFFFF])
def test_bad_input_18_avail_idx_ahead_of_the_queue_size(rig: Rig, ahead: int) -> None:
    rig.driver.write_table(linked(flush_chain(rig)))
    rig.memory.write_int(rig.driver.avail + 2, 2, ahead)
    rig.driver.notify()
    assert_nothing_used(rig)
    rig.assert_needs_reset()


def test_bad_input_20_avail_idx_wraps_at_65536(rig: Rig) -> None:
    driver = rig.driver
    get_id = [readable(driver.header(GET_ID), 16), writable(driver.status_byte(), 1)]
    for first in range(0, SIZE, 2):
        driver.write_table(linked(get_id, first), first)
    heads = list(range(0, SIZE, 2))
    for _ in range(65536 // 8 + 3):
        driver.offer(*heads)
        driver.notify()
        assert driver.reap() == [(head, 1) for head in heads]
    assert driver.avail_idx == 24
    assert not driver.needs_reset


@pytest.mark.parametrize("head", [SIZE, SIZE + 1, 0x7FFF, 0xFFFF])
def test_bad_input_21_avail_entry_beyond_the_table(rig: Rig, head: int) -> None:
    rig.driver.offer(head)
    rig.driver.notify()
    assert_nothing_used(rig)
    rig.assert_needs_reset()


def test_bad_input_22_same_head_twice_in_a_batch(rig: Rig) -> None:
    rig.driver.write_table(linked(flush_chain(rig)))
    rig.driver.offer(0, 0)
    rig.driver.notify()
    assert_nothing_used(rig)
    rig.assert_needs_reset()


def test_same_head_in_the_next_batch_is_served_again(rig: Rig) -> None:
    for _ in range(3):
        assert rig.driver.request(FLUSH).status == 0


def test_bad_input_24_idx_that_advances_during_the_pass(hooked: tuple[Rig, Hooked]) -> None:
    rig, backend = hooked
    driver = rig.driver
    for first in range(0, SIZE, 2):
        driver.write_table(linked(flush_chain(rig), first), first)
    flushes = 0

    def flush() -> None:
        nonlocal flushes
        flushes += 1
        driver.offer(2 * flushes % SIZE)  # another vCPU that never stops

    backend.flush = flush  # type: ignore[method-assign]
    driver.offer(0)
    assert rig.transport.service(0) == 0.0
    assert flushes == 1
    assert driver.reap() == [(0, 1)]
    for _ in range(5):
        assert rig.transport.service(0) == 0.0
    assert flushes == 6
    assert not driver.needs_reset


@pytest.mark.parametrize("following", [SIZE, SIZE + 1, 0xFFFF])
def test_bad_input_26_next_beyond_the_table(rig: Rig, following: int) -> None:
    header, status = flush_chain(rig)
    offer_at(rig, [header._replace(flags=NEXT, following=following), status])
    assert_nothing_used(rig)
    rig.assert_needs_reset()


@pytest.mark.parametrize("following", [SIZE, 2, 0xFFFF])
def test_bad_input_26_next_beyond_the_indirect_table(rig: Rig, following: int) -> None:
    header, status = flush_chain(rig)
    table = header._replace(flags=NEXT, following=following).pack() + status.pack()
    offer_at(rig, [Descriptor(rig.driver.put(table), 32, INDIRECT)])
    assert_nothing_used(rig)
    rig.assert_needs_reset()


def test_bad_input_27_descriptor_that_links_to_itself(rig: Rig) -> None:
    header, _ = flush_chain(rig)
    offer_at(rig, [header._replace(flags=NEXT, following=0)])
    assert_nothing_used(rig)
    rig.assert_needs_reset()


def test_bad_input_27_loop_of_two_in_an_indirect_table(rig: Rig) -> None:
    header, status = flush_chain(rig)
    table = linked([status, status._replace(flags=WRITE | NEXT, following=0)])
    gpa = rig.driver.put(b"".join(d.pack() for d in table))
    offer_at(rig, [header._replace(flags=NEXT, following=1), Descriptor(gpa, 32, INDIRECT)])
    assert_nothing_used(rig)
    rig.assert_needs_reset()


def test_bad_input_27_the_longest_loop_ends_in_time(new_rig: MakeRig) -> None:
    rig = new_rig(queue_size=1024)
    rig.driver.start()
    header, _ = flush_chain(rig)
    rig.driver.write_table(
        [header._replace(flags=NEXT, following=(i + 1) % 1024) for i in range(1024)]
    )
    rig.driver.offer(*range(1024))
    start = time.thread_time()
    rig.driver.notify()
    assert time.thread_time() - start < patient(0.1)
    assert_nothing_used(rig)
    rig.assert_needs_reset()


@pytest.mark.parametrize("indirect", [False, True])
def test_bad_input_29_chain_as_long_as_the_queue(rig: Rig, indirect: bool) -> None:
    chain, data, status = read_chain(rig, SIZE - 2)
    assert len(chain) == SIZE
    if indirect:
        chain = [rig.driver.indirect(chain)]
    assert rig.driver.ask(chain, status, data, 512) == (0, 513, b"\3" * 512)


def test_indirect_descriptor_may_end_a_direct_chain(rig: Rig) -> None:
    # 2.7.5.3.2: "zero or more normal chained descriptors followed by a single descriptor with
    # flags&VIRTQ_DESC_F_INDIRECT"; WRITE of that descriptor is ignored.
    chain, data, status = read_chain(rig, 2)
    rest = rig.driver.indirect(chain[1:])
    chain = [chain[0], rest._replace(flags=INDIRECT | WRITE)]
    assert rig.driver.ask(chain, status, data, 512) == (0, 513, b"\3" * 512)


def test_chains_of_any_order_in_the_table_are_followed(rig: Rig) -> None:
    chain, data, status = read_chain(rig, 1)
    at = [9, 2, 15]
    for place, following, descriptor in zip(at, [*at[1:], 0], chain, strict=True):
        flags = descriptor.flags | (NEXT if following else 0)
        rig.driver.write_table([descriptor._replace(flags=flags, following=following)], place)
    rig.driver.offer(9)
    rig.driver.notify()
    assert rig.driver.reap() == [(9, 513)]
    assert rig.memory.read(data, 512) == b"\3" * 512
    assert rig.memory.read_int(status, 1) == 0


@pytest.mark.parametrize("indirect", [False, True])
def test_bad_input_30_chain_longer_than_the_queue(rig: Rig, indirect: bool) -> None:
    driver = rig.driver
    chain, _, _ = read_chain(rig, SIZE - 1)
    assert len(chain) == SIZE + 1
    if indirect:
        offer_at(rig, [driver.indirect(chain)])
    else:  # sixteen direct ones, the last of them indirect: the only way to have more
        head = linked(chain[: SIZE - 1])
        tail = driver.indirect(chain[SIZE - 1 :])
        head[-1] = head[-1]._replace(flags=head[-1].flags | NEXT, following=SIZE - 1)
        offer_at(rig, [*head, tail])
    assert_nothing_used(rig)
    rig.assert_needs_reset()


def test_bad_input_30_more_descriptors_in_a_table_than_any_queue_has(new_rig: MakeRig) -> None:
    rig = new_rig()
    rig.driver.size = 2
    rig.driver.start()
    chain, _, _ = read_chain(rig, SIZE - 1)
    offer_at(rig, [rig.driver.indirect(chain)])
    assert_nothing_used(rig)
    assert rig.driver.needs_reset
    rig.driver.size = SIZE
    rig.assert_works()


@pytest.mark.parametrize("pieces", [1, 2])
def test_bad_input_32_indirect_that_was_not_negotiated(rig: Rig, pieces: int) -> None:
    rig.driver.start(int(Feature.VERSION_1))
    chain, _, status = read_chain(rig, pieces)
    offer_at(rig, [rig.driver.indirect(chain)])
    assert_nothing_used(rig)
    assert rig.memory.read_int(status, 1) == STATUS_POISON
    rig.assert_needs_reset()


def test_bad_input_33_indirect_with_next(rig: Rig) -> None:
    header, status = flush_chain(rig)
    indirect = rig.driver.indirect([header, status])
    offer_at(rig, [indirect._replace(flags=INDIRECT | NEXT, following=1), status])
    assert_nothing_used(rig)
    rig.assert_needs_reset()


def test_bad_input_34_indirect_in_indirect(rig: Rig) -> None:
    driver = rig.driver
    inner = driver.indirect(flush_chain(rig))
    offer_at(rig, [driver.indirect([inner])])
    assert_nothing_used(rig)
    rig.assert_needs_reset()


def test_bad_input_34_indirect_table_that_holds_itself(rig: Rig) -> None:
    gpa = rig.driver.alloc(48)
    myself = Descriptor(gpa, 48, INDIRECT)
    rig.memory.write(gpa, myself.pack() * 3)
    offer_at(rig, [myself])
    assert_nothing_used(rig)
    rig.assert_needs_reset()


@pytest.mark.parametrize("length", [0, 1, 15, 17, 47, 49, 0xFFFF_FFFF])
def test_bad_input_35_indirect_table_of_no_or_broken_length(rig: Rig, length: int) -> None:
    indirect = rig.driver.indirect(flush_chain(rig))
    offer_at(rig, [indirect._replace(length=length)])
    assert_nothing_used(rig)
    rig.assert_needs_reset()


@pytest.mark.parametrize("gpa", [0, RAM_END - 32, 2**64 - 16, 2**63])
def test_bad_input_35_indirect_table_outside_ram(rig: Rig, gpa: int) -> None:
    offer_at(rig, [Descriptor(gpa, 48, INDIRECT)])
    assert_nothing_used(rig)
    rig.assert_needs_reset()


def test_bad_input_35_indirect_table_below_ram_is_not_the_end_of_ram(rig: Rig) -> None:
    chain, _, status = read_chain(rig, 1)
    rig.memory.write(RAM_END - 48, b"".join(d.pack() for d in linked(chain)))
    offer_at(rig, [Descriptor(RAM_BASE - 48, 48, INDIRECT)])
    assert_nothing_used(rig)
    assert rig.memory.read_int(status, 1) == STATUS_POISON
    rig.assert_needs_reset()


@pytest.mark.parametrize("indirect", [False, True])
def test_bad_input_37_undefined_flag_bits_are_ignored(rig: Rig, indirect: bool) -> None:
    chain, data, status = read_chain(rig, 1)
    chain = [d._replace(flags=d.flags | 0xFFF8) for d in chain]
    if indirect:
        table = rig.driver.indirect(chain)
        chain = [table._replace(flags=table.flags | 0xFFF8)]
    assert rig.driver.ask(chain, status, data, 512) == (0, 513, b"\3" * 512)


def test_next_without_its_flag_is_ignored(rig: Rig) -> None:
    header, status = flush_chain(rig)
    chain = [header._replace(flags=NEXT, following=1), status._replace(following=0xFFFF)]
    offer_at(rig, chain)
    assert rig.driver.reap() == [(0, 1)]


def test_bad_input_38_readable_after_writable(rig: Rig) -> None:
    header, status = flush_chain(rig)
    offer_at(rig, linked([status, header]))
    assert_nothing_used(rig)
    assert rig.memory.read_int(status.gpa, 1) == STATUS_POISON
    rig.assert_needs_reset()


@pytest.mark.parametrize("flags", [0, WRITE])
def test_bad_input_39_empty_data_descriptors_are_skipped(rig: Rig, flags: int) -> None:
    chain, data, status = read_chain(rig, 2)
    empty = Descriptor(2**64 - 1, 0, flags)
    place = 1 if flags == 0 else 2
    chain[place:place] = [empty, empty]
    chain += [Descriptor(0, 0, WRITE)]  # even behind the status byte
    assert rig.driver.ask(chain, status, data, 512) == (0, 513, b"\3" * 512)


def assert_ioerr(rig: Rig, request_type: int, gpa: int, length: int) -> None:
    """A request with that data buffer is answered with IOERR and changes neither side."""
    driver = rig.driver
    disk = rig.disk
    status = driver.status_byte()
    header = driver.header(request_type)
    data = writable(gpa, length) if request_type == IN else readable(gpa, length)
    mark = bytes(rig.ram[0x1000:])
    answer = driver.ask([readable(header, 16), data, writable(status, 1)], status)
    assert answer == (1, 1, b"")
    assert bytes(rig.ram[0x1000:]) == mark
    assert rig.disk == disk
    assert not driver.needs_reset
    rig.assert_works()


@pytest.mark.parametrize("request_type", [0, 1])
def test_bad_input_40_data_of_2_to_the_32_minus_1_bytes(rig: Rig, request_type: int) -> None:
    assert_ioerr(rig, request_type, RAM_BASE, 2**32 - 1)


@pytest.mark.parametrize("request_type", [0, 1])
@pytest.mark.parametrize("gpa", [2**64 - 512, 2**64 - 256, 2**63])
def test_bad_input_41_data_address_that_wraps(rig: Rig, request_type: int, gpa: int) -> None:
    assert_ioerr(rig, request_type, gpa, 512)


@pytest.mark.parametrize("request_type", [0, 1])
@pytest.mark.parametrize("gpa", [RAM_END - 256, RAM_END, RAM_BASE - 256])
def test_bad_input_42_data_across_the_end_of_ram(rig: Rig, request_type: int, gpa: int) -> None:
    assert_ioerr(rig, request_type, gpa, 512)


def test_chains_served_before_a_malformed_one_are_returned(rig: Rig) -> None:
    driver = rig.driver
    chain, data, status = read_chain(rig, 1)
    driver.write_table(linked(chain))
    driver.write_table([Descriptor(0, 16, NEXT, 99)], 5)
    driver.offer(0, 5)
    driver.notify()
    assert driver.reap() == [(0, 513)]
    assert rig.memory.read(data, 512) == b"\3" * 512
    assert rig.memory.read_int(status, 1) == 0
    rig.assert_needs_reset()


def test_largest_queue_is_served_in_one_pass(new_rig: MakeRig) -> None:
    rig = new_rig(queue_size=1024)
    driver = rig.driver
    driver.start()
    header, status = flush_chain(rig)
    for head in range(0, 1024, 2):
        driver.write_table(linked([header, status], head), head)
    # From an odd place, so that the entries wrap around the ring.
    driver.offer(0)
    driver.notify()
    driver.reap()
    driver.offer(*range(0, 1024, 2))
    driver.notify()
    driver.offer(*range(0, 1024, 2))
    driver.notify()
    assert driver.reap() == [(head, 1) for head in range(0, 1024, 2)] * 2
    assert len(rig.irqs) == 3
