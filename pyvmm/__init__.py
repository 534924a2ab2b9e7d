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
    from pyvmm.api.machine import Machine
    from pyvmm.config import VhostUserDiskConfig as VhostUserDisk
    from pyvmm.errors import AgentError, ConfigError, HostError, PyvmmError
    from pyvmm.launcher.command import Command
    from pyvmm.launcher.completed import Completed
    from pyvmm.launcher.errors import CommandError, EndedError, OutputLimitError
    from pyvmm.launcher.vm import Vm, launch
    from pyvmm.run.outcome import Kind, Outcome
    from pyvmm.storage.backend import BlockBackend
    from pyvmm.virtio.rate_limit import RateLimit

__version__ = "0.1.0"

__all__ = [
    "REFUSE",
    "AgentError",
    "BlockBackend",
    "Command",
    "CommandError",
    "Completed",
    "ConfigError",
    "DiskWrapper",
    "EndedError",
    "ExpectError",
    "FaultyDisk",
    "HostError",
    "Kind",
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
    "VhostUserDisk",
    "Vm",
    "__version__",
    "bare",
    "disk",
    "launch",
]

_PLACES = {
    "AgentError": "pyvmm.errors",
    "bare": "pyvmm.api.bare",
    "BlockBackend": "pyvmm.storage.backend",
    "Command": "pyvmm.launcher.command",
    "CommandError": "pyvmm.launcher.errors",
    "Completed": "pyvmm.launcher.completed",
    "ConfigError": "pyvmm.errors",
    "disk": "pyvmm.api.config",
    "DiskWrapper": "pyvmm.api.disks",
    "EndedError": "pyvmm.launcher.errors",
    "ExpectError": "pyvmm.api.console",
    "FaultyDisk": "pyvmm.api.disks",
    "HostError": "pyvmm.errors",
    "Kind": "pyvmm.run.outcome",
    "launch": "pyvmm.launcher.vm",
    "Machine": "pyvmm.api.machine",
    "MachineConfig": "pyvmm.api.config",
    "MemoryDisk": "pyvmm.api.disks",
    "NbdDisk": "pyvmm.api.disks",
    "Outcome": "pyvmm.run.outcome",
    "OutputLimitError": "pyvmm.launcher.errors",
    "Overlay": "pyvmm.api.disks",
    "PyvmmError": "pyvmm.errors",
    "RateLimit": "pyvmm.virtio.rate_limit",
    "RawDisk": "pyvmm.api.disks",
    "REFUSE": "pyvmm.api.hook_calls",
    "VhostUserDisk": "pyvmm.config:VhostUserDiskConfig",
    "Vm": "pyvmm.launcher.vm",
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
