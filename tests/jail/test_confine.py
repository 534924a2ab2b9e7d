"""The whole of it: what is in force, and what a host may lack."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import threading
from collections.abc import Callable

import pytest

from pyvmm.errors import ConfigError, HostError
from pyvmm.jail import confine as confine_module
from pyvmm.jail import landlock
from pyvmm.jail.calls import prctl, system_call
from pyvmm.jail.cgroup import Cgroup
from pyvmm.jail.confine import Confinement, Plan, confine
from pyvmm.jail.namespaces import Namespaces
from pyvmm.jail.root import User
from tests.support.apart import NOBODY, apart, become_nobody, refuse_calls

CAPGET, CAPSET, PERSONALITY, PRCTL, UNSHARE = 125, 126, 135, 157, 272
PRLIMIT64, CLOSE_RANGE, CREATE_RULESET = 302, 436, 444
PR_GET_NO_NEW_PRIVS = 39
NOBODY_USER = User(NOBODY, NOBODY, "nobody")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has what is given up here")


def nothing() -> None:
    """A process as the tests' own."""


def confined(
    before: Callable[[], object] = nothing,
    *,
    strict: bool = False,
    namespaces: bool = False,
    user: User | None = None,
    cgroup: Cgroup | None = None,
) -> Confinement:
    """Return the confinement of a process in which ``before`` was called."""
    def body(fd: int) -> Confinement:
        before()
        return confine(Plan(
            kept=(0, 1, 2, fd), strict=strict, user=user, cgroup=cgroup,
            namespaces=Namespaces() if namespaces else None,
        ))

    return apart(body)


def has_landlock() -> bool:
    try:
        landlock.abi()
    except OSError:
        return False
    return True


needs_landlock = pytest.mark.skipif(not has_landlock(), reason="this host has no Landlock")


@needs_landlock
def test_a_user_has_all_of_the_jail() -> None:
    found = confined(become_nobody, strict=True)
    assert found.lacking == ()
    names = [line.partition(" (")[0] for line in found.in_force if line != "W^X memory"]
    assert names == [
        "no_new_privs", "empty capability sets", "hidden memory", "data that cannot be executed",
        "closed descriptors", "Landlock", "limits of files and core dumps",
    ]


@needs_root
@needs_landlock
def test_root_has_namespaces_and_another_user_besides() -> None:
    found = confined(strict=True, namespaces=True, user=NOBODY_USER)
    assert found.lacking == ()
    assert found.in_force[:4] == (
        "no_new_privs", "an empty root and namespaces of its own",
        f"user {NOBODY}, group {NOBODY}", "empty capability sets",
    )


@needs_root
@needs_landlock
def test_nothing_is_in_reach() -> None:
    def body(fd: int) -> list[object]:
        parent = os.getppid()
        confine(Plan(kept=(0, 1, 2, fd), more_files=4, namespaces=Namespaces(), user=NOBODY_USER))

        def try_to(attempt: Callable[[], object]) -> object:
            try:
                return attempt()
            except OSError as error:
                return errno.errorcode[error.errno or 0]

        return [
            try_to(lambda: os.open("/etc/passwd", os.O_RDONLY)),
            try_to(lambda: os.open("/proc/self/mem", os.O_RDWR)),
            try_to(lambda: os.stat("/dev")),
            try_to(lambda: os.chmod("/", 0o777)),
            try_to(lambda: os.kill(parent, 0)),
            try_to(lambda: os.setresuid(0, 0, 0)),
            os.getresuid(), os.getresgid(), os.getgroups(), os.getcwd(),
        ]

    assert apart(body) == [
        "EACCES", "EACCES", "EACCES", "EROFS", "EPERM", "EPERM",
        (NOBODY,) * 3, (NOBODY,) * 3, [], "/",
    ]


def test_threads_that_start_later_are_in_the_jail() -> None:
    def body(fd: int) -> list[object]:
        confine(Plan(kept=(0, 1, 2, fd), more_files=1))
        found: list[object] = []

        def look() -> None:
            sets = ctypes.create_string_buffer(24)
            system_call(CAPGET, struct.pack("=Ii", 0x2008_0522, 0), sets)
            found.extend([prctl(PR_GET_NO_NEW_PRIVS), sets.raw])
            try:
                os.open("/", os.O_RDONLY)
            except OSError as error:
                found.append(error.errno)

        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        return found

    privileges, capabilities, error = apart(body)
    assert (privileges, capabilities) == (1, bytes(24))
    assert error == (errno.EACCES if has_landlock() else None)


def test_no_thread_may_run_already() -> None:
    """It would keep all rights."""
    def body(fd: int) -> None:
        confine_module._THREAD_ENDS_S = 0.01
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        confine(Plan(kept=(0, 1, 2, fd)))

    with pytest.raises(HostError, match="other threads run already"):
        apart(body)


@pytest.mark.parametrize("refusal", [0, errno.EPERM])
def test_a_thread_that_ends_is_waited_for(refusal: int) -> None:
    """Also in a container that forbids unshare(2), so that /proc is asked."""
    def body(fd: int) -> tuple[str, ...]:
        if refusal:
            refuse_calls(refusal, UNSHARE)
        thread = threading.Timer(0.2, nothing)
        thread.start()
        return confine(Plan(kept=(0, 1, 2, fd))).in_force

    assert "no_new_privs" in apart(body)


@pytest.mark.parametrize("refusal", [0, errno.EPERM])
def test_both_ways_see_other_threads(refusal: int) -> None:
    def body(_: int) -> tuple[bool, bool]:
        if refusal:
            refuse_calls(refusal, UNSHARE)
        alone = confine_module._is_alone()
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        return alone, confine_module._is_alone()

    assert apart(body) == (True, False)


LACKING = {
    "capabilities": (CAPSET, "the jail lacks empty capability sets: "),
    "limits": (PRLIMIT64, "the jail lacks limits of files and core dumps: "),
    "Landlock": (CREATE_RULESET, "the jail lacks Landlock: "),
}


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EPERM])
@pytest.mark.parametrize("name", LACKING)
def test_one_line_tells_of_a_step_that_the_host_lacks(name: str, error: int) -> None:
    number, line = LACKING[name]
    found = confined(lambda: refuse_calls(error, number))
    assert [told.startswith(f"{line}{os.strerror(error)}; ") for told in found.lacking] == (
        [True] if name == "Landlock" or has_landlock() else [False, True]
    )
    assert not any(told.startswith(name) for told in found.in_force)
    assert "hidden memory" in found.in_force


@pytest.mark.parametrize("name", LACKING)
def test_strict_refuses_such_a_host(name: str) -> None:
    number, line = LACKING[name]
    with pytest.raises(HostError, match=f"^--jail strict: {line}"):
        confined(lambda: refuse_calls(errno.ENOSYS, number), strict=True)


@needs_root
@pytest.mark.parametrize("number", [CREATE_RULESET, UNSHARE])
def test_strict_refuses_before_anything_is_given_up(number: int) -> None:
    """So whoever tells of it may still open a file, or import a module."""
    def body(fd: int) -> tuple[bool, int]:
        refuse_calls(errno.EPERM, number)
        with pytest.raises(HostError):
            confine(Plan(kept=(0, 1, 2, fd), strict=True, namespaces=Namespaces(),
                         user=NOBODY_USER))
        return os.path.exists("/proc"), os.getuid()

    assert apart(body) == (True, 0)


@needs_landlock
def test_a_kernel_without_close_range_lacks_nothing() -> None:
    assert confined(lambda: refuse_calls(errno.ENOSYS, CLOSE_RANGE), strict=True).lacking == ()


def test_a_container_may_forbid_all_of_it() -> None:
    """Then all of it is told, and the machine runs."""
    everything = (CAPSET, PRCTL, PRLIMIT64, CREATE_RULESET, UNSHARE, PERSONALITY)
    found = confined(lambda: refuse_calls(errno.EPERM, *everything))
    assert found.in_force == ("closed descriptors",)
    assert [line.partition(":")[0] for line in found.lacking] == [
        f"the jail lacks {name}" for name in (
            "no_new_privs", "empty capability sets", "hidden memory",
            "data that cannot be executed", "Landlock", "limits of files and core dumps",
        )
    ]


@needs_root
def test_root_in_a_container_may_have_no_namespaces() -> None:
    found = confined(lambda: refuse_calls(errno.EPERM, UNSHARE), namespaces=True)
    assert found.lacking[0] == (
        "the jail lacks an empty root and namespaces of its own: Operation not permitted; "
        "Landlock and the filter alone keep files and the network out of reach"
    )
    with pytest.raises(HostError, match=r"^--jail strict: the jail lacks an empty root"):
        confined(lambda: refuse_calls(errno.EPERM, UNSHARE), namespaces=True, strict=True)


def test_another_user_is_not_left_out() -> None:
    """Whoever names one relies on it."""
    other = User(NOBODY - 1, NOBODY - 1, "other")
    with pytest.raises(ConfigError, match=r"^--user other: needs root"):
        confined(become_nobody, user=other)


def test_a_cgroup_is_not_left_out() -> None:
    with pytest.raises(ConfigError, match=r"^--cgroup /nowhere/group: cannot be made"):
        confined(cgroup=Cgroup(directory="/nowhere/group"))
