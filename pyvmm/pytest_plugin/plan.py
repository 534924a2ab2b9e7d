"""One boot as a test asks for it: the marker's arguments, over the session's options."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pyvmm.api.config import MachineConfig
from pyvmm.api.disks import NbdDisk, Overlay, RawDisk
from pyvmm.launcher.limits import BOOT_TIMEOUT_S, LAB_BOOT_TIMEOUT_S
from pyvmm.pytest_plugin.kernels import kernel_and_initrd
from pyvmm.pytest_plugin.marker import ArgumentsError
from pyvmm.pytest_plugin.options import place_and_way
from pyvmm.startup.types import TYPE_CHECKING
from pyvmm.testing.fail_on import FAIL_ON, FailOn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.api.config import AnyDisk

LAB_FACTOR = 10.0
"""The lab is an emulated host: there a marker's time limits are so many times as long."""
NO_KERNEL = (
    "no kernel: name one with --pyvmm-kernel K, pyvmm_kernel in pytest's configuration, or "
    "@pytest.mark.pyvmm(kernel=K); `pyvmm kernel fetch debian` prints the path of one"
)
_PASSED_ON = ("memory", "cpus", "cpu", "append", "cmdline", "mmio", "serve", "rtc", "discovery")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A machine's configuration and how it is watched.

    ``key`` is equal for plans that may share a guest.  ``has_agent`` tells if the boot is over when
    the agent takes orders.
    """

    config: MachineConfig
    key: str = field(repr=False)
    has_agent: bool
    boot_timeout_s: float
    fail_on: FailOn
    may_end: bool


def make_plan(
    arguments: Mapping[str, object],
    *,
    kernel: str | None,
    disks: Sequence[str],
    root: Path,
    is_lab: bool,
    in_process: bool = False,
) -> Plan:
    """Return the plan for checked ``arguments``; ``kernel`` and ``disks`` are the session's.

    Relative paths are relative to ``root``.  ``in_process`` plans a ``pyvmm.Machine``, which has no
    agent.  ArgumentsError without a kernel; ConfigError for what cannot be.
    """
    chosen = arguments.get("kernel", kernel)
    if isinstance(chosen, (list, tuple)):
        chosen = kernel if kernel is not None else chosen[0]
    if not isinstance(chosen, (str, os.PathLike)):
        raise ArgumentsError(NO_KERNEL)
    factor = LAB_FACTOR if is_lab else 1.0
    boot_s = LAB_BOOT_TIMEOUT_S if is_lab else BOOT_TIMEOUT_S
    if "boot_timeout" in arguments:
        boot_s = _seconds(arguments["boot_timeout"]) * factor
    given = {name: arguments[name] for name in _PASSED_ON if name in arguments}
    path, initrd = kernel_and_initrd(_below(root, chosen))
    if "initrd" in arguments:
        initrd = _below(root, arguments["initrd"])
    if initrd is not None:
        given["initrd"] = initrd
    if "timeout" in arguments:
        given["timeout_s"] = _seconds(arguments["timeout"]) * factor
    agent = _agent(arguments.get("agent", True))
    if not in_process and agent != "none":
        given["agent"] = agent
    wanted = arguments.get("disks", list(disks))
    assert isinstance(wanted, list)
    fail_on = arguments.get("fail_on", FAIL_ON)
    assert isinstance(fail_on, FailOn)
    may_end = bool(arguments.get("may_end", False))
    config = MachineConfig(
        kernel=path,
        disks=[_disk(one, root) for one in wanted],
        **given,  # type: ignore[arg-type]  # checked by marker.checked and by MachineConfig
    )
    return Plan(
        config=config,
        key=repr((
            path, [_identity(one) for one in wanted], sorted(given.items()), fail_on, may_end,
        )),
        has_agent=not in_process and agent != "none",
        boot_timeout_s=boot_s,
        fail_on=fail_on,
        may_end=may_end,
    )


def _agent(value: object) -> str:
    if isinstance(value, bool):
        return "inject" if value else "none"
    return str(value)


def _seconds(value: object) -> float:
    assert isinstance(value, (int, float))
    return float(value)


def _below(root: Path, path: object) -> str:
    assert isinstance(path, (str, os.PathLike))
    return str(root / os.fsdecode(path))


def _disk(what: object, root: Path) -> AnyDisk:
    """Return a disk of a marker or an option; a path is a snapshot of it unless it ends otherwise.
    """
    if not isinstance(what, (str, os.PathLike)):
        return what  # type: ignore[return-value]  # MachineConfig names what is no disk
    text = os.fsdecode(what)
    place, way = place_and_way(text)
    if "://" in place:
        disk: NbdDisk | RawDisk = NbdDisk(place, read_only=way == "ro")
    else:
        disk = RawDisk(root / place, read_only=way == "ro")
    return Overlay(disk) if way == "snapshot" else disk


def _identity(disk: object) -> str:
    return os.fsdecode(disk) if isinstance(disk, (str, os.PathLike)) else f"{id(disk):#x}"
