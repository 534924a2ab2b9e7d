"""An attendant that does one thing: at the end it removes the name of a socket."""

from __future__ import annotations

import pyvmm
from pyvmm.attendant.beginning import Beginning
from pyvmm.attendant.start import start
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from pyvmm.attendant.remote import RemoteAttendant
    from pyvmm.vhost_user.socket_name import SocketName


def remover_of(
    name: SocketName, program: str, *, is_silent: bool = False
) -> RemoteAttendant:
    """Return an attendant, of ``program``, that only removes the socket ``name``; HostError.

    With ``is_silent`` it does not tell how the machine has ended.
    """
    try:
        beginning = Beginning(
            version=pyvmm.__version__, bundle="", kernel="", socket_name=name.name,
            socket_device=name.device, socket_inode=name.inode, is_silent=is_silent,
        )
        return start(beginning, program=program, directory_fd=name.directory_fd)
    finally:
        name.close()
