"""Hooks on ports and on MMIO addresses: a bus device in front of whatever is there."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pyvmm.api.hook_calls import REFUSE, Hook, HookCalls, Refusal, number
from pyvmm.board.bus import Bus, BusDevice
from pyvmm.startup.types import Record


class Access(Record):
    """One access of the guest to a port, or to an address without memory."""

    address: int
    """The port, or the guest physical address, of the first byte."""
    size: int
    """Bytes: 1, 2, 4 or 8."""
    is_write: bool
    value: int | None
    """The value that is written; None for a read."""
    vcpu: int
    """The index of the vCPU."""


class HookedPlace:
    """A BusDevice in front of ``entry``, a bus's entry: asks its hooks first.

    ``hooks`` are pairs: the addresses that a hook wants to see, and the hook.  An access belongs
    to its first address.
    """

    def __init__(
        self,
        name: str,
        entry: tuple[int, int, BusDevice] | None,
        hooks: tuple[tuple[range, Hook], ...],
        calls: HookCalls,
        vcpu_index: Callable[[], int],
    ) -> None:
        self._name = name
        self._entry = entry
        self._hooks = hooks
        self._calls = calls
        self._vcpu_index = vcpu_index

    def with_hook(self, addresses: range, hook: Hook) -> HookedPlace:
        """Return the same place with one more hook, to be asked last."""
        return HookedPlace(
            self._name, self._entry, (*self._hooks, (addresses, hook)), self._calls,
            self._vcpu_index,
        )

    def read(self, address: int, size: int) -> int:
        """Return the first hook's answer, or what the device behind answers."""
        answer = self._ask(address, size, None)
        all_ones = (1 << 8 * size) - 1
        if isinstance(answer, int):
            return answer
        entry = self._entry
        if answer is REFUSE or entry is None or address + size > entry[1]:
            return all_ones
        return entry[2].read(address - entry[0], size)

    def write(self, address: int, size: int, value: int) -> None:
        """Give the device behind ``value``, or what the first hook has in its place."""
        answer = self._ask(address, size, value)
        entry = self._entry
        if answer is REFUSE or entry is None or address + size > entry[1]:
            return
        entry[2].write(address - entry[0], size, answer if isinstance(answer, int) else value)

    def _ask(self, address: int, size: int, value: int | None) -> int | Refusal | None:
        hooks = [hook for addresses, hook in self._hooks if address in addresses]
        if not hooks:
            return None
        access = Access(
            address=address, size=size, is_write=value is not None, value=value,
            vcpu=self._vcpu_index(),
        )
        answer: int | Refusal | None = self._calls.ask(
            self._name, hooks, (access,), lambda answer: number(answer, size)
        )
        return answer


def put_hook(
    bus: Bus,
    granules: Iterable[int],
    addresses: range,
    hook: Hook,
    name: str,
    calls: HookCalls,
    vcpu_index: Callable[[], int],
) -> None:
    """Have ``hook`` asked on ``bus`` about ``addresses``, which lie in ``granules``.

    The bus is changed entry by entry, so a guest that runs sees the hook at each place at once.
    """
    made: dict[int, HookedPlace] = {}  # a place for each device, not for each granule

    def make(entry: tuple[int, int, BusDevice] | None) -> BusDevice:
        device = None if entry is None else entry[2]
        if id(device) not in made:
            if isinstance(device, HookedPlace):
                made[id(device)] = device.with_hook(addresses, hook)
            else:
                made[id(device)] = HookedPlace(
                    name, entry, ((addresses, hook),), calls, vcpu_index
                )
        return made[id(device)]

    bus.put_before(granules, make)
