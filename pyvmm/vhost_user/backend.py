"""A device served to a vhost-user front end: carry out its requests, whatever their bytes are.

``ServedDevice`` owns everything that the front end shares (memory, rings, eventfds) and judges it;
``session`` handles the messages around it.  File descriptors stay the caller's: it keeps
duplicates.

The device is synchronous: a pass over a queue answers every request that it takes.  So a stopped
ring has nothing in flight, and the base that GET_VRING_BASE answers loses no request.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Protocol

from pyvmm.errors import GuestError, RingError
from pyvmm.peers.eventfds import EventfdWriter
from pyvmm.vhost_user.protocol import MAX_CONFIG_BYTES, PROTOCOL_FEATURES, MemoryRegion
from pyvmm.vhost_user.regions import PeerMemory, UnusableRegionError
from pyvmm.vhost_user.vring import RefusedError, Vring, check_eventfd
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.spec import Feature

# vhost-user has no message that resets one ring.  A front end that passes the bit on to its guest
# (QEMU does) would leave our ring running.
_NOT_OFFERED = int(Feature.RING_RESET)
USUAL_RING_SIZE = 128
"""Entries of a front end's rings, unless its user chooses: QEMU's and cloud-hypervisor's default.
QEMU's own back ends advise as many (``seg_max`` 126)."""
_NO_MEMORY = "none is shared (QEMU: -object memory-backend-memfd,share=on)"


class KickWatcher(Protocol):
    """Waits for the kicks of rings, and writes eventfds, for one thread."""

    @property
    def eventfd_writer(self) -> EventfdWriter:
        """Writes the front end's eventfds."""

    def watch(self, fd: int, serve: Callable[[], float | None]) -> None:
        """Call ``serve`` soon, and again whenever the eventfd ``fd`` was written.

        If ``serve`` returns a number, call it again after so many seconds, too.
        """

    def unwatch(self, fd: int) -> None:
        """Stop calling ``serve``."""


class _Calls:
    """The device's ``Interrupt``: the call eventfds of the rings.

    ``stuck`` is called when a front end makes a write to an eventfd wait.  From then on nothing
    more is written.
    """

    def __init__(
        self, vrings: Sequence[Vring], eventfd_writer: EventfdWriter, stuck: Callable[[], None]
    ) -> None:
        self._vrings = vrings
        self._signal = eventfd_writer.signal
        self._stuck = stuck
        self._is_stuck = False

    def notify_used(self, queue_index: int) -> None:
        """Write the ring's call eventfd, if the front end gave one."""
        self.tell(self._vrings[queue_index].call_fd)

    def tell(self, fd: int) -> None:
        """Make the eventfd ``fd`` readable; -1 stands for none."""
        if fd >= 0 and not self._is_stuck and not self._signal(fd):
            self._is_stuck = True
            self._stuck()

    def notify_config(self) -> None:
        """Do nothing: the disk's owner announces a change by ``Session.config_changed``."""


class ServedDevice:
    """``device``, made for one front end, and the memory and rings that the front end has set up.

    Each method is the request of that name.  RefusedError, or UnusableRegionError for a region, if
    the request cannot be done.  ``report`` takes a line about a ring that turns out malformed.
    ``stuck`` is called if the front end has made a write to one of its eventfds wait: its
    connection must end.
    """

    def __init__(
        self,
        device: VirtioDevice,
        kicks: KickWatcher,
        *,
        report: Callable[[str], None],
        stuck: Callable[[], None],
        trust_memory: bool = False,
    ) -> None:
        self._device = device
        # SET_VRING_NUM comes when the driver starts.  By then the front end has read the
        # configuration space, and some read it only once.
        device.expect_rings_of(USUAL_RING_SIZE)
        self._kicks = kicks
        self._report = report
        self._memory = PeerMemory(trust=trust_memory)
        self._vrings = [Vring(index) for index in range(len(device.queues))]
        self._calls = _Calls(self._vrings, kicks.eventfd_writer, stuck)

    def close(self) -> None:
        """Stop the rings and release everything that the front end shared; idempotent."""
        for vring in self._vrings:
            self._stop(vring)
            vring.close()
        self._device.reset()
        self._memory.close()

    # Features and the device as a whole

    @property
    def features(self) -> int:
        """GET_FEATURES: the bits that the device offers, and PROTOCOL_FEATURES."""
        return self._device.avail_features & ~_NOT_OFFERED | PROTOCOL_FEATURES

    @property
    def queue_num(self) -> int:
        """GET_QUEUE_NUM."""
        return len(self._vrings)

    def set_features(self, features: int) -> None:
        """SET_FEATURES."""
        if unoffered := features & ~self.features:
            raise RefusedError(f"bits {unoffered:#x} were not offered")
        wanted = features & ~PROTOCOL_FEATURES
        device = self._device
        # A front end may repeat the features whenever it starts; then the cache mode stays, too.
        if not device.is_activated or wanted != device.acked_features:
            for vring in self._vrings:
                if vring.is_running:
                    raise RefusedError(f"other features while ring {vring.index} runs")
            device.reset()
            try:
                device.set_acked_features(wanted)
            except GuestError as error:
                raise RefusedError(str(error)) from error
            device.activate(self._memory.memory, self._calls)
        if not features & PROTOCOL_FEATURES:
            # "If VHOST_USER_F_PROTOCOL_FEATURES has not been negotiated, the ring starts
            # directly in the enabled state."
            for vring in self._vrings:
                vring.enabled = True
                self._start(vring)

    def reset_owner(self) -> None:
        """RESET_OWNER, deprecated: "ignore this message, or use it to disable all rings"."""
        for vring in self._vrings:
            self._stop(vring)
            vring.enabled = False

    def reset_device(self) -> None:
        """RESET_DEVICE; only the memory and the err eventfds stay."""
        for vring in self._vrings:
            self._stop(vring)
            vring.forget()
            vring.close_fd("kick")
            vring.close_fd("call")
        self._device.reset()

    def get_config(self, offset: int, size: int) -> bytes:
        """GET_CONFIG."""
        if offset + size > MAX_CONFIG_BYTES:
            raise RefusedError(f"{size} bytes at {offset}, the end is at {MAX_CONFIG_BYTES}")
        return self._device.read_config(offset, size)

    def set_config(self, offset: int, data: bytes) -> None:
        """SET_CONFIG: "MUST NOT accept SET_CONFIG for read-only configuration space fields".

        If a field does not read as it was written, it is such a field, or cannot have that value.
        """
        before = self.get_config(offset, len(data))
        self._device.write_config(offset, data)
        if self._device.read_config(offset, len(data)) != data:
            self._device.write_config(offset, before)
            raise RefusedError(f"{len(data)} bytes at {offset} cannot be written, or not as that")

    # Memory

    def set_mem_table(self, table: Sequence[tuple[MemoryRegion, int]]) -> None:
        """SET_MEM_TABLE: regions and the file descriptors to map them from.

        "While processing the rings [...], the back-end must support changing some configuration
        aspects on the fly".  So running rings go on in the new table.  If the table is unusable, or
        one of the rings cannot, all go on in the old one.
        """
        running = [vring for vring in self._vrings if vring.is_running]
        for vring in running:
            self._stop(vring)

        def go_on() -> None:
            problems = self._restart(running)
            if problems:
                for vring in running:
                    self._stop(vring)
                raise RefusedError(problems[0])

        try:
            self._memory.replace(table, go_on)
        except (RefusedError, UnusableRegionError):
            # A ring can fail here only if the front end has written to it meanwhile.
            for problem in self._restart(running):
                self._report(f"{problem}; it stopped until it is set up anew")
            raise

    def _restart(self, vrings: Sequence[Vring]) -> list[str]:
        """Start each of ``vrings`` again; return the reasons of those that could not."""
        problems = []
        for vring in vrings:
            try:
                self._start(vring)
            except (RefusedError, OSError) as error:
                problems.append(str(error))
        return problems

    def add_mem_reg(self, region: MemoryRegion, fd: int) -> None:
        """ADD_MEM_REG."""
        self._memory.add(region, fd)

    def rem_mem_reg(self, region: MemoryRegion) -> None:
        """REM_MEM_REG."""
        for vring in self._vrings:
            for address in (vring.descriptor, vring.driver, vring.device):
                if vring.is_running and 0 <= address - region.user_address < region.size:
                    raise RefusedError(f"ring {vring.index}, which runs, is in that region")
        self._memory.remove(region)

    # Rings

    def set_vring_num(self, index: int, size: int) -> None:
        """SET_VRING_NUM."""
        vring = self._resting(index)
        limit = self._device.queue_max_sizes[index]
        if not 1 <= size <= limit:
            raise RefusedError(f"size {size} of ring {index} is not within 1 to {limit}")
        vring.size = size

    def set_vring_addr(self, index: int, *, descriptor: int, driver: int, device: int) -> None:
        """SET_VRING_ADDR; for a running ring only with the same addresses: some front ends
        repeat them."""
        vring = self._vring(index)
        addresses = (descriptor, driver, device)
        if addresses == (vring.descriptor, vring.driver, vring.device):
            return
        self._resting(index)
        for address in addresses:
            self._gpa(vring, address)
        vring.descriptor, vring.driver, vring.device = addresses

    def set_vring_base(self, index: int, base: int) -> None:
        """SET_VRING_BASE."""
        self._resting(index).base = base

    def get_vring_base(self, index: int) -> int:
        """GET_VRING_BASE: stop the ring and close its kick and call.

        It has answered every request that it has taken.
        """
        vring = self._vring(index)
        self._stop(vring)
        vring.close_fd("kick")
        vring.close_fd("call")
        return vring.base or 0

    def set_vring_kick(self, index: int, fd: int) -> None:
        """SET_VRING_KICK: start the ring, if it is enabled."""
        vring = self._vring(index)
        if fd < 0:
            raise RefusedError("no file descriptor, and this back end does not poll")
        check_eventfd(fd)
        if not vring.is_set_up:
            raise RefusedError(f"ring {index} has had no SET_VRING_NUM and SET_VRING_ADDR")
        self._stop(vring)
        vring.keep_fd("kick", fd)
        self._start(vring)

    def set_vring_call(self, index: int, fd: int) -> None:
        """SET_VRING_CALL; without an eventfd, used chains are not announced."""
        vring = self._vring(index)
        if fd >= 0:
            check_eventfd(fd)
        vring.keep_fd("call", fd)
        if vring.is_running:
            # Chains used before the eventfd came were announced to nobody.
            self._calls.tell(vring.call_fd)

    def set_vring_err(self, index: int, fd: int) -> None:
        """SET_VRING_ERR."""
        vring = self._vring(index)
        if fd >= 0:
            check_eventfd(fd)
        vring.keep_fd("err", fd)

    def set_vring_enable(self, index: int, enable: int) -> None:
        """SET_VRING_ENABLE."""
        vring = self._vring(index)
        vring.enabled = bool(enable)
        if enable:
            self._start(vring)
        else:
            self._stop(vring)

    def _vring(self, index: int) -> Vring:
        if index >= len(self._vrings):
            raise RefusedError(f"ring {index} of {len(self._vrings)}")
        return self._vrings[index]

    def _resting(self, index: int) -> Vring:
        """Return ring ``index``, which must not be running because it is about to be changed."""
        vring = self._vring(index)
        if vring.is_running:
            raise RefusedError(f"ring {index} runs")
        return vring

    def _gpa(self, vring: Vring, address: int) -> int:
        """Return the GPA of the user address ``address`` of ``vring``; RefusedError if it has
        none."""
        gpa = self._memory.gpa_of(address)
        if gpa is None:
            none = "" if self._memory.memory.regions else f"; {_NO_MEMORY}"
            raise RefusedError(
                f"ring {vring.index} at {address:#x}, which is in no memory region{none}"
            )
        return gpa

    def _start(self, vring: Vring) -> None:
        """Serve ``vring`` if it has a kick and is enabled; RefusedError if it is malformed."""
        if vring.is_running or vring.kick_fd < 0 or not vring.enabled:
            return
        if not self._device.is_activated:
            raise RefusedError(f"ring {vring.index} cannot start before SET_FEATURES")
        queue = self._device.queues[vring.index]
        queue.size = vring.size
        queue.descriptor_area = self._gpa(vring, vring.descriptor)
        queue.driver_area = self._gpa(vring, vring.driver)
        queue.device_area = self._gpa(vring, vring.device)
        queue.base = vring.queue_base(self._device.acked_features)
        try:
            self._device.start_queue(vring.index)
        except RingError as error:
            raise RefusedError(f"ring {vring.index}: {error}") from error
        try:
            self._kicks.watch(vring.kick_fd, functools.partial(self._serve, vring))
        except OSError:
            self._device.reset_queue(vring.index)
            raise
        vring.is_running = True

    def _stop(self, vring: Vring) -> None:
        """Stop serving ``vring``, and keep no view of its memory; idempotent."""
        if vring.is_running:
            vring.is_running = False
            self._kicks.unwatch(vring.kick_fd)
            vring.base = self._device.stop_queue(vring.index)
            self._device.reset_queue(vring.index)

    def _serve(self, vring: Vring) -> float | None:
        """Make one pass over ``vring``; see ``VirtioDevice.process_queue``."""
        try:
            return self._device.process_queue(vring.index)
        except RingError as error:
            problem = str(error)
        # Outside the handler, where the traceback no longer holds views of the ring.
        self._stop(vring)
        self._calls.tell(vring.err_fd)
        self._report(f"ring {vring.index} stopped until it is set up anew: {problem}")
        return None
