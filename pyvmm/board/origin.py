"""The beginning of a machine that goes on from a snapshot instead of booting a kernel."""

from __future__ import annotations

from pyvmm.memory import MappableImage
from pyvmm.startup.types import Protocol, Record
from pyvmm.x86.image import Kernel


class Origin(Record):
    """The parts of a snapshot that a machine is built from; its state comes later.

    RAM is a private mapping of ``image``, in which the guest finds itself described already.
    ``kernel`` is the one that was booted, for messages; its file is not read again.  ``cpuid`` has
    what each vCPU was given, as ``struct kvm_cpuid2``.
    """

    image: MappableImage
    kernel: Kernel
    cpuid: tuple[bytes, ...]


class Base(Protocol):
    """The snapshot over whose image a machine's RAM is mapped (``pyvmm.snapshot``)."""

    def close(self) -> None:
        """Give up the machine's share of it."""
