"""pyvmm: a full minimal KVM hypervisor in pure Python.

``import pyvmm`` gives scripts a small face, each name of which is imported when it is first used
(docs/api.md)::

    with pyvmm.Machine(pyvmm.MachineConfig(kernel="bzImage", disks=["root.img"])) as machine:
        machine.start()
        machine.console.expect("login: ")

To read the source, start at ``pyvmm/machine.py``: ``build()`` is the whole machine from top to
bottom.  docs/tour.md tells a boot file by file.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.api.bare import bare
    from pyvmm.api.config import MachineConfig, disk
    from pyvmm.api.console import ExpectError
    from pyvmm.api.disks import (
        DiskWrapper,
        FaultyDisk,
        MemoryDisk,
        NbdDisk,
        Overlay,
        RawDisk,
    )
    from pyvmm.api.hook_calls import REFUSE
    from pyvmm.api.machine import Machine, Snapshot
    from pyvmm.config import VhostUserDiskConfig as VhostUserDisk
    from pyvmm.errors import AgentError, ConfigError, HostError, PyvmmError, SnapshotError
    from pyvmm.launcher.command import Command
    from pyvmm.launcher.completed import Completed
    from pyvmm.launcher.errors import CommandError, EndedError, OutputLimitError
    from pyvmm.launcher.vm import Vm, VmSnapshot, launch
    from pyvmm.run.outcome import Kind, Outcome
    from pyvmm.storage.backend import BlockBackend
    from pyvmm.testing.fail_on import FAIL_ON, FailOn
    from pyvmm.testing.verdicts import (
        AgentLost,
        BootError,
        BootFailed,
        BootTimeout,
        FailedOn,
        GuestEnded,
        InternalError,
        KernelOops,
        KernelPanic,
        KernelWarning,
        Lockup,
        RootNotMounted,
        RunFailed,
        RunTimeout,
        TripleFault,
    )
    from pyvmm.virtio.rate_limit import RateLimit

__version__ = "0.1.0"

__all__ = [
    "FAIL_ON",
    "REFUSE",
    "AgentError",
    "AgentLost",
    "BlockBackend",
    "BootError",
    "BootFailed",
    "BootTimeout",
    "Command",
    "CommandError",
    "Completed",
    "ConfigError",
    "DiskWrapper",
    "EndedError",
    "ExpectError",
    "FailOn",
    "FailedOn",
    "FaultyDisk",
    "GuestEnded",
    "HostError",
    "InternalError",
    "KernelOops",
    "KernelPanic",
    "KernelWarning",
    "Kind",
    "Lockup",
    "Machine",
    "MachineConfig",
    "MemoryDisk",
    "NbdDisk",
    "Outcome",
    "OutputLimitError",
    "Overlay",
    "PyvmmError",
    "RateLimit",
    "RawDisk",
    "RootNotMounted",
    "RunFailed",
    "RunTimeout",
    "Snapshot",
    "SnapshotError",
    "TripleFault",
    "VhostUserDisk",
    "Vm",
    "VmSnapshot",
    "__version__",
    "bare",
    "disk",
    "launch",
]

_PLACES = {
    "AgentError": "pyvmm.errors",
    "AgentLost": "pyvmm.testing.verdicts",
    "BlockBackend": "pyvmm.storage.backend",
    "BootError": "pyvmm.testing.verdicts",
    "BootFailed": "pyvmm.testing.verdicts",
    "BootTimeout": "pyvmm.testing.verdicts",
    "Command": "pyvmm.launcher.command",
    "CommandError": "pyvmm.launcher.errors",
    "Completed": "pyvmm.launcher.completed",
    "ConfigError": "pyvmm.errors",
    "DiskWrapper": "pyvmm.api.disks",
    "EndedError": "pyvmm.launcher.errors",
    "ExpectError": "pyvmm.api.console",
    "FAIL_ON": "pyvmm.testing.fail_on",
    "FailOn": "pyvmm.testing.fail_on",
    "FailedOn": "pyvmm.testing.verdicts",
    "FaultyDisk": "pyvmm.api.disks",
    "GuestEnded": "pyvmm.testing.verdicts",
    "HostError": "pyvmm.errors",
    "InternalError": "pyvmm.testing.verdicts",
    "KernelOops": "pyvmm.testing.verdicts",
    "KernelPanic": "pyvmm.testing.verdicts",
    "KernelWarning": "pyvmm.testing.verdicts",
    "Kind": "pyvmm.run.outcome",
    "Lockup": "pyvmm.testing.verdicts",
    "Machine": "pyvmm.api.machine",
    "MachineConfig": "pyvmm.api.config",
    "MemoryDisk": "pyvmm.api.disks",
    "NbdDisk": "pyvmm.api.disks",
    "Outcome": "pyvmm.run.outcome",
    "OutputLimitError": "pyvmm.launcher.errors",
    "Overlay": "pyvmm.api.disks",
    "PyvmmError": "pyvmm.errors",
    "REFUSE": "pyvmm.api.hook_calls",
    "RateLimit": "pyvmm.virtio.rate_limit",
    "RawDisk": "pyvmm.api.disks",
    "RootNotMounted": "pyvmm.testing.verdicts",
    "RunFailed": "pyvmm.testing.verdicts",
    "RunTimeout": "pyvmm.testing.verdicts",
    "Snapshot": "pyvmm.api.machine",
    "SnapshotError": "pyvmm.errors",
    "TripleFault": "pyvmm.testing.verdicts",
    "VhostUserDisk": "pyvmm.config:VhostUserDiskConfig",
    "Vm": "pyvmm.launcher.vm",
    "VmSnapshot": "pyvmm.launcher.vm",
    "bare": "pyvmm.api.bare",
    "disk": "pyvmm.api.config",
    "launch": "pyvmm.launcher.vm",
}


def __getattr__(name: str) -> object:
    """Import the part of the face that is asked for."""
    place = _PLACES.get(name)
    if place is None:
        raise AttributeError(f"module 'pyvmm' has no attribute {name!r}")
    from importlib import import_module

    module, _, own_name = place.partition(":")
    found = globals()[name] = getattr(import_module(module), own_name or name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
