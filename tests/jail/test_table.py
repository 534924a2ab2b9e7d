"""The filters do what the table says: every system call, every kind, every tested argument."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.jail import bpf, generate, ioctls
from pyvmm.jail.programs import PROGRAMS
from pyvmm.jail.syscalls import NAMES, NUMBERS
from pyvmm.jail.table import ALL, HEIR, KINDS, REFUSED, RULES, Rule
from pyvmm.kvm import abi, irqchip_abi, state_abi
from pyvmm.ram import pages
from tests.support.bpf_interpreter import run
from tests.support.table_words import said

KILLED = bpf.KILL_PROCESS
ODD = (0, 1, 2, 4, 5, 0x40, 0xFFFF, 0x7FFFFFFE, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 32, (1 << 64) - 1)
"""Arguments that no rule is about, and bits at the edges."""
NOT_NUMBERS = (335, 400, 423, 512, 547, 600, 1 << 30, 1 << 30 | 1, 1 << 31, (1 << 32) - 1)
"""Numbers without a system call, and the x32 ABI's."""


def arguments_about(name: str) -> Iterator[tuple[int, ...]]:
    """Arguments that meet each rule about ``name``, and that miss it by one argument or bit."""
    interesting: dict[int, set[int]] = {}
    for rule in RULES:
        if rule.syscall == name:
            for one in rule.when:
                for value in one.values:
                    interesting.setdefault(one.argument, set()).update(
                        (value, value ^ 1, value ^ one.mask, value | 1 << 33, value + 1)
                    )
    columns = [sorted({*interesting.get(at, ()), *(ODD if at in interesting else (0,))})
               for at in range(6)]
    yield from itertools.product(*columns)


@pytest.mark.parametrize("kind", ALL)
def test_each_filter_is_what_the_table_says(kind: str) -> None:
    program, _ = PROGRAMS[kind]
    for name, number in NUMBERS.items():
        for arguments in arguments_about(name):
            assert run(program, number, arguments) == said(kind, name, arguments), (
                name, [hex(one) for one in arguments]
            )
    for number in NOT_NUMBERS:
        assert number in (*NAMES, *NOT_NUMBERS)
        if number not in NAMES:
            assert run(program, number) == KILLED
    for number in (*NAMES, 512):
        assert run(program, number, arch=0x40000003) == KILLED  # 32-bit code


@settings(deadline=None)
@given(
    kind=st.sampled_from(ALL), name=st.sampled_from(sorted({rule.syscall for rule in RULES})),
    arguments=st.tuples(*[st.one_of(st.integers(0, (1 << 64) - 1), st.sampled_from(
        (*ODD, *ioctls.REQUESTS.values())
    ))] * 6),
)
def test_any_arguments_are_judged_as_the_table_says(
    kind: str, name: str, arguments: tuple[int, ...]
) -> None:
    assert run(PROGRAMS[kind][0], NUMBERS[name], arguments) == said(kind, name, arguments)


def test_what_is_generated_is_that_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert generate.PROGRAMS.read_text() == generate.programs_text()
    page = generate.PAGE.read_text()
    assert generate.page_text(page) == page
    assert generate.main(["--check"]) == 0
    stale = tmp_path / "programs.py"
    stale.write_text("")
    monkeypatch.setattr(generate, "PROGRAMS", stale)
    assert generate.main(["--check"]) == 1
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0


def test_the_page_names_every_system_call_of_the_table() -> None:
    page = generate.PAGE.read_text()
    for rule in RULES:
        assert f"`{rule.syscall}`" in page, rule
        assert rule.syscall != "ioctl" or rule.only in page, rule


NEVER = """\
    execve execveat ptrace process_vm_writev process_vm_readv fork vfork socket socketpair connect
    bind listen io_uring_setup io_uring_enter io_uring_register bpf userfaultfd perf_event_open
    unshare setns mount umount2 chroot pivot_root pidfd_open pidfd_getfd pidfd_send_signal keyctl
    add_key request_key open_by_handle_at init_module finit_module kexec_load setuid setgid capset
    kill tkill rt_sigqueueinfo rt_tgsigqueueinfo personality modify_ldt arch_prctl shmat
    pkey_mprotect memfd_secret process_madvise openat2 unlink rename mkdir creat truncate chmod
    iopl ioperm move_pages migrate_pages vmsplice remap_file_pages landlock_restrict_self
    setrlimit kcmp reboot swapon acct quotactl syslog
"""


@pytest.mark.parametrize("kind", ALL)
def test_no_kind_may(kind: str) -> None:
    program, _ = PROGRAMS[kind]
    for name in NEVER.split():
        for arguments in itertools.product((0, 1, (1 << 64) - 1), repeat=3):
            assert run(program, NUMBERS[name], arguments) == KILLED, name


@pytest.mark.parametrize("kind", ALL)
def test_no_kind_opens_a_file_by_name(kind: str) -> None:
    for name in ("open", "openat", "openat2", "open_by_handle_at", "creat"):
        for flags in range(4):
            assert run(PROGRAMS[kind][0], NUMBERS[name], (3, 1 << 40, flags)) != bpf.ALLOW


@pytest.mark.parametrize("kind", ALL)
def test_no_kind_maps_or_makes_code(kind: str) -> None:
    for name, prot in itertools.product(("mmap", "mprotect"), range(8)):
        action = run(PROGRAMS[kind][0], NUMBERS[name], (0, 4096, prot, 0x22))
        assert (action == bpf.ALLOW) == (not prot & 4), (name, prot)


@pytest.mark.parametrize("kind", ALL)
def test_no_kind_changes_what_the_machine_is_made_of(kind: str) -> None:
    for name in (
        "KVM_CREATE_VM", "KVM_CREATE_VCPU", "KVM_SET_USER_MEMORY_REGION", "KVM_SET_TSS_ADDR",
        "KVM_SET_IDENTITY_MAP_ADDR", "KVM_CREATE_IRQCHIP", "KVM_CREATE_PIT2", "KVM_IRQFD",
        "KVM_IOEVENTFD",
    ):
        assert run(PROGRAMS[kind][0], NUMBERS["ioctl"], (5, ioctls.KVM[name])) == KILLED, name


@pytest.mark.parametrize("kind", ALL)
def test_no_kind_signals_another_process(kind: str) -> None:
    program, _ = PROGRAMS[kind]  # with the placeholder in place of the process's number
    for pid, number in itertools.product((0, 1, -1, os.getpid(), os.getppid()), range(65)):
        assert run(program, NUMBERS["tgkill"], (pid, pid, number)) == KILLED
    kick = run(program, NUMBERS["tgkill"], (bpf.OWN_PID, 7, signal.SIGRTMIN)) == bpf.ALLOW
    assert kick == (kind in ("control", "snapshot", "main", "export-watch"))


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind != "snapshot"])
def test_no_kind_but_the_savers_makes_threads_or_processes(kind: str) -> None:
    for flags in (0, 17, 0x3D0F00, 0x1200011):
        assert run(PROGRAMS[kind][0], NUMBERS["clone"], (flags,)) == KILLED
    assert run(PROGRAMS[kind][0], NUMBERS["clone3"]) != bpf.ALLOW


def test_only_vcpus_run_the_guest() -> None:
    """And whoever may start their threads anew, since these inherit its filter."""
    request = ioctls.KVM["KVM_RUN"]
    allowed = {
        kind for kind in ALL if run(PROGRAMS[kind][0], 16, (5, request)) == bpf.ALLOW
    }
    assert allowed == {"vcpu", "vcpu-elsewhere", "vcpu-serving", "snapshot"}


def test_the_requests_are_those_of_the_binding() -> None:
    theirs = {
        name: int(number)
        for module in (abi, irqchip_abi, state_abi)
        for number, name in module.IOCTL_NAMES.items()
    }
    assert dict(ioctls.KVM) == theirs
    assert ioctls.REQUESTS["PAGEMAP_SCAN"] == pages._PAGEMAP_SCAN


def test_every_rule_is_well_formed() -> None:
    for rule in RULES:
        assert rule.syscall in NUMBERS
        assert rule.kinds
        assert set(rule.kinds) <= set(KINDS)
        assert rule.why
        assert bool(rule.only) == bool(rule.when), rule
    assert {one.syscall for one in REFUSED} <= set(NUMBERS)


def test_no_rule_is_made_needless_by_another() -> None:
    seen: set[tuple[str, str, tuple[bpf.Condition, ...]]] = set()
    free = {(rule.syscall, kind) for rule in RULES if not rule.when for kind in rule.kinds}
    for rule in RULES:
        for kind in rule.kinds:
            assert kind == HEIR or (rule.syscall, kind, rule.when) not in seen, rule
            seen.add((rule.syscall, kind, rule.when))
            assert not rule.when or (rule.syscall, kind) not in free, rule


def test_a_table_may_not_name_an_unknown_call() -> None:
    with pytest.raises(KeyError):
        generate.filter_by((Rule("no_such_call", ("vcpu",), "a mistake"),), (), "vcpu")
