"""What the doctor asks of a host's KVM: every fault is a failed check with a remedy."""

from __future__ import annotations

import errno
import grp
import os
import stat
from pathlib import Path

import pytest

from pyvmm.kvm import abi, probe
from pyvmm.kvm.handles import Kvm
from pyvmm.kvm.probe import Host
from tests.kvm.conftest import FakeKernel


def _host(tmp_path: Path, *, flags: str = "", modules: tuple[str, ...] = ()) -> Host:
    """A host without /dev/kvm, with those CPU flags and modules."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\nflags\t\t: fpu {flags} sse\n\nprocessor : 1\n")
    for name in modules:
        (tmp_path / "module" / name).mkdir(parents=True)
    return Host(
        device=str(tmp_path / "kvm"), cpuinfo=str(cpuinfo), modules=str(tmp_path / "module")
    )


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        ("svm", "modprobe kvm_amd"),
        ("vmx hypervisor", "modprobe kvm_intel"),
        ("hypervisor", "nested=1"),
        ("", "firmware"),
    ],
)
def test_a_missing_device_is_answered_by_what_the_cpu_can_do(
    tmp_path: Path, flags: str, remedy: str
) -> None:
    kvm, check = probe.open_device(_host(tmp_path, flags=flags))
    assert kvm is None
    assert not check.passed
    assert check.required
    assert "No such file" in check.detail
    assert remedy in check.remedy
    assert "pyvmm lab" in check.remedy


def test_a_loaded_driver_without_a_device_is_a_container(tmp_path: Path) -> None:
    _, check = probe.open_device(_host(tmp_path, flags="svm", modules=("kvm_amd", "kvm")))
    assert check.remedy.startswith("kvm_amd is loaded")
    assert "--device /dev/kvm" in check.remedy


def test_a_host_without_proc_and_sys_still_gets_an_answer(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nothing")
    host = Host(device=nowhere, cpuinfo=nowhere, modules=nowhere)
    assert "firmware" in probe.open_device(host)[1].remedy
    assert probe.modules(host) == []


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.EACCES, "directories above"),
        (errno.ENODEV, "modprobe kvm_amd"),
        (errno.ENXIO, "modprobe kvm_amd"),
        (errno.EBUSY, "stop the other hypervisor"),
        (errno.EIO, "dmesg"),
    ],
)
def test_a_device_that_does_not_open_has_a_remedy(
    code: int, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = _host(tmp_path, flags="svm")

    def refuse(path: str, flags: int) -> int:
        raise OSError(code, os.strerror(code), path)

    monkeypatch.setattr(os, "open", refuse)
    kvm, check = probe.open_device(host)
    assert kvm is None
    assert os.strerror(code) in check.detail
    assert remedy in check.remedy


@pytest.mark.parametrize(("mode", "group", "members", "remedy", "never"), [
    (0o600, 0, [], "setfacl -m u:$USER:rw", "usermod"),
    (0o660, 0, [], "setfacl -m u:$USER:rw", "usermod"),
    (0o600, 108, [], "setfacl -m u:$USER:rw", "usermod"),
    (0o640, 108, [], "setfacl -m u:$USER:rw", "usermod"),
    (0o660, 108, [], "`sudo usermod -aG virt $USER`, then log in again", "setfacl"),
    (0o660, 108, ["root"], "you are in the group virt, but not since this login", "usermod"),
    (0o666, 0, [], "a container `--device ", "usermod"),
])
def test_fault_38_the_remedy_is_what_owner_and_mode_ask_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    mode: int, group: int, members: list[str], remedy: str, never: str,
) -> None:
    host = _host(tmp_path)
    found = os.stat_result((stat.S_IFCHR | mode, 1, 1, 1, 0, group, 0, 0, 0, 0))

    def refuse(path: str, flags: int) -> int:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), path)

    def of_group(gid: int) -> grp.struct_group:
        return grp.struct_group(("virt" if gid else "root", "x", gid, members))

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(grp, "getgrgid", of_group)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda *_args, **_named: found)
        check = probe.open_device(host)[1]
    assert remedy in check.remedy
    assert never not in check.remedy
    assert "pyvmm lab" in check.remedy


def test_a_file_that_is_not_kvm_is_said_so() -> None:
    kvm, check = probe.open_device(Host(device="/dev/null"))
    assert kvm is None
    assert "not KVM's device" in check.remedy


def test_another_api_version_fails(kernel: FakeKernel) -> None:
    kernel.answers["KVM_GET_API_VERSION"] = 11
    kvm, check = probe.open_device(Host(device="/dev/null"))
    assert kvm is None
    assert "version 11" in check.detail


def test_a_missing_capability_fails_if_required_and_is_a_note_if_not(kernel: FakeKernel) -> None:
    kernel.answers["KVM_CHECK_EXTENSION"] = 0
    with Kvm("/dev/null") as kvm:
        checks = {check.name: check for check in probe.capabilities(kvm)}
    assert not any(check.passed for check in checks.values())
    assert checks["KVM_CAP_IRQFD"].required
    assert "newer host kernel" in checks["KVM_CAP_IRQFD"].remedy
    assert not checks["KVM_CAP_READONLY_MEM"].required
    assert checks["KVM_CAP_READONLY_MEM"].remedy == ""


def test_too_few_memory_slots_fail(kernel: FakeKernel) -> None:
    kernel.answers["KVM_CHECK_EXTENSION"] = 8
    with Kvm("/dev/null") as kvm:
        checks = {check.name: check for check in probe.capabilities(kvm)}
    assert not checks["KVM_CAP_NR_MEMSLOTS"].passed
    assert checks["KVM_CAP_MAX_VCPUS"].detail == "8 virtual CPUs"


def test_a_question_that_fails_is_a_failed_check(kernel: FakeKernel) -> None:
    kernel.answers["KVM_CHECK_EXTENSION"] = OSError(errno.EPERM, "seccomp")
    with Kvm("/dev/null") as kvm:
        checks = list(probe.capabilities(kvm))
    assert len(checks) == len(probe.CAPABILITIES)
    assert all("KVM_CHECK_EXTENSION" in check.detail for check in checks)


def test_each_capability_is_named_after_its_number() -> None:
    for capability in probe.CAPABILITIES:
        assert getattr(abi, f"KVM_CAP_{capability.name}") == capability.number


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.EBUSY, "stop the other hypervisor"),
        (errno.ENOMEM, "memory"),
        (errno.EMFILE, "ulimit"),
        (errno.EIO, "dmesg"),
    ],
)
def test_a_vm_that_cannot_be_made_has_a_remedy(
    kernel: FakeKernel, code: int, remedy: str
) -> None:
    kernel.answers["KVM_CREATE_VM"] = OSError(code, os.strerror(code))
    with Kvm("/dev/null") as kvm:
        check = probe.create_vm(kvm)
    assert not check.passed
    assert "KVM_CREATE_VM" in check.detail
    assert remedy in check.remedy


def test_a_vcpu_that_cannot_be_mapped_is_a_failed_check(kernel: FakeKernel) -> None:
    kernel.answers["KVM_GET_VCPU_MMAP_SIZE"] = 8192
    kernel.answers["KVM_CREATE_VM"] = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    kernel.answers["KVM_CREATE_VCPU"] = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    with Kvm("/dev/null") as kvm:
        check = probe.create_vm(kvm)
    assert not check.passed
    assert "run page" in check.detail


@pytest.mark.bare
def test_this_hosts_kvm_has_all_that_the_machine_needs() -> None:
    kvm, check = probe.open_device(Host())
    assert check.passed
    assert kvm is not None
    with kvm:
        missing = [c for c in probe.capabilities(kvm) if c.required and not c.passed]
        assert missing == []
        assert probe.create_vm(kvm).passed
