"""One vCPU between two KVM_RUNs: port and memory accesses to devices, and how a vCPU ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from pyvmm.errors import KvmError
from pyvmm.kvm import abi
from pyvmm.kvm.exits import ExitReason, decode
from pyvmm.kvm.handles import Vcpu
from pyvmm.run.outcome import Outcome
from pyvmm.run.verdict import outcome_of_exit, outcome_of_failure, outcome_of_halt
from pyvmm.startup.types import Protocol, Record

RFLAGS_IF = 1 << 9
MMIO_GRANULE_BITS = 12
_NOT_STARTED = (abi.KVM_MP_STATE_UNINITIALIZED, abi.KVM_MP_STATE_INIT_RECEIVED)
"""Only another vCPU ends these states, by INIT or SIPI."""
_MASKS = tuple((1 << 8 * length) - 1 for length in range(9))


class Answers(Protocol):
    """The half of a device that takes accesses: see ``board.bus.BusDevice``."""

    def read(self, offset: int, size: int) -> int:
        """Return the value at ``offset``, ``size`` bytes wide."""

    def write(self, offset: int, size: int, value: int) -> None:
        """Take ``value`` at ``offset``."""


class AddressSpace(Protocol):
    """The part of ``board.bus.Bus`` that this loop needs."""

    find: Callable[[int], tuple[int, int, Answers] | None]

    def read(self, address: int, size: int) -> int:
        """Return what the guest reads."""

    def write(self, address: int, size: int, value: int) -> None:
        """Take what the guest writes."""


class Exits(Record):
    """Returns from KVM_RUN, counted by reason; ``other`` counts kicks and the end."""

    mmio: int = 0
    io: int = 0
    other: int = 0

    def __add__(self, more: Exits) -> Exits:
        return Exits(
            mmio=self.mmio + more.mmio, io=self.io + more.io, other=self.other + more.other
        )

    def __str__(self) -> str:
        return f"mmio {self.mmio}, io {self.io}, other {self.other}"


class VcpuLoop:
    """Runs one vCPU in the calling thread until ``stopping`` is set.

    ``mmio`` has granules of ``1 << MMIO_GRANULE_BITS`` addresses.  ``describe`` gives the vCPU's
    registers as text for an outcome's detail; ``finish`` takes the outcome if this vCPU decides it.
    Another thread stops the loop by setting ``stopping`` and then kicking the vCPU.  With
    ``inspect`` set, a kick makes the vCPU look whether the guest has halted.  After every kick the
    loop calls ``wait_while_paused``, which returns True if there was a pause.  ``vcpus.py`` does
    all that.

    ``machine`` has the loops of all vCPUs, once they run.  ``can_be_woken`` returns True if a
    device may wake a vCPU that has interrupts off.  ``at_end`` is called in the vCPU's thread when
    the vCPU has run for the last time.
    """

    def __init__(
        self,
        vcpu: Vcpu,
        *,
        pio: AddressSpace,
        mmio: AddressSpace,
        describe: Callable[[], str],
        finish: Callable[[Outcome], None],
        machine: Sequence[VcpuLoop] | None = None,
        at_end: Callable[[], None] = lambda: None,
        can_be_woken: Callable[[], bool] = lambda: False,
    ) -> None:
        self.vcpu = vcpu
        self.enter = vcpu.enter
        """KVM_RUN.  A hook may put a function of its own before it, until ``run`` is called."""
        self.answered_io = self.answered_mmio = 0
        """Exits that a hook's function has answered: ``run`` saw another reason."""
        self.thread_ident = 0
        """The thread in ``run``; 0 before."""
        self.stopping = False
        self.inspect = False
        self.wait_while_paused: Callable[[], bool] = lambda: False
        self.is_halted = False
        """True if the last look found that nothing in this vCPU will wake it."""
        self._machine = (self,) if machine is None else machine
        self._pio = pio
        self._mmio = mmio
        self._describe = describe
        self._finish = finish
        self._at_end = at_end
        self._can_be_woken = can_be_woken
        self.exits = Exits()
        """How often the guest was left in each ``run`` that has returned."""

    def run(self) -> None:
        """Enter the guest again and again."""
        # Bind every name of the loop here: an attribute would be looked up at every exit.
        vcpu, page, pio, mmio = self.vcpu, self.vcpu.page, self._pio, self._mmio
        enter, access, answer, masks = self.enter, page.access, page.set_mmio_data, _MASKS
        reason_io, reason_mmio = int(ExitReason.IO), int(ExitReason.MMIO)
        read_mmio, find = mmio.read, mmio.find
        every = ios = mmios = 0
        self.thread_ident = threading.get_ident()
        try:
            while not self.stopping:
                every += 1
                try:
                    enter()
                except InterruptedError:
                    # KVM completes a pending access before it returns: no access is lost here.
                    vcpu.clear_exit_request()
                    if self.inspect:
                        self.inspect = False
                        self._finish_if_halted()
                    if self.wait_while_paused():
                        vcpu.note_pause()
                    continue
                except BlockingIOError:
                    continue  # a processor that INIT or SIPI has just woken: now it runs
                except OSError as error:
                    self._fail(f"KVM_RUN: {error.strerror} [errno {error.errno}]")
                    return
                reason, address, data, length, is_write = access()
                if reason == reason_mmio:
                    mmios += 1
                    if is_write:
                        # Bus.write, without the call.
                        entry = find(address >> MMIO_GRANULE_BITS)
                        if entry is not None and address + length <= entry[1]:
                            entry[2].write(address - entry[0], length, data & masks[length])
                    else:
                        answer(read_mmio(address, length))
                elif reason == reason_io:
                    ios += 1
                    direction, size, port, count, offset = page.io()
                    for item in range(offset, offset + count * size, size):
                        if direction:
                            pio.write(port, size, page.get_int(item, size))
                        else:
                            page.set_int(item, size, pio.read(port, size))
                elif not self._rare_exit(reason):
                    return
        finally:
            self._at_end()
            ios, mmios = ios + self.answered_io, mmios + self.answered_mmio
            self.answered_io = self.answered_mmio = 0
            self.exits += Exits(mmio=mmios, io=ios, other=every - mmios - ios)

    def run_again(self) -> None:
        """Get ready for another ``run``, after one that has returned."""
        self.stopping = self.inspect = self.is_halted = False
        self.vcpu.clear_exit_request()

    def _rare_exit(self, reason: int) -> bool:
        """Return True if the vCPU may be entered again; else end the run."""
        if reason in (ExitReason.INTR, ExitReason.IRQ_WINDOW_OPEN):
            return True
        self._finish(outcome_of_exit(decode(self.vcpu.page), self._registers))
        return False

    def _fail(self, what: str) -> None:
        self._finish(outcome_of_failure(what, self._registers))

    def _registers(self) -> str:
        try:
            return self._describe()
        except KvmError as error:
            return f"no registers: {error}"

    def _finish_if_halted(self) -> None:
        """End the run if every vCPU sits in HLT with interrupts off, or was never started.

        Nothing will wake such vCPUs, unless a device or the PIT sends NMIs.  A single one proves
        nothing: another vCPU may be about to wake it, or Linux has left it behind while the last
        of its CPUs powers off.
        """
        state = self.vcpu.get_mp_state()
        self.is_halted = state in _NOT_STARTED or (
            state == abi.KVM_MP_STATE_HALTED
            and not self.vcpu.get_regs().rflags & RFLAGS_IF
            and not self.vcpu.pit_can_wake()
        )
        if all(loop.is_halted for loop in self._machine) and not self._can_be_woken():
            self._finish(outcome_of_halt())
