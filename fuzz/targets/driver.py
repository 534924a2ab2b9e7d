"""``pyvmm.driver`` and a wicked device: a configuration that lies, used rings that lie"""

from __future__ import annotations

import contextlib

from fuzz.checks import check_printable
from fuzz.source import Source
from fuzz.target import Target
from pyvmm.driver import DriverError
from pyvmm.driver.queue import MIN_QUEUE_SIZE
from pyvmm.errors import GuestMemoryError
from tests.support.driver_rigs import RING_KINDS, FakeRig, block_config, open_fds

_MOST_STEPS = 60


class DriverTarget(Target):
    """Every context comes back once, and only a DriverError is raised."""

    is_structured = True
    max_bytes = 1024

    def run(self, data: bytes) -> None:
        """Drive the device that ``data`` describes."""
        source = Source(data)
        before = open_fds()
        config = block_config(
            sectors=source.edge(64, 0), size_max=source.edge(4096, 0, 1, bits=32),
            seg_max=source.edge(4, 0, 1, 254, bits=32), num_queues=source.pick((2, 1, 0, 0xFFFF)),
            max_discard_sectors=source.edge(8, 0, bits=32),
            max_write_zeroes_sectors=source.edge(8, 0, bits=32),
        ) if source.chance(128) else b""
        size = source.pick((8, MIN_QUEUE_SIZE, 4, 16, 64, 0, 256, 257))
        with contextlib.suppress(DriverError), \
                FakeRig(source.pick(RING_KINDS), queue_size=size, config=config) as rig:
            _Case(source, rig).act()
        assert open_fds() == before, "descriptors were left behind"


class _Case:
    """A queue, and which contexts are under way."""

    def __init__(self, source: Source, rig: FakeRig) -> None:
        self._source = source
        self._rig = rig
        self._under_way: set[int] = set()
        self._next = 0

    def act(self) -> None:
        """Submit, lie, collect; in the end give up."""
        queue = self._rig.queue
        for _ in range(_MOST_STEPS):
            if not self._source.more:
                break
            try:
                self._step()
            except DriverError as error:
                check_printable(error)
        left = queue.abandon()
        assert set(left) == self._under_way, "contexts are missing, or came twice"
        assert queue.abandon() == []

    def _step(self) -> None:
        source, rig = self._source, self._rig
        match source.number(0, 7):
            case 0 | 1:
                self._submit()
            case 2 | 3:
                self._lie()
            case 4:
                for completion in rig.queue.completions():
                    assert completion.context in self._under_way, "it came twice"
                    self._under_way.remove(completion.context)
                    assert isinstance(completion.ret, int)
                    assert completion.ret <= 0
            case 5:
                rig.queue.avail_notif_needed()
            case 6:
                rig.queue.set_used_notif_enabled(source.chance(128))
            case 7:
                rig.transport.config = source.take(source.bits(6))
                rig.queue.refresh_capacity()

    def _submit(self) -> None:
        """One request; its context is under way once the call has returned."""
        source, rig, queue = self._source, self._rig, self._rig.queue
        context, self._next = self._next, self._next + 1
        view = rig.data.view
        offset = 512 * source.number(0, 64)
        length = 512 * source.number(0, 9)
        match source.number(0, 6):
            case 0:
                queue.read(offset, view[:length], context)
            case 1:
                cut = source.number(0, length)
                queue.writev(offset, [view[:cut], view[cut:length]], context)
            case 2:
                queue.flush(context)
            case 3:
                queue.discard(offset, length, context)
            case 4:
                queue.write_zeroes(offset, length, context, unmap=source.chance(128))
            case 5:
                queue.get_id(view[:20], context)
            case 6:
                address = source.edge(rig.data.address, rig.data.address + rig.data.length)
                queue.read_raw(offset, address, source.edge(512, 0, bits=33), context)
        self._under_way.add(context)

    def _lie(self) -> None:
        """The device writes the ring, as it should or otherwise."""
        source, rig = self._source, self._rig
        match source.number(0, 3):
            case 0:
                rig.put_used(source.edge(0, 1, rig.size - 1, rig.size, bits=32))
            case 1:
                rig.put_used_descriptor(source.number(0, rig.size - 1), source.bits(16) % 9,
                                        source.bits(1))
            case 2:
                base = source.pick((rig.layout.device, rig.layout.device, rig.layout.descriptor))
                piece = source.take(source.bits(4))
                with contextlib.suppress(GuestMemoryError):
                    rig.ram.write(base + source.bits(5), piece)
            case 3:  # anything, where the requests are
                piece = source.take(source.bits(6))
                with contextlib.suppress(GuestMemoryError):
                    rig.ram.write(rig.layout.descriptor + source.bits(12), piece)


def make() -> Target:
    """Return the target."""
    return DriverTarget()
