"""The answers of /dev/kvm are kept for a process that has closed it."""

from __future__ import annotations

import os

import pytest

from pyvmm.errors import HostError
from pyvmm.kvm import answers, state_abi
from pyvmm.kvm.answers import Answers, answers_of
from pyvmm.kvm.handles import Kvm

pytestmark = pytest.mark.bare


def test_a_vcpu_is_saved_and_restored_without_the_kvm_that_was_asked_before() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.create_irqchip()
        with vm.create_vcpu(0) as vcpu:
            expected = vcpu.save()
            supported = kvm.supported_cpuid()
            kvm.answers = None
            answers_of(kvm).ask_all()
            kvm.close()
            state = vcpu.save()
            assert set(state) == set(expected)
            assert _indices(state["msrs"]) == _indices(expected["msrs"])
            vcpu.restore(state)
            assert answers_of(kvm).supported_cpuid() == supported
            assert not [fd for fd in os.listdir("/proc/self/fd") if _leads_to_kvm(fd)]


def test_the_numbers_are_those_of_the_state_s_module() -> None:
    assert state_abi.KVM_GET_MSR_INDEX_LIST == answers.KVM_GET_MSR_INDEX_LIST
    assert set(answers.CAPABILITIES) == {
        state_abi.KVM_CAP_SREGS2, state_abi.KVM_CAP_XSAVE2, state_abi.KVM_CAP_XCRS,
        state_abi.KVM_CAP_GET_TSC_KHZ,
    }


def test_each_answer_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = Kvm.check_extension

    def count(kvm: Kvm, capability: int) -> int:
        asked.append(capability)
        return real(kvm, capability)

    monkeypatch.setattr(Kvm, "check_extension", count)
    with Kvm() as kvm:
        kept = answers_of(kvm)
        kept.ask_all()
        before = list(asked)
        kept.ask_all()
        assert kept.capability(state_abi.KVM_CAP_XCRS) == 1
        assert asked == before
        assert len(set(asked)) == len(asked)
        assert answers_of(kvm) is kept


def test_what_was_not_asked_before_the_end_is_an_error() -> None:
    kvm = Kvm()
    kvm.close()
    kept = Answers(kvm)
    for ask in (kept.msr_indices, kept.supported_cpuid, lambda: kept.capability(1)):
        with pytest.raises(HostError, match="only while the /dev/kvm that made it is open"):
            ask()


def _indices(msrs: object) -> list[int]:
    assert isinstance(msrs, list)
    assert msrs
    return [index for index, _ in msrs]


def _leads_to_kvm(fd: str) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == "/dev/kvm"
    except OSError:
        return False
