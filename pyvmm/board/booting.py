"""The steps of the recipe that boot a kernel.  A machine of a snapshot imports none of this."""

from __future__ import annotations

from collections.abc import Callable

from pyvmm.board.board import Board
from pyvmm.board.describe import describe
from pyvmm.config import RunConfig
from pyvmm.kvm.handles import Vcpu
from pyvmm.memory import GuestMemory
from pyvmm.x86 import cpu
from pyvmm.x86.image import Kernel
from pyvmm.x86.loader import load_initrd, load_kernel


class Boot:
    """The kernel and initrd of ``config``, loaded into ``memory``.  ConfigError, HostError."""

    def __init__(
        self, config: RunConfig, memory: GuestMemory, report: Callable[[str], None]
    ) -> None:
        self._config = config
        self._memory = memory
        self.kernel = load_kernel(memory, config.kernel)
        self._initrd = _load_initrd(config, memory, self.kernel, report)

    def describe(self, board: Board) -> None:
        """Tell the guest of its machine: see ``describe``."""
        describe(board, self._config, self.kernel, self._initrd)

    def set_up(self, vcpu: Vcpu) -> None:
        """Give the first vCPU the state in which the kernel is entered."""
        # The others wait, in the kernel, for the first one's INIT and SIPI.
        cpu.setup_boot(self._memory, vcpu, self.kernel)


def _load_initrd(
    config: RunConfig, memory: GuestMemory, kernel: Kernel, report: Callable[[str], None]
) -> tuple[int, int] | None:
    """Load the initrd of ``config``, with the agent in front if it has to be brought in.

    Return its ``(gpa, size in bytes)``, None if there is none.  ConfigError, HostError.
    """
    if config.agent == "inject":
        from pyvmm.linux.injection import inject

        injection = inject(config.kernel, kernel.version, config.initrd, report)
        return load_initrd(memory, injection.initrd, kernel, front=injection.front)
    return load_initrd(memory, config.initrd, kernel) if config.initrd is not None else None
