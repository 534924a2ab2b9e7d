"""Kvm, Vm and Vcpu: errors that name the ioctl, ranges, ownership; no KVM unless marked."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyvmm.errors import HostError, KvmError
from pyvmm.kvm import abi, ioctl
from pyvmm.kvm.cpuid_entry import CpuidEntry
from pyvmm.kvm.exits import ExitReason
from pyvmm.kvm.handles import Kvm, Vcpu, Vm
from tests.kvm.conftest import FakeKernel


@pytest.fixture
def fake_vcpu(kernel: FakeKernel) -> Iterator[Vcpu]:
    fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    with Vcpu(fd, mmap.mmap(-1, 8192)) as vcpu:
        yield vcpu


def test_a_missing_device_is_named_with_its_errno(tmp_path: Path) -> None:
    path = str(tmp_path / "kvm")
    with pytest.raises(KvmError, match="No such file") as caught:
        Kvm(path)
    assert caught.value.errno == errno.ENOENT
    assert path in str(caught.value)


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENODEV, errno.EBUSY, errno.ENXIO])
def test_a_device_that_cannot_be_opened_is_a_kvm_error(
    code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, flags: int) -> int:
        raise OSError(code, os.strerror(code), path)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(KvmError) as caught:
        Kvm()
    assert caught.value.errno == code
    assert "open /dev/kvm" in str(caught.value)
    assert "pyvmm doctor" in str(caught.value)


def test_a_file_that_is_not_kvm_is_refused_and_closed() -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(KvmError, match=r"KVM_GET_API_VERSION.*not a KVM device"):
        Kvm("/dev/null")
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_another_api_version_is_refused(kernel: FakeKernel) -> None:
    kernel.answers["KVM_GET_API_VERSION"] = 11
    with pytest.raises(HostError, match="version 11, not 12"):
        Kvm("/dev/null")


def test_a_failing_ioctl_is_named_with_its_errno(kernel: FakeKernel, fake_vm: Vm) -> None:
    kernel.answers["KVM_CREATE_IRQCHIP"] = OSError(errno.EEXIST, "exists")
    with pytest.raises(KvmError, match=r"KVM_CREATE_IRQCHIP: File exists \[errno 17\]") as caught:
        fake_vm.create_irqchip()
    assert (caught.value.ioctl, caught.value.errno) == ("KVM_CREATE_IRQCHIP", errno.EEXIST)


def test_a_busy_host_is_explained(kernel: FakeKernel) -> None:
    kernel.answers["KVM_CREATE_VM"] = OSError(errno.EBUSY, "busy")
    with Kvm("/dev/null") as kvm, pytest.raises(KvmError, match="another hypervisor"):
        kvm.create_vm()


def test_an_interrupted_ioctl_is_retried(kernel: FakeKernel) -> None:
    left = [InterruptedError(errno.EINTR, "once"), InterruptedError(errno.EINTR, "twice")]

    def answer(_: bytearray) -> int:
        if left:
            raise left.pop()
        return 0

    kernel.answers["KVM_SET_IDENTITY_MAP_ADDR"] = answer
    with Vm(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC), 8192) as vm:
        vm.set_identity_map_addr(0xFFFB_C000)
    assert left == []
    assert kernel.calls == [
        ("KVM_SET_IDENTITY_MAP_ADDR", (0xFFFB_C000).to_bytes(8, "little"))
    ] * 3


@pytest.mark.parametrize(
    "call",
    [
        lambda vm: vm.set_user_memory_region(1 << 32, 0, 4096, 0),
        lambda vm: vm.set_user_memory_region(0, -4096, 4096, 0),
        lambda vm: vm.set_user_memory_region(0, 0, 1 << 64, 0),
        lambda vm: vm.irqfd(-1, 5),
        lambda vm: vm.irq_line(-1, True),
        lambda vm: vm.ioeventfd(3, 1 << 64, 4),
        lambda vm: vm.ioeventfd(3, 0, 4, datamatch=-1),
        lambda vm: vm.set_tss_addr(-1),
        lambda vm: vm.set_tss_addr(1 << 64),
    ],
)
def test_a_number_out_of_range_never_reaches_the_kernel(
    call: Callable[[Vm], None], kernel: FakeKernel, fake_vm: Vm
) -> None:
    with pytest.raises(ValueError, match=r"does not fit|not an unsigned long"):
        call(fake_vm)
    assert kernel.calls == []


def test_a_read_only_region_carries_the_flag(kernel: FakeKernel, fake_vm: Vm) -> None:
    fake_vm.set_user_memory_region(3, 0xD000_0000, 4096, 0x7000_0000, read_only=True)
    expected = struct.pack("<IIQQQ", 3, 2, 0xD000_0000, 4096, 0x7000_0000)
    assert kernel.calls == [("KVM_SET_USER_MEMORY_REGION", expected)]


def test_ioeventfd_flags_say_match_port_and_removal(kernel: FakeKernel, fake_vm: Vm) -> None:
    fake_vm.ioeventfd(7, 0xD000_0050, 4, datamatch=0)
    fake_vm.ioeventfd(7, 0xF4, 1, pio=True, deassign=True)
    layout = struct.Struct("<QQIiI36x")
    assert [layout.unpack(bytes(data)) for _, data in kernel.calls if isinstance(data, bytes)] == [
        (0, 0xD000_0050, 4, 7, 1),
        (0, 0xF4, 1, 7, 6),
    ]


def test_irqfd_and_pit_structures(kernel: FakeKernel, fake_vm: Vm) -> None:
    fake_vm.irqfd(9, 5)
    fake_vm.irqfd(9, 5, deassign=True)
    fake_vm.create_pit2()
    assert [data for _, data in kernel.calls] == [
        struct.pack("<IIII16x", 9, 5, 0, 0),
        struct.pack("<IIII16x", 9, 5, 1, 0),
        struct.pack("<I60x", 1),
    ]


def test_a_closed_handle_is_ebadf_and_closes_twice(kernel: FakeKernel, fake_vm: Vm) -> None:
    fake_vm.close()
    fake_vm.close()
    with pytest.raises(KvmError, match="KVM_CREATE_IRQCHIP") as caught:
        fake_vm.create_irqchip()
    assert caught.value.errno == errno.EBADF


def test_a_run_page_that_cannot_be_mapped_is_a_host_error(
    kernel: FakeKernel, fake_vm: Vm
) -> None:
    fd = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    kernel.answers["KVM_CREATE_VCPU"] = fd
    with pytest.raises(HostError, match="run page of vCPU 0"):
        fake_vm.create_vcpu(0)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_refused_msr_is_named(kernel: FakeKernel, fake_vcpu: Vcpu) -> None:
    kernel.answers["KVM_SET_MSRS"] = 1
    with pytest.raises(KvmError, match="MSR 0x10a refused"):
        fake_vcpu.set_msrs({0x1A0: 1, 0x10A: 0})
    assert kernel.calls == [
        ("KVM_SET_MSRS", struct.pack("<II IIQ IIQ", 2, 0, 0x1A0, 0, 1, 0x10A, 0, 0))
    ]


def test_cpuid_entries_are_laid_out_as_the_kernel_wants(
    kernel: FakeKernel, fake_vcpu: Vcpu
) -> None:
    fake_vcpu.set_cpuid([CpuidEntry(7, 1, True, 10, 11, 12, 13)])
    expected = struct.pack("<II 10I", 1, 0, 7, 1, 1, 10, 11, 12, 13, 0, 0, 0)
    assert kernel.calls == [("KVM_SET_CPUID2", expected)]


def test_supported_cpuid_asks_again_with_more_room(kernel: FakeKernel) -> None:
    offered: list[int] = []

    def answer(buffer: bytearray) -> int:
        room = struct.unpack_from("<I", buffer)[0]
        offered.append(room)
        if room < 512:
            raise OSError(errno.E2BIG, "too big")
        struct.pack_into("<II 7I", buffer, 0, 1, 0, 0xD, 1, 1, 4, 5, 6, 7)
        return 0

    kernel.answers["KVM_GET_SUPPORTED_CPUID"] = answer
    with Kvm("/dev/null") as kvm:
        assert kvm.supported_cpuid() == [CpuidEntry(0xD, 1, True, 4, 5, 6, 7)]
    assert offered == [256, 512]


def test_supported_cpuid_gives_up_when_no_room_is_enough(kernel: FakeKernel) -> None:
    kernel.answers["KVM_GET_SUPPORTED_CPUID"] = OSError(errno.E2BIG, "too big")
    with Kvm("/dev/null") as kvm, pytest.raises(KvmError, match="KVM_GET_SUPPORTED_CPUID"):
        kvm.supported_cpuid()


def test_run_raises_interrupted_error_for_a_kick(kernel: FakeKernel, fake_vcpu: Vcpu) -> None:
    kernel.answers["KVM_RUN"] = InterruptedError(errno.EINTR, "kicked")
    with pytest.raises(InterruptedError):
        fake_vcpu.run()


def test_run_names_kvm_run_when_it_fails(kernel: FakeKernel, fake_vcpu: Vcpu) -> None:
    kernel.answers["KVM_RUN"] = OSError(errno.EFAULT, "fault")
    with pytest.raises(KvmError, match="KVM_RUN") as caught:
        fake_vcpu.run()
    assert caught.value.errno == errno.EFAULT


def test_a_pause_is_noted_where_the_guest_has_a_clock_to_note_it_in(
    kernel: FakeKernel, fake_vcpu: Vcpu
) -> None:
    fake_vcpu.note_pause()
    assert [name for name, _ in kernel.calls] == ["KVM_KVMCLOCK_CTRL"]
    kernel.answers["KVM_KVMCLOCK_CTRL"] = OSError(errno.EINVAL, "no kvm-clock")
    fake_vcpu.note_pause()


def _loop_forever(vm: Vm) -> tuple[Vcpu, mmap.mmap]:
    """A vCPU in real mode at 0x1000, where ``jmp .`` lies."""
    ram = mmap.mmap(-1, 0x2000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    ram[0x1000:0x1002] = b"\xeb\xfe"
    vm.set_user_memory_region(0, 0, len(ram), _address(ram))
    vcpu = vm.create_vcpu(0)
    sregs = vcpu.get_sregs()
    sregs.cs.base, sregs.cs.selector = 0, 0
    vcpu.set_sregs(sregs)
    vcpu.set_regs(abi.kvm_regs(rip=0x1000, rflags=2))
    return vcpu, ram


def _address(ram: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(ram))


@pytest.mark.bare
def test_this_hosts_kvm_answers() -> None:
    with Kvm() as kvm:
        assert kvm.api_version == abi.KVM_API_VERSION
        assert kvm.check_extension(abi.KVM_CAP_USER_MEMORY) == 1
        assert kvm.vcpu_mmap_size >= 2 * mmap.PAGESIZE
        leaves = {entry.function for entry in kvm.supported_cpuid()}
    assert {0, 1, abi.KVM_CPUID_SIGNATURE, 0x8000_0001} <= leaves


@pytest.mark.bare
def test_closing_everything_leaves_no_fd_behind() -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        vcpu.close()
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.bare
def test_registers_read_back_as_written() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        vcpu.set_cpuid(kvm.supported_cpuid())
        vcpu.set_regs(abi.kvm_regs(rax=(1 << 64) - 1, r15=0x1234, rip=0x7C00, rflags=2))
        regs = vcpu.get_regs()
        assert (regs.rax, regs.r15, regs.rip) == ((1 << 64) - 1, 0x1234, 0x7C00)
        fpu = vcpu.get_fpu()
        fpu.fcw, fpu.xmm[3][7] = 0x37F, 0xA5
        vcpu.set_fpu(fpu)
        assert (vcpu.get_fpu().fcw, vcpu.get_fpu().xmm[3][7]) == (0x37F, 0xA5)
        vcpu.set_msrs({0x174: 0x10})  # IA32_SYSENTER_CS
        assert vcpu.get_msrs([0x174]) == {0x174: 0x10}
        assert vcpu.get_mp_state() == abi.KVM_MP_STATE_RUNNABLE


@pytest.mark.bare
def test_addresses_above_two_gigabytes_reach_the_kernel() -> None:
    """KVM_SET_TSS_ADDR takes its address as the argument itself, which no C int holds."""
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.set_identity_map_addr(0xFFFB_C000)
        vm.set_tss_addr(0xFFFB_D000)
        with pytest.raises(KvmError, match="KVM_SET_TSS_ADDR"):
            vm.set_tss_addr(0xFFFF_F000)


@pytest.mark.bare
@pytest.mark.parametrize("entry", [ioctl.entry_by_fcntl, ioctl.entry_by_libc])
def test_request_exit_stops_the_guest_whichever_way_it_is_entered(
    entry: Callable[[int], Callable[[], object]],
) -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        vcpu, ram = _loop_forever(vm)
        with vcpu:
            vcpu.request_exit()
            with pytest.raises(InterruptedError):
                entry(vcpu.fd)()
            vcpu.clear_exit_request()
    assert ram[0x1000] == 0xEB


@pytest.mark.bare
def test_a_running_guest_is_kicked_by_a_signal_from_another_thread() -> None:
    handler = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with Kvm() as kvm, kvm.create_vm() as vm:
            vcpu, ram = _loop_forever(vm)
            with vcpu:

                def kick() -> None:
                    vcpu.request_exit()
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

                timer = threading.Timer(0.05, kick)
                timer.start()
                with pytest.raises(InterruptedError):
                    vcpu.run()
                timer.join()
                vcpu.clear_exit_request()
                ram[0x1000:0x1001] = b"\xf4"  # hlt: it runs on from where it was
                assert vcpu.run() == ExitReason.HLT
                assert vcpu.get_regs().rip == 0x1001
    finally:
        signal.signal(signal.SIGUSR1, handler)
