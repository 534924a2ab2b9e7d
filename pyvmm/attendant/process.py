"""An attendant's process, once it is awake: from its descriptors to its end."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable
from socket import AF_UNIX, SOCK_SEQPACKET, socket

from pyvmm.attendant.beginning import Beginning
from pyvmm.attendant.death import ending_signal, restore_terminal, tell
from pyvmm.attendant.duties import Duties
from pyvmm.attendant.messages import MAX_BEGIN_BYTES
from pyvmm.attendant.server import Server
from pyvmm.attendant.start import Kept
from pyvmm.jail.privileges import FILE_CAPABILITIES, drop_capabilities, no_new_privileges
from pyvmm.jail.root import User
from pyvmm.vhost_user.socket_name import SocketName


def attend(
    make_duties: Callable[[Beginning, SocketName | None], Duties], *, version: str
) -> None:
    """Serve the machine to its end.  ``make_duties`` returns what may be done for it.

    ``version`` is pyvmm's.  A machine that another version has started is not served.

    The last arguments of the process are the word that woke it, "" if the machine's process has
    ended, and that process's state then.
    """
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))  # the shell's was for the shell
    os.closerange(max(Kept) + 1, os.sysconf("SC_OPEN_MAX"))
    connection = socket(AF_UNIX, SOCK_SEQPACKET, 0, Kept.CHANNEL)
    try:
        beginning = Beginning.read(connection.recv(MAX_BEGIN_BYTES))
    except ValueError:
        return  # pyvmm was upgraded while the guest ran
    if beginning.version != version:
        return
    _give_up_rights(beginning)
    name = None
    if beginning.socket_name:
        name = SocketName(
            Kept.DIRECTORY, beginning.socket_name, beginning.socket_device, beginning.socket_inode
        )
    duties = make_duties(beginning, name)
    server = Server(connection, duties)
    has_said_so = server.serve()
    if not has_said_so:
        word, state = sys.argv[-2:]
        if not beginning.is_silent:
            _clear_up(beginning, b"" if word else os.fsencode(state))
    server.close()
    if name is not None:
        name.remove()
    if has_said_so:
        duties.tidy()


def _give_up_rights(beginning: Beginning) -> None:
    """Keep what files need of the user's rights, or those of ``--user``; OSError, ConfigError.

    Whoever takes over the machine may try us next.
    """
    no_new_privileges()
    if beginning.uid >= 0:
        User(beginning.uid, beginning.gid, str(beginning.uid)).become()
    drop_capabilities(kept=FILE_CAPABILITIES if beginning.uid < 0 else 0)


def _clear_up(beginning: Beginning, first_state: bytes) -> None:
    """Do what the machine's process would have done, had it not been killed."""
    number = ending_signal(first_state, Kept.STATE, Kept.PROCESS)
    terminal_fd = -1
    if beginning.terminal:
        terminal_fd = Kept.TERMINAL
        restore_terminal(terminal_fd, beginning.terminal)
    tell(number, terminal_fd=terminal_fd)
