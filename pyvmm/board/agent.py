"""The port of an agent in the guest, whose device is imported only if it is asked for."""

from __future__ import annotations

from pyvmm.board.board import Board
from pyvmm.config import RunConfig
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from pyvmm.virtio.port.device import PortDevice


def plug_agent_port(board: Board, config: RunConfig) -> PortDevice | None:
    """Plug the port of an agent into ``board`` if there may be one; return its device."""
    if config.agent == "none":
        return None
    from pyvmm.virtio.port.device import PortDevice

    port = PortDevice()
    board.plug(port, "agent")
    return port
