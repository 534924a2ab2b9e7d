"""The abilities of this host's KVM: one ``Check`` for each that the machine needs or would like.

Every fault that a host can have at this level ends as a failed ``Check`` with a remedy, never as an
exception.  ``x86/trial.py`` finds out if a stock kernel runs.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import pwd
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyvmm.errors import HostError, KvmError
from pyvmm.kvm import abi
from pyvmm.kvm.handles import DEFAULT_PATH, Kvm

LAB = "or use `pyvmm lab -- CMD`, which needs no KVM"
_NEWER_KERNEL = f"use a newer host kernel, {LAB}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the doctor's report; a failed check that is not ``required`` is a note."""

    name: str
    passed: bool
    required: bool = True
    detail: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Capability:
    """A ``KVM_CAP_*`` and its purpose for the machine; ``minimum`` is the least useful answer."""

    number: int
    name: str
    purpose: str
    required: bool = True
    minimum: int = 1


CAPABILITIES = (
    Capability(abi.KVM_CAP_USER_MEMORY, "USER_MEMORY", "guest RAM from this process"),
    Capability(abi.KVM_CAP_EXT_CPUID, "EXT_CPUID", "a CPUID of our own making"),
    Capability(abi.KVM_CAP_SET_TSS_ADDR, "SET_TSS_ADDR", "real-mode emulation pages"),
    Capability(abi.KVM_CAP_SET_IDENTITY_MAP_ADDR, "SET_IDENTITY_MAP_ADDR", "likewise"),
    Capability(abi.KVM_CAP_IRQCHIP, "IRQCHIP", "8259, IOAPIC and local APIC in the kernel"),
    Capability(abi.KVM_CAP_PIT2, "PIT2", "the 8254 timer in the kernel"),
    Capability(abi.KVM_CAP_IRQFD, "IRQFD", "interrupts without a system call's detour"),
    Capability(abi.KVM_CAP_IOEVENTFD, "IOEVENTFD", "doorbells without an exit"),
    Capability(abi.KVM_CAP_MP_STATE, "MP_STATE", "to see that a guest has halted"),
    Capability(abi.KVM_CAP_IMMEDIATE_EXIT, "IMMEDIATE_EXIT", "to stop a running vCPU"),
    Capability(abi.KVM_CAP_NR_MEMSLOTS, "NR_MEMSLOTS", "memory slots", minimum=16),
    Capability(abi.KVM_CAP_READONLY_MEM, "READONLY_MEM", "registers read without exits", False),
    Capability(abi.KVM_CAP_TSC_DEADLINE_TIMER, "TSC_DEADLINE_TIMER", "cheap guest timers", False),
    Capability(abi.KVM_CAP_INTERNAL_ERROR_DATA, "INTERNAL_ERROR_DATA", "why KVM gave up", False),
    Capability(abi.KVM_CAP_CLOCKSOURCE, "CLOCKSOURCE", "kvm-clock", False),
    Capability(abi.KVM_CAP_KVMCLOCK_CTRL, "KVMCLOCK_CTRL", "pauses that no watchdog minds", False),
    Capability(abi.KVM_CAP_MAX_VCPUS, "MAX_VCPUS", "virtual CPUs", False),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The files to look at; tests look elsewhere."""

    device: str = DEFAULT_PATH
    cpuinfo: str = "/proc/cpuinfo"
    modules: str = "/sys/module"


def modules(host: Host) -> list[str]:
    """Return the KVM modules loaded or built in: ``kvm_amd``, ``kvm_intel``, ``kvm_pvm``..."""
    try:
        names = os.listdir(host.modules)
    except OSError:
        return []
    return sorted(name for name in names if name.startswith("kvm_"))


def open_device(host: Host) -> tuple[Kvm | None, Check]:
    """Return the open device, or None, and the check that says so."""
    try:
        kvm = Kvm(host.device)
    except KvmError as error:
        check = Check(
            name=host.device,
            passed=False,
            detail=f"{error.ioctl}: {os.strerror(error.errno)}",
            remedy=_device_remedy(error.errno, host),
        )
        return None, check
    except HostError as error:
        return None, Check(
            name="API version", passed=False, detail=str(error), remedy=_NEWER_KERNEL
        )
    detail = f"opens for reading and writing; API version {kvm.api_version}"
    return kvm, Check(name=host.device, passed=True, detail=detail)


def capabilities(kvm: Kvm) -> Iterator[Check]:
    """Yield one check for each of CAPABILITIES."""
    for capability in CAPABILITIES:
        name = f"KVM_CAP_{capability.name}"
        try:
            answer = kvm.check_extension(capability.number)
        except KvmError as error:
            yield Check(name=name, passed=False, required=capability.required, detail=str(error))
            continue
        passed = answer >= capability.minimum
        detail = f"{answer} {capability.purpose}" if answer > 1 else capability.purpose
        remedy = _NEWER_KERNEL if capability.required else ""
        yield Check(
            name=name,
            passed=passed,
            required=capability.required,
            detail=detail,
            remedy="" if passed else remedy,
        )


def create_vm(kvm: Kvm) -> Check:
    """Check that a VM with its interrupt chips, timer and a vCPU can be made at all."""
    name = "a virtual machine"
    try:
        with kvm.create_vm() as vm:
            vm.create_irqchip()
            vm.create_pit2()
            with contextlib.closing(vm.create_vcpu(0)):
                return Check(name=name, passed=True, detail="VM, chips and vCPU can be made")
    except KvmError as error:
        return Check(
            name=name, passed=False, detail=str(error), remedy=_vm_remedy(error.errno)
        )
    except HostError as error:
        return Check(name=name, passed=False, detail=str(error), remedy=_NEWER_KERNEL)


def _vm_remedy(code: int) -> str:
    if code == errno.EBUSY:
        return f"stop the other hypervisor (VirtualBox, VMware, Xen), {LAB}"
    if code == errno.ENOMEM:
        return "free some memory"
    if code in (errno.EMFILE, errno.ENFILE):
        return "raise the limit of open files (ulimit -n)"
    return f"look for KVM's own message with `dmesg | grep -i kvm`, {LAB}"


def _device_remedy(code: int, host: Host) -> str:
    if code in (errno.EACCES, errno.EPERM):
        return f"{_permission_remedy(host)}; {LAB}"
    if code in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return _load_remedy(host)
    if code == errno.EBUSY:
        return f"stop the other hypervisor (VirtualBox, VMware, Xen), {LAB}"
    if code == errno.ENOTTY:
        return f"this is not KVM's device: look what made it, {LAB}"
    return f"look for KVM's own message with `dmesg | grep -i kvm`, {LAB}"


def _permission_remedy(host: Host) -> str:
    """Return the remedy for a device that may not be opened, from its owner and mode."""
    device = host.device
    try:
        status = os.stat(device)
    except OSError as error:
        return f"look at the directories above {device} ({error.strerror})"
    both = stat.S_IROTH | stat.S_IWOTH
    if status.st_mode & both == both or os.access(device, os.R_OK | os.W_OK):
        return (
            f"its mode lets you open it, so a sandbox does not: in a container `--device {device}`"
        )
    try:
        group = grp.getgrgid(status.st_gid)
        name, members = group.gr_name, group.gr_mem
    except KeyError:
        name, members = str(status.st_gid), []
    # Nobody is sent into root's own group, which opens far more than the device.
    if status.st_mode & both << 3 == both << 3 and status.st_gid:
        try:
            user = pwd.getpwuid(os.geteuid()).pw_name
        except KeyError:
            user = ""
        if user in members:
            return f"you are in the group {name}, but not since this login: log in again"
        return f"`sudo usermod -aG {name} $USER`, then log in again"
    mode = stat.filemode(status.st_mode)
    return (
        f"it is {mode}, of the group {name}, so no group lets you in: "
        f"`sudo setfacl -m u:$USER:rw {device}`, or for good a udev rule with "
        'KERNEL=="kvm", GROUP="kvm", MODE="0660"'
    )


def _load_remedy(host: Host) -> str:
    """Return the remedy for a missing device: the driver to load, or the reason why none will."""
    container = f"in a container also `--device {DEFAULT_PATH}`"
    loaded = modules(host)
    if loaded:
        return f"{loaded[0]} is loaded, only the device is missing here; {container}; {LAB}"
    flags = _cpu_flags(host)
    if "svm" in flags:
        return f"`sudo modprobe kvm_amd`; {container}; {LAB}"
    if "vmx" in flags:
        return f"`sudo modprobe kvm_intel`; {container}; {LAB}"
    if "hypervisor" in flags:
        return (
            "this is a virtual machine without nested virtualization: on its host, "
            "`modprobe kvm_amd nested=1` or `modprobe kvm_intel nested=1` and the CPU model "
            f"'host' (a cloud has instance types for it); {LAB}"
        )
    return f"switch virtualization (SVM, AMD-V, VT-x) on in the firmware's set-up; {LAB}"


def _cpu_flags(host: Host) -> frozenset[str]:
    """Return the flags of the first CPU in /proc/cpuinfo; none if it cannot be read."""
    try:
        text = Path(host.cpuinfo).read_text(encoding="ascii", errors="replace")
    except OSError:
        return frozenset()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())
