"""The exception tree, ordered by culprit: who has to change something for the error to go away.

``ConfigError`` is the user's, ``HostError`` the host's, ``GuestError`` the guest driver's,
``VhostUserError`` the process's at the other end of a socket, ``DriverError`` the device's or
the program's that drives it, ``AgentError`` the guest's agent's or of whoever asks it.  The CLI
turns the first two into one line and exit status 125; a ``GuestError`` never leaves the device
model: it becomes a request status or DEVICE_NEEDS_RESET.
"""

from __future__ import annotations

import os


class PyvmmError(Exception):
    """Base of everything pyvmm raises on purpose."""


class ConfigError(PyvmmError):
    """A file or option the user gave cannot be used.

    ``subject`` is the file or option ("--memory", "vmlinux"), ``problem`` says what is wrong
    with it and, where there is one, the limit.
    """

    def __init__(self, subject: str, problem: str) -> None:
        super().__init__(f"{subject}: {problem}")
        self.subject = subject
        self.problem = problem


class SnapshotError(ConfigError):
    """A machine cannot be saved, or a snapshot cannot be used.

    ``subject`` is its directory or one of its disks.
    """


class HostError(PyvmmError):
    """The host refused something that a correct configuration may ask for."""


class KvmError(HostError):
    """A KVM ioctl failed; carries the ioctl's name and the errno."""

    def __init__(self, ioctl: str, error: int, detail: str = "") -> None:
        hint = f" ({detail})" if detail else ""
        super().__init__(f"{ioctl}: {os.strerror(error)} [errno {error}]{hint}")
        self.ioctl = ioctl
        self.errno = error


class StateError(PyvmmError):
    """A part cannot take the state it was given.

    ``part`` names it ("serial", "virtio0 queue 1"), ``problem`` the field and its limit.
    """

    def __init__(self, part: str, problem: str) -> None:
        super().__init__(f"{part}: {problem}")
        self.part = part
        self.problem = problem


class GuestError(PyvmmError):
    """The guest broke a rule of an interface; never ends the process."""


class GuestMemoryError(GuestError):
    """``length`` bytes at guest physical address ``gpa`` are not (all) RAM."""

    def __init__(self, gpa: int, length: int) -> None:
        super().__init__(f"guest memory {gpa:#x}+{length:#x} is not RAM")
        self.gpa = gpa
        self.length = length


class RingError(GuestError):
    """A virtqueue is malformed: the device stops and sets DEVICE_NEEDS_RESET."""


class ActivateError(PyvmmError):
    """A device could not be activated with the features and queues the driver set up."""


class VhostUserError(PyvmmError):
    """A vhost-user peer broke the protocol or refused a request.

    ``peer`` names the socket, ``problem`` the message and what is wrong with it.
    """

    def __init__(self, peer: str, problem: str) -> None:
        super().__init__(f"{peer}: {problem}")
        self.peer = peer
        self.problem = problem


class RequestRefusedError(VhostUserError):
    """The peer answered a request with a failure; the connection goes on."""


class PeerClosedError(VhostUserError):
    """The peer hung up; what it was asked and has not answered is lost."""


class AgentError(PyvmmError):
    """The agent in the guest is not there, was lost, or cannot do what it was asked to.

    ``errno`` is the guest's reason, as ENOENT for a program that is not there; 0 if it gave none.
    """

    def __init__(self, text: str, errno: int = 0) -> None:
        super().__init__(text)
        self.errno = errno


class DriverError(PyvmmError):
    """Base of what goes wrong in ``pyvmm.driver``, the driver half of virtio-blk."""
