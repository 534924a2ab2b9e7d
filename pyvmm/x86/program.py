"""Tell if a program runs on a vCPU, which the end of a run may have to know.

Apart from ``x86.cpu``, because a machine of a snapshot loads nothing else of that, and a jailed
process cannot load it at the end.
"""

from __future__ import annotations

from pyvmm.kvm.handles import Vcpu


def runs_program(vcpu: Vcpu) -> bool:
    """Return True if Linux, on this vCPU, runs a program or serves a system call of one.

    Programs keep their thread's data at FS.base, and Linux leaves it there while it serves them.
    It is 0 in kernel threads, of which the boot is one, and before.
    """
    return bool(vcpu.get_sregs().fs.base)
