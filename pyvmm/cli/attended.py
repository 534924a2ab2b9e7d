"""A command line's machine and its attendant (``attendant/``): all that comes after the guest.

A machine that is not in a jail does the same itself.
"""

from __future__ import annotations

import os

import pyvmm
from pyvmm.config import DiskConfig
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from types import SimpleNamespace

    from pyvmm.attendant.client import Attendant
    from pyvmm.attendant.start import Sleeper
    from pyvmm.config import RunConfig
    from pyvmm.control.run_control import RunControl
    from pyvmm.jail.root import User
    from pyvmm.machine import Machine
    from pyvmm.startup.bundle import Bundle

PROGRAM = "pyvmm.cli.attending"
SCRATCH_FILES_PER_DISK = 8
SCRATCH_FILES_OF_CLIENTS = 1 << 16
"""A client may take that many checkpoints; each may need a nameless file."""


class Attendance:
    """The attendant that ``args``, the options of a command line, call for."""

    def __init__(self, args: SimpleNamespace) -> None:
        self._has_clients = args.control is not None or args.control_fd is not None
        self._snapshot_path: str | None = getattr(args, "snapshot", None)
        self.saves = self._has_clients or self._snapshot_path is not None
        """True if the machine may be saved while it runs."""
        self._has_input = args.console == "stdio"
        self._can_sleep = args.control is None
        self._sleeper: Sleeper | None = None

    def prepare(self) -> None:
        """Start a jailed machine's attendant, which has not been built; HostError.

        One that must have the control socket's name is not started yet.
        """
        if self._can_sleep:
            from pyvmm.attendant.start import Sleeper

            self._sleeper = Sleeper(PROGRAM, input_fd=0 if self._has_input else None)

    def close(self) -> None:
        """Let an attendant go whose machine has not come; idempotent."""
        if self._sleeper is not None:
            self._sleeper.close()
            self._sleeper = None

    def begin(
        self, config: RunConfig, machine: Machine, bundle: Bundle, control: RunControl | None, *,
        is_jailed: bool, user: User | None = None,
    ) -> Attendant:
        """Return the attendant of ``machine``, which has not run; HostError.

        From now on it has the name of the socket of ``control``.  ``user`` is whom the machine's
        process becomes: so does the attendant.
        """
        name = None if control is None else control.give_name_away()
        most_files = SCRATCH_FILES_PER_DISK * len(config.disks)
        if self._has_clients:
            most_files = SCRATCH_FILES_OF_CLIENTS
        if not is_jailed:
            from pyvmm.cli.unattended import local_attendant

            return local_attendant(
                config, machine, bundle, socket_name=name, snapshot_path=self._snapshot_path,
                any_snapshot=self._has_clients, most_scratch_files=most_files if self.saves else 0,
            )
        from pyvmm.attendant.beginning import Beginning
        from pyvmm.attendant.start import start

        # Imported now, so that the bundle gets them as well.
        from pyvmm.jail import confine, programs, seccomp  # noqa: F401

        missing = bundle.left_out()
        beginning = Beginning(
            version=pyvmm.__version__, bundle=bundle.name, kernel=os.fspath(config.kernel),
            initrd=None if config.initrd is None else os.fspath(config.initrd),
            cmdline=config.cmdline, append=config.append, agent=config.agent,
            discovery=config.discovery, cpus=config.cpus,
            disks=tuple(
                disk.location if isinstance(disk, DiskConfig) and not disk.source.overlay else "-"
                for disk in config.disks
            ),
            kernel_version=machine.kernel.version, is_linux=machine.kernel.is_linux,
            modules=tuple(missing) if bundle.is_worth_writing(missing) else (),
            snapshot_path=self._snapshot_path, any_snapshot=self._has_clients,
            most_scratch_files=most_files if self.saves else 0,
            uid=-1 if user is None else user.uid, gid=-1 if user is None else user.gid,
        )
        sleeper, self._sleeper = self._sleeper, None
        if sleeper is not None:
            return sleeper.begin(beginning)
        remover = None
        if name is not None and user is None:
            beginning = beginning.replace(
                socket_name=name.name, socket_device=name.device, socket_inode=name.inode
            )
        elif name is not None:  # that user may not remove root's socket from root's directory
            from pyvmm.cli.remover import remover_of

            remover, name = remover_of(name, PROGRAM, is_silent=True), None
        try:
            attendant = start(
                beginning, program=PROGRAM, input_fd=machine.console.input_fd,
                directory_fd=-1 if name is None else name.directory_fd,
            )
        except BaseException:
            if remover is not None:
                remover.close()
            raise
        finally:
            if name is not None:
                name.close()
        attendant.beside = remover
        return attendant
