"""The agent's two needs of a machine: a port, and for one that is brought in an initramfs.

Nothing is imported for either unless it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable

from pyvmm.board.board import Board
from pyvmm.config import RunConfig
from pyvmm.memory import GuestMemory
from pyvmm.startup.types import TYPE_CHECKING
from pyvmm.x86.image import Kernel
from pyvmm.x86.loader import load_initrd

if TYPE_CHECKING:
    from pyvmm.virtio.port.device import PortDevice


def load_initrd_of(
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


def plug_agent_port(board: Board, config: RunConfig) -> PortDevice | None:
    """Plug the port of an agent into ``board`` if there may be one; return its device."""
    if config.agent == "none":
        return None
    from pyvmm.virtio.port.device import PortDevice

    port = PortDevice()
    board.plug(port, "agent")
    return port
