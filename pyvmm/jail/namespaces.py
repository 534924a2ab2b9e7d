"""Namespaces that root leaves the host's for: of the network, of files, of queues, of names."""

from __future__ import annotations

import errno
import os
import threading

from pyvmm.jail.calls import system_call

# <asm/unistd_64.h>
_PIVOT_ROOT, _CHROOT, _MOUNT, _UMOUNT2, _UNSHARE, _SETNS = 155, 161, 165, 166, 272, 308

# <linux/sched.h>
_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC, _CLONE_NEWNET = (
    0x0002_0000, 0x0400_0000, 0x0800_0000, 0x4000_0000
)

# <linux/mount.h>
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_MOVE, _MS_REC, _MS_PRIVATE = 1 << 13, 1 << 14, 1 << 18
_MNT_DETACH = 2


class Namespaces:
    """A mount, network, IPC and UTS namespace of one's own, and an empty root directory.

    Making a network takes the kernel a millisecond or more, so a thread makes all of them beside
    the start of a run; entering them later is four short system calls.  Open files and connected
    sockets stay as they are.  Nobody is left to reach: no file, no host on the network, no queue
    or shared memory of another process, no name of the host.

    There is no PID namespace: only children would be in it, and a machine has none.
    """

    def __init__(self) -> None:
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
        """Wait until they are made; OSError if they cannot be.

        EPERM: this process may not make namespaces, as root in a container may not.
        """
        self.wait()
        if self._error is not None:
            raise self._error

    def enter(self) -> None:
        """Move this process there, for good; no other thread may run.  OSError, as ``check``."""
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
            # With a mount namespace of its own the thread also has a root and a working directory
            # of its own: the other threads keep theirs.
            system_call(_UNSHARE, _CLONE_NEWNS | _CLONE_NEWNET | _CLONE_NEWIPC | _CLONE_NEWUTS)
            for name in ("net", "ipc", "uts", "mnt"):
                path = f"/proc/thread-self/ns/{name}"
                self._descriptors.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            _empty_root("/proc")
        except OSError as error:
            self._error = error


def _empty_root(place: str) -> None:
    """Put an empty directory that nobody can write in the root's place; OSError.

    ``place`` is any directory, for the moment between.  Only for a mount namespace of one's own.
    """
    # Else the mounts below would be made in the host's namespace too.
    system_call(_MOUNT, 0, b"/", 0, _MS_REC | _MS_PRIVATE, 0)
    flags = _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    system_call(_MOUNT, b"pyvmm", place.encode(), b"tmpfs", flags, b"mode=0500,nr_inodes=1")
    os.chdir(place)
    try:
        # The old root then lies over the new one (pivot_root(2), "pivot_root(".", ".")").
        system_call(_PIVOT_ROOT, b".", b".")
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # An initramfs cannot be pivoted away: it is covered, as switch_root(8) does.
        system_call(_MOUNT, b".", b"/", 0, _MS_MOVE, 0)
        system_call(_CHROOT, b".")
    else:
        system_call(_UMOUNT2, b".", _MNT_DETACH)
    os.chdir("/")
