"""The user that root becomes, and root's namespaces for one machine after another."""

from __future__ import annotations

import os

from pyvmm.errors import ConfigError
from pyvmm.jail.namespaces import Namespaces
from pyvmm.numerals import shown, whole_number
from pyvmm.startup.types import Record

_LARGEST_ID = (1 << 32) - 2
"""(uid_t)-1 means: leave it as it is."""


class User(Record, kw_only=False):
    """A user and a group to become; ``text`` is how the option names them."""

    uid: int
    gid: int
    text: str

    def become(self) -> None:
        """Be this user, in this group and in no other, for good; ConfigError if that is refused.

        Open files stay open, whoever may open them.  It is for the whole process.
        """
        if os.getresuid() == (self.uid,) * 3 and os.getresgid() == (self.gid,) * 3:
            return
        try:
            os.setgroups([])
            os.setresgid(self.gid, self.gid, self.gid)
            os.setresuid(self.uid, self.uid, self.uid)
        except PermissionError as error:
            raise ConfigError(
                f"--user {self.text}", "needs root, with CAP_SETUID and CAP_SETGID"
            ) from error
        except OSError as error:  # EINVAL: a user namespace around us has no such user
            raise ConfigError(f"--user {self.text}", f"{error.strerror} (user {self.uid}, "
                              f"group {self.gid})") from error


def parse_user(text: str) -> User:
    """Return the user that ``NAME[:GROUP]`` means; both may be numbers.  ConfigError.

    Without GROUP it is the user's own group, as /etc/passwd has it.
    """
    import pwd

    name, colon, group = text.partition(":")
    option = f"--user {shown(text)}"
    try:
        uid = whole_number(name, 0, _LARGEST_ID)
        entry = pwd.getpwnam(name) if uid is None else pwd.getpwuid(uid)
    except (KeyError, ValueError):
        if uid is None:
            raise ConfigError(option, f"there is no user {shown(name)!r}") from None
        if not colon:
            raise ConfigError(
                option, f"user {uid} has no name here, so no group; write {uid}:GROUP"
            ) from None
    else:
        uid, gid = entry.pw_uid, entry.pw_gid
    if colon:
        gid = _group(option, group)
    if uid == 0 or gid == 0:
        raise ConfigError(option, "is root, or root's group: choose another")
    return User(uid, gid, shown(text))


def _group(option: str, name: str) -> int:
    import grp

    gid = whole_number(name, 0, _LARGEST_ID)
    if gid is not None:
        return gid
    try:
        return grp.getgrnam(name).gr_gid
    except (KeyError, ValueError):
        raise ConfigError(option, f"there is no group {shown(name)!r}") from None


class NextNamespaces:
    """Root's namespaces for one forked process after another, made before they are asked for.

    Each process has its own.  Whoever forks calls ``wait`` before and ``renew`` afterwards.
    """

    def __init__(self) -> None:
        self.taken = Namespaces() if os.geteuid() == 0 else None
        """Those of the process that is forked next; None if this is not root."""

    def wait(self) -> None:
        """Wait until the thread that makes them is gone."""
        if self.taken is not None:
            self.taken.wait()

    def renew(self) -> None:
        """Leave the present ones to the forked process, and begin to make the next ones."""
        if self.taken is not None:
            self.taken.close()
            self.taken = Namespaces()

    def close(self) -> None:
        """Free those that nobody has taken; idempotent."""
        if self.taken is not None:
            self.taken.close()
