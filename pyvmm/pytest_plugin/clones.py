"""The booted guests of a session that were saved once, from which each test gets a clone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from pyvmm.errors import PyvmmError
from pyvmm.launcher.vm import Vm, VmSnapshot
from pyvmm.pytest_plugin.guests import Guests
from pyvmm.pytest_plugin.plan import Plan


class Origins:
    """Boots a guest for each plan, once, has ``prepare`` prepare it, and saves it.

    ``guests`` are those guests, which end as soon as they are saved: their disks and RAM are the
    clones' from then on.  ``close`` removes what was saved.
    """

    def __init__(self, guests: Guests) -> None:
        self._guests = guests
        self._snapshots: dict[tuple[str, object], VmSnapshot] = {}
        self._failures: dict[tuple[str, object], BaseException] = {}

    def snapshot(
        self, plan: Plan, nodeid: str, prepare: Callable[[Vm], object]
    ) -> VmSnapshot:
        """Return the snapshot for ``plan``; the first test that asks waits for the boot.

        A boot or a ``prepare`` that has failed is not tried again: each test gets its error.
        """
        key = plan.key, prepare
        if key in self._failures:
            raise self._failures[key].with_traceback(None)
        if key not in self._snapshots:
            try:
                self._snapshots[key] = self._make(plan, nodeid, prepare)
            except Exception as error:
                self._failures[key] = error
                raise
        return self._snapshots[key]

    def close(self) -> None:
        """Remove all that was saved."""
        while self._snapshots:
            self._snapshots.popitem()[1].close()
        self._failures.clear()

    def _make(self, plan: Plan, nodeid: str, prepare: Callable[[Vm], object]) -> VmSnapshot:
        guest = self._guests.boot(plan, nodeid)
        try:
            prepare(guest.vm)
            if (error := guest.untold()) is not None:
                raise error
            return guest.vm.snapshot()
        finally:
            # Its verdict, if there is one, was raised above.
            with contextlib.suppress(PyvmmError):
                guest.close()
            self._guests.forget(guest)
