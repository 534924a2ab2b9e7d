"""The vCPUs of a machine: how many there may be, their CPUID, and what runs them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from pyvmm.board.board import Board
from pyvmm.board.consoles import Consoles
from pyvmm.config import RunConfig
from pyvmm.errors import ConfigError
from pyvmm.kvm.abi import KVM_CAP_MAX_VCPUS, KVM_CAP_TSC_DEADLINE_TIMER
from pyvmm.kvm.handles import Kvm, Vcpu, Vm
from pyvmm.run.runner import Runner
from pyvmm.run.vcpu_loop import VcpuLoop


def check_cpus(kvm: Kvm, cpus: int) -> None:
    """ConfigError if this KVM gives no VM so many vCPUs."""
    # Documentation/virt/kvm/api.rst, 4.7: without the capability, what a KVM has always had.
    limit = kvm.check_extension(KVM_CAP_MAX_VCPUS) or 4
    if cpus > limit:
        raise ConfigError(f"--cpus {cpus}", f"this host's KVM allows at most {limit}")


def make_loops(
    config: RunConfig,
    kvm: Kvm,
    vm: Vm,
    vcpus: Sequence[Vcpu],
    board: Board,
    runner: Runner,
    consoles: Consoles,
    cpuid: Sequence[bytes] | None,
) -> list[VcpuLoop]:
    """Give each of ``vcpus`` its CPUID, or that of ``cpuid``; return what runs them."""
    if cpuid is None:
        describe_cpus(config, kvm, vcpus, board.memory.regions[-1].end)
    else:
        for vcpu, answers in zip(vcpus, cpuid, strict=True):
            vcpu.set_cpuid(answers)
    loops: list[VcpuLoop] = []
    for vcpu in vcpus:
        loops.append(VcpuLoop(
            vcpu, pio=board.pio, mmio=board.mmio, finish=runner.finish, machine=loops,
            describe=functools.partial(_describe, board, vcpu),
            at_end=consoles.finish, can_be_woken=vm.can_wake,
        ))
    return loops


def describe_cpus(config: RunConfig, kvm: Kvm, vcpus: Sequence[Vcpu], memory_end: int) -> None:
    """Give each of ``vcpus`` the CPUID that ``config`` asks for; ConfigError."""
    from pyvmm.x86 import cpuid  # not for a machine of a snapshot

    tsc_deadline = bool(kvm.check_extension(KVM_CAP_TSC_DEADLINE_TIMER))
    for vcpu in vcpus:
        vcpu.set_cpuid(cpuid.build(
            kvm.supported_cpuid(), config.cpu, vcpu.index,
            vcpu_count=config.cpus, tsc_deadline=tsc_deadline, memory_end=memory_end,
        ))


def _describe(board: Board, vcpu: Vcpu) -> str:
    from pyvmm.x86 import cpu  # a machine of a snapshot needs it only now

    return cpu.describe_vcpu(board.memory, vcpu)
