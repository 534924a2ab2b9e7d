"""A ``Ring`` that also hands out plain chains, many at a time or one alone."""

from __future__ import annotations

import abc

from pyvmm.virtio.block.fast.plain import PlainChain
from pyvmm.virtio.ring.queue import Chain, Ring


class FastRing(Ring, abc.ABC):
    """The methods that ``FastPath`` needs of a ring besides those of every ``Ring``.

    Use them where many requests of one shape come at once.  A pass is: ``begin_pass``, then
    ``take_plain`` and ``take_next`` in turn until nothing is left, ``publish``,
    ``enable_notifications``.  For a driver that waits for each request before it makes the next
    there is a shorter pass: ``take_lone``, ``answer_lone``, ``enable_notifications``.
    """

    region: memoryview
    """The region of RAM that the ring is in, where most buffers of its chains are too.  Finding
    one there takes a third of the time of ``GuestMemory.view``."""
    region_gpa: int
    """The GPA of the region's first byte."""

    @abc.abstractmethod
    def begin_pass(self) -> None:
        """Ask the driver not to notify, and see how many chains may be taken.  RingError."""

    @abc.abstractmethod
    def take_next(self) -> Chain | None:
        """Take the next chain of the pass, of any shape; None if there is none.  RingError."""

    @abc.abstractmethod
    def take_plain(self, work_limit: int) -> tuple[list[PlainChain], int, bool]:
        """Take the next chains as long as they are plain; never raises.

        They end early once they are ``work_limit`` of work (``plain_work``).  With them come the
        work that is left of the limit, and True if a chain follows that may not be plain.
        """

    @abc.abstractmethod
    def take_lone(self) -> PlainChain | None:
        """Begin a pass, and take its chain if exactly one waits, in an indirect table with one
        data buffer or none.

        Else None: the pass has begun as with ``begin_pass``, and nothing is taken.  RingError.
        """

    @abc.abstractmethod
    def answer_lone(self, token: int, written: int) -> bool:
        """Push the chain that ``take_lone`` took, and publish it; see ``Ring.publish``."""

    @abc.abstractmethod
    def push_plain(self, done: list[int]) -> None:
        """Push plain chains, in order: ``token | written << TOKEN_BITS`` of each."""
