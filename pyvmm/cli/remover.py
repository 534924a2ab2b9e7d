"""The attendant of an export: a process that removes the socket's name at the end."""

from __future__ import annotations

import pyvmm
from pyvmm.attendant.beginning import Beginning
from pyvmm.attendant.start import start
from pyvmm.cli.attended import PROGRAM
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from pyvmm.attendant.client import Attendant
    from pyvmm.vhost_user.socket_name import SocketName


def remover_of(name: SocketName) -> Attendant:
    """Return an attendant that only removes the socket ``name`` at the end; HostError."""
    try:
        beginning = Beginning(
            version=pyvmm.__version__, bundle="", kernel="", socket_name=name.name,
            socket_device=name.device, socket_inode=name.inode,
        )
        return start(beginning, program=PROGRAM, directory_fd=name.directory_fd)
    finally:
        name.close()
