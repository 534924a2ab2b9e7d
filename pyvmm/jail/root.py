"""What only root can give up: its user, its network, its files (``--user``, ``--cgroup``)."""

from __future__ import annotations

from pyvmm.startup.types import Record


class User(Record, kw_only=False):
    """A user and a group to become; neither is root."""

    uid: int
    gid: int


class Cgroup(Record):
    """A directory of cgroup v2 to be in, made if it is missing, and its limits; None is none.

    ``cpus`` is a number of CPUs' time, as 1.5.
    """

    directory: str
    memory_bytes: int | None = None
    cpus: float | None = None
    pids: int | None = None


class Namespaces:
    """A mount, network, IPC and UTS namespace with an empty root, made beside a start."""
