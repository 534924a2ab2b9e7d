"""Each test gives up something in a process of its own, and tries to use it there."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.jail import privileges
from pyvmm.jail.calls import prctl, system_call
from tests.support.apart import NOBODY, EndedApartError, apart, become_nobody, status_field

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has what is given up here")
CAPABILITY_SETS = ("CapInh", "CapPrm", "CapEff", "CapAmb")
PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE = 47, 2
PR_GET_DUMPABLE, PR_SET_DUMPABLE = 3, 4
PR_GET_MDWE = 66
PERSONALITY, READ_IMPLIES_EXEC = 135, 0x0040_0000


def test_new_privileges_are_refused_in_threads_that_start_later() -> None:
    def body(_: int) -> list[str]:
        before = status_field("NoNewPrivs")
        privileges.no_new_privileges()
        found = [before, status_field("NoNewPrivs")]
        thread = threading.Thread(target=lambda: found.append(status_field("NoNewPrivs")))
        thread.start()
        thread.join()
        return found

    assert apart(body) == ["0", "1", "1"]


@needs_root
def test_a_set_uid_program_gives_nobody_root(tmp_path: Path) -> None:
    program = tmp_path / "id"
    shutil.copy("/usr/bin/id", program)
    program.chmod(0o4755)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)

    def user_of_program(*, is_jailed: bool) -> str:
        def body(_: int) -> str:
            become_nobody()
            if is_jailed:
                privileges.no_new_privileges()
            return subprocess.run(
                [program, "-u"], stdout=subprocess.PIPE, text=True, check=True
            ).stdout.strip()

        return apart(body)

    assert user_of_program(is_jailed=False) == "0"
    assert user_of_program(is_jailed=True) == str(NOBODY)


def capabilities() -> set[int]:
    return {int(status_field(name), 16) for name in CAPABILITY_SETS}


def test_no_capability_is_left() -> None:
    def body(_: int) -> set[int]:
        privileges.drop_capabilities()
        return capabilities()

    assert apart(body) == {0}


@needs_root
def test_capabilities_that_programs_inherit_are_dropped_too() -> None:
    def body(_: int) -> tuple[set[int], set[int]]:
        header, chown = privileges._CAP_HEADER, 1 << 0
        data = b"".join(number.to_bytes(4, "little") for number in (chown, chown, chown, 0, 0, 0))
        system_call(privileges._CAPSET, header, data)
        prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, 0)
        before = capabilities()
        privileges.drop_capabilities()
        return before, capabilities()

    assert apart(body) == ({1}, {0})


@needs_root
def test_an_attendant_keeps_the_capabilities_that_files_need() -> None:
    def body(_: int) -> tuple[set[int], str]:
        privileges.drop_capabilities(kept=privileges.FILE_CAPABILITIES)
        return capabilities(), status_field("CapEff")

    sets, effective = apart(body)
    assert sets <= {0, privileges.FILE_CAPABILITIES}
    assert int(effective, 16) & ~privileges.FILE_CAPABILITIES == 0


@needs_root
def test_capabilities_come_back_after_they_were_put_aside() -> None:
    def body(_: int) -> tuple[str, str, str]:
        before = status_field("CapEff")
        with privileges.capabilities_put_aside():
            meanwhile = status_field("CapEff")
        return before, meanwhile, status_field("CapEff")

    before, meanwhile, after = apart(body)
    assert int(before, 16)
    assert int(meanwhile, 16) == 0
    assert after == before


@needs_root
def test_a_program_that_root_executes_gains_no_capability() -> None:
    """The bounding set is full, but programs gain nothing from it."""
    def body(_: int) -> tuple[str, str]:
        privileges.no_new_privileges()
        privileges.drop_capabilities()
        lines = subprocess.run(
            ["grep", "Cap", "/proc/self/status"], stdout=subprocess.PIPE, text=True, check=True
        ).stdout.splitlines()
        found = dict(line.split(":\t") for line in lines)
        return found["CapPrm"], found["CapEff"]

    assert apart(body) == ("0" * 16, "0" * 16)


def test_root_without_capabilities_may_not_even_trace_nor_change_the_user() -> None:
    def body(_: int) -> None:
        privileges.drop_capabilities()
        os.setresuid(NOBODY, NOBODY, NOBODY)

    if os.geteuid() == NOBODY:
        pytest.skip("nobody may become nobody")
    with pytest.raises(PermissionError):
        apart(body)


def test_memory_is_hidden_from_the_same_user() -> None:
    def body(_: int) -> list[str]:
        become_nobody()
        prctl(PR_SET_DUMPABLE, 1)  # a process that has changed its user is hidden already
        out, into = os.pipe()
        pid = os.fork()
        if pid == 0:
            privileges.hide_memory()
            os.write(into, b"1")
            signal.pause()
        os.read(out, 1)
        found = []
        for name in ("mem", "environ", "maps", "fd/0"):
            try:
                os.close(os.open(f"/proc/{pid}/{name}", os.O_RDONLY))
                found.append(f"{name} opens")
            except PermissionError:
                found.append(name)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return found

    assert apart(body) == ["mem", "environ", "maps", "fd/0"]


def test_no_core_is_dumped() -> None:
    def body(_: int) -> int:
        _, most = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (most, most))
        privileges.hide_memory()
        assert prctl(PR_GET_DUMPABLE) == 0
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGQUIT)
        return 0

    with pytest.raises(EndedApartError) as ended:
        apart(body)
    assert os.WTERMSIG(ended.value.status) == signal.SIGQUIT
    assert not os.WCOREDUMP(ended.value.status)


def protection_of(memory: mmap.mmap) -> str:
    """Return the protection of mapped memory, as ``rw-p``."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    with open("/proc/self/maps") as file:  # noqa: PTH123 - in a process of its own
        for line in file:
            places, protection = line.split()[:2]
            start, end = (int(place, 16) for place in places.split("-"))
            if start <= address < end:
                return protection
    raise AssertionError("not mapped")


def test_memory_that_is_mapped_to_be_read_cannot_be_executed() -> None:
    def body(_: int) -> tuple[str, str]:
        system_call(PERSONALITY, READ_IMPLIES_EXEC)
        before = protection_of(mmap.mmap(-1, 4096))
        privileges.no_implied_code()
        return before, protection_of(mmap.mmap(-1, 5 * 4096))

    before, after = apart(body)
    assert (before[:3], after[:3]) == ("rwx", "rw-")


def test_an_ordinary_personality_stays() -> None:
    def body(_: int) -> tuple[int, int]:
        before = system_call(PERSONALITY, -1)
        privileges.no_implied_code()
        return before, system_call(PERSONALITY, -1)

    before, after = apart(body)
    assert before == after


def has_no_new_code() -> bool:
    """True if this kernel can refuse code (Linux 6.3): PR_GET_MDWE is known."""
    try:
        prctl(PR_GET_MDWE)
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_no_new_code(), reason="this kernel has no PR_SET_MDWE (Linux 6.3)")
def test_memory_that_was_written_cannot_be_executed() -> None:
    both = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC

    def body(_: int) -> list[int]:
        mmap.mmap(-1, 4096, prot=both).close()
        written = mmap.mmap(-1, 4096)
        written.write(b"\xc3")
        address = ctypes.addressof(ctypes.c_char.from_buffer(written))
        privileges.no_new_code()
        found = []
        for attempt in (
            lambda: mmap.mmap(-1, 4096, prot=both),
            lambda: protect(address, mmap.PROT_READ | mmap.PROT_EXEC),
        ):
            try:
                attempt()
                found.append(0)
            except OSError as error:
                found.append(error.errno or -1)
        protect(address, mmap.PROT_READ)
        return found

    assert apart(body) == [errno.EACCES, errno.EACCES]


def protect(address: int, protection: int) -> None:
    """mprotect(2) of one page."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(4096), protection):
        raise OSError(ctypes.get_errno(), "mprotect")


def test_no_file_can_be_opened_beyond_the_number_that_is_spare() -> None:
    def body(fd: int) -> tuple[int, int]:
        spare = os.dup(0)  # a gap below the others, once it is closed
        kept = {int(name) for name in os.listdir("/proc/self/fd")}
        os.close(spare)
        kept = {fd for fd in kept if is_open(fd)}
        privileges.limit_resources(kept, 3, None)
        opened = 0
        try:
            while True:
                os.dup(0)
                opened += 1
        except OSError as error:
            return opened, error.errno or 0

    assert apart(body) == (3, errno.EMFILE)


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_a_file_cannot_be_written_beyond_the_limit(tmp_path: Path) -> None:
    def body(fd: int) -> tuple[int, int, int]:
        file = os.open(tmp_path / "disk", os.O_RDWR | os.O_CREAT)
        privileges.limit_resources((0, 1, 2, fd, file), 0, 4096)
        written = os.pwrite(file, b"x" * 10, 4096 - 10), os.pwrite(file, b"x" * 10, 4096 - 4)
        try:
            os.pwrite(file, b"x", 4096)
        except OSError as error:
            return *written, error.errno or 0
        return *written, 0

    assert apart(body) == (10, 4, errno.EFBIG)


def test_without_a_limit_a_file_may_grow(tmp_path: Path) -> None:
    def body(fd: int) -> int:
        file = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT)
        privileges.limit_resources((0, 1, 2, fd, file), 0, None)
        return os.pwrite(file, b"x", 1 << 32)

    assert apart(body) == 1


def test_limits_that_are_lower_already_stay() -> None:
    def body(fd: int) -> list[tuple[int, int]]:
        become_nobody()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 2000))
        resource.setrlimit(resource.RLIMIT_NOFILE, (fd + 1, fd + 1))
        privileges.limit_resources(range(fd + 1), 100, 4096)
        return [
            resource.getrlimit(which)
            for which in (resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE, resource.RLIMIT_CORE)
        ]

    size, (soft, hard), core = apart(body)
    assert size == (1000, 2000)
    assert soft == hard
    assert core == (0, 0)


@given(kept=st.sets(st.integers(0, 60)), more=st.integers(0, 20))
def test_below_the_limit_there_are_as_many_numbers_as_are_spare(kept: set[int], more: int) -> None:
    limit = privileges.descriptor_limit(kept, more)
    assert len(set(range(limit)) - kept) == more


@given(kept=st.sets(st.integers(3, 60)), more=st.integers(0, 20))
def test_poll_always_takes_three_descriptors(kept: set[int], more: int) -> None:
    """It takes no more than the limit."""
    assert privileges.descriptor_limit({0, 1, 2} | kept, more) >= 3
