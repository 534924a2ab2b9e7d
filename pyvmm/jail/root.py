"""The user that root becomes, and root's namespaces for one machine after another."""

from __future__ import annotations

import errno
import os
import threading

from pyvmm.errors import ConfigError
from pyvmm.jail.calls import system_call
from pyvmm.jail.namespaces import Namespaces, empty_root, unshare
from pyvmm.numerals import shown, whole_number
from pyvmm.startup.types import Record

_SETNS = 308
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


class MadeNamespaces(Namespaces):
    """Namespaces that a thread makes now, for a process that is forked later and enters them.

    Entering them takes 0.1 ms.
    """

    def __init__(self) -> None:
        super().__init__()
        self._descriptors: list[int] = []
        self._error: OSError | None = None
        self._thread: threading.Thread | None = None
        thread = threading.Thread(target=self._make, name="namespaces")
        try:
            thread.start()
        except RuntimeError:  # as if none could be made
            self._error = OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        else:
            self._thread = thread

    def wait(self) -> None:
        """Wait until the thread is done: afterwards it is gone."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def check(self) -> None:
        """Wait until they are made; OSError if they cannot be."""
        self.wait()
        if self._error is not None:
            raise self._error

    def enter(self) -> None:
        """See ``Namespaces``."""
        try:
            self.check()
            for fd in self._descriptors:
                system_call(_SETNS, fd, 0)
        finally:
            self.close()

    def close(self) -> None:
        """Close the descriptors of namespaces that are not entered; idempotent."""
        self.wait()
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _make(self) -> None:
        """Make the namespaces, of which this thread is the only member."""
        try:
            unshare()
            for name in ("net", "ipc", "uts", "mnt"):
                path = f"/proc/thread-self/ns/{name}"
                self._descriptors.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            empty_root()
        except OSError as error:
            self._error = error


class NextNamespaces:
    """Root's namespaces for one forked process after another, made before they are asked for.

    Each process has its own.  Whoever forks calls ``wait`` before and ``renew`` afterwards.
    There are none unless ``are_wanted``.
    """

    def __init__(self, are_wanted: bool = True) -> None:
        self.taken = MadeNamespaces() if are_wanted and os.geteuid() == 0 else None
        """Those of the process that is forked next; None if it enters none."""

    def wait(self) -> None:
        """Wait until the thread that makes them is gone."""
        if self.taken is not None:
            self.taken.wait()

    def renew(self) -> None:
        """Leave the present ones to the forked process, and begin to make the next ones."""
        if self.taken is not None:
            self.taken.close()
            self.taken = MadeNamespaces()

    def close(self) -> None:
        """Free those that nobody has taken; idempotent."""
        if self.taken is not None:
            self.taken.close()
