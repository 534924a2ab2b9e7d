"""A forked child writes RAM as it was at the fork, and never outlives or harms its parent."""

from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from pyvmm.errors import HostError
from pyvmm.memory import GuestMemory
from pyvmm.ram.live import LiveWriter, fork_writer
from pyvmm.ram.write import image_in_memory, write_ram
from tests.support.patience import patient
from tests.support.ram_images import MIB, PAGE, REGIONS, content, in_use, put, scattered

ROOT = Path(__file__).resolve().parents[2]
LARGE = 192 * MIB


@pytest.fixture
def file(tmp_path: Path) -> Iterator[BinaryIO]:
    with (tmp_path / "ram").open("w+b") as file:
        yield file


@pytest.fixture
def large() -> Iterator[GuestMemory]:
    """RAM that takes a child a while."""
    with GuestMemory([(0, LARGE)]) as memory:
        memory.write(0, os.urandom(MIB) * (LARGE // MIB))
        yield memory


def stopped(writer: LiveWriter) -> None:
    """Stop the child, and wait until it is."""
    os.kill(writer.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, writer.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


def test_the_guest_goes_on_and_the_file_is_as_it_was(
    large: GuestMemory, file: BinaryIO
) -> None:
    before = content(large)
    with fork_writer(large, file.fileno()) as writer:
        large.write(LARGE - MIB, b"later" * 1000)
        large.write(0, b"later" * 1000)
        written = writer.wait(patient(60))
    assert file.read() == before
    assert content(large) != before
    assert written.held_bytes == LARGE


@pytest.mark.parametrize("is_diff", [False, True])
def test_the_answer_is_that_of_write_ram(is_diff: bool, file: BinaryIO, tmp_path: Path) -> None:
    with GuestMemory(REGIONS) as memory:
        scattered(memory)
        image = image_in_memory(memory)
    with image, GuestMemory(REGIONS, image=image) as clone:
        scattered(clone, seed=2)
        over = image if is_diff else None
        with fork_writer(clone, file.fileno(), over=over) as writer:
            live = writer.wait(patient(60))
        with (tmp_path / "here").open("w+b") as other:
            assert live == write_ram(clone, other.fileno(), over=over)
            assert other.read() == file.read()


def test_an_error_of_the_child_s_arrives_with_its_errno(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.touch()
    with GuestMemory(REGIONS) as memory, path.open("rb") as file:
        writer = fork_writer(memory, file.fileno())  # it cannot write there
        with pytest.raises(OSError, match="Invalid argument"):
            writer.wait(patient(60))


def test_a_full_disk_arrives(
    file: BinaryIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: memoryview, at: int) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "pwrite", full)
    with GuestMemory(REGIONS) as memory:
        scattered(memory)
        with pytest.raises(OSError, match="No space left"):
            fork_writer(memory, file.fileno()).wait(patient(60))


def test_an_error_of_the_host_s_arrives_with_its_text(
    file: BinaryIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, flags: int) -> int:
        raise PermissionError(13, os.strerror(13), path)

    with GuestMemory(REGIONS) as memory:
        monkeypatch.setattr(os, "open", refuse)
        writer = fork_writer(memory, file.fileno())
        monkeypatch.undo()
        with pytest.raises(HostError, match=r"pages of RAM are used.*Permission denied"):
            writer.wait(patient(60))


def test_a_child_that_hangs_meets_the_deadline_and_can_be_killed(
    large: GuestMemory, file: BinaryIO
) -> None:
    before = in_use()
    with fork_writer(large, file.fileno()) as writer:
        stopped(writer)
        with pytest.raises(TimeoutError, match="not written"):
            writer.wait(timeout_s=0.05)
        os.kill(writer.pid, signal.SIGCONT)
        assert writer.wait(patient(60)).held_bytes == LARGE  # it may be waited for again
    with fork_writer(large, file.fileno()) as writer:
        stopped(writer)
        writer.kill()
        writer.kill()
        with pytest.raises(ProcessLookupError):
            os.kill(writer.pid, 0)
    assert in_use() == before


def test_a_child_that_dies_is_noticed(large: GuestMemory, file: BinaryIO) -> None:
    before = in_use()
    writer = fork_writer(large, file.fileno())
    stopped(writer)
    os.kill(writer.pid, signal.SIGKILL)
    with pytest.raises(HostError, match="ended with signal 9"):
        writer.wait(patient(60))
    assert in_use() == before


def test_the_child_keeps_no_descriptor_that_it_does_not_need(
    large: GuestMemory, file: BinaryIO
) -> None:
    reader, other = os.pipe()
    with fork_writer(large, file.fileno()) as writer:
        os.close(other)
        # The end of the file comes once the child has closed its copy, too.
        assert select.select([reader], [], [], patient(20))[0]
        assert os.read(reader, 1) == b""
        stopped(writer)
        names = {
            Path(f"/proc/{writer.pid}/fd/{number}").readlink().name.partition(":")[0]
            for number in os.listdir(f"/proc/{writer.pid}/fd")
        }
        assert names <= {"ram", "pipe", "pagemap"}
    os.close(reader)


def test_signals_of_a_terminal_are_the_parent_s(large: GuestMemory, file: BinaryIO) -> None:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with fork_writer(large, file.fileno()) as writer:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP):
            os.kill(writer.pid, number)
        assert writer.wait(patient(60)).held_bytes == LARGE
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask


def test_the_thread_that_forked_may_end_before_the_child(
    large: GuestMemory, file: BinaryIO
) -> None:
    found: list[LiveWriter] = []
    thread = threading.Thread(target=lambda: found.append(fork_writer(large, file.fileno())))
    thread.start()
    thread.join()
    assert found[0].wait(patient(60)).held_bytes == LARGE


def test_the_child_ends_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import os, sys, signal\n"
        "from pyvmm.memory import GuestMemory\n"
        "from pyvmm.ram.live import fork_writer\n"
        "memory = GuestMemory([(0, 64 << 20)])\n"
        "memory.write(0, b'x' * (64 << 20))\n"
        "writer = fork_writer(memory, os.open(sys.argv[1], os.O_RDWR | os.O_CREAT))\n"
        "os.kill(writer.pid, signal.SIGSTOP)\n"
        "os.waitid(os.P_PID, writer.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)\n"
        "print(writer.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "ram")], stdout=subprocess.PIPE, cwd=ROOT
    )
    with parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())  # stopped, it may keep the pipe open
        assert parent.wait(patient(30)) == -signal.SIGKILL
        assert _lives(child)
        os.kill(child, signal.SIGCONT)
    deadline_s = time.monotonic() + patient(20)
    while _lives(child):
        assert time.monotonic() < deadline_s, "the child goes on without a parent"
        time.sleep(0.01)


def _lives(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text("ascii")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def test_locks_that_other_threads_hold_at_the_fork_do_no_harm(file: BinaryIO) -> None:
    """Allocator, imports, logging, standard error: threads use all of them without a pause."""
    is_over = threading.Event()
    logger = logging.getLogger("ram test")
    logger.addHandler(logging.NullHandler())

    def busy() -> None:
        turn = 0
        while not is_over.is_set():
            turn += 1
            logger.error("%d", turn)
            bytearray(turn % 300_000)
            sys.modules.pop("this_is_none", None)
            __import__("colorsys")
            os.stat("/proc/self/fd")

    threads = [threading.Thread(target=busy) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        with GuestMemory(REGIONS) as memory:
            scattered(memory)
            for turn in range(12):
                put(memory, turn * PAGE, b"turn")
                os.ftruncate(file.fileno(), 0)
                with fork_writer(memory, file.fileno()) as writer:
                    writer.wait(patient(30))
                file.seek(0)
                assert file.read() == content(memory)
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


def test_no_child_but_the_writer_has_the_ram() -> None:
    """A script's own fork need not copy it, and the guest's next writes cost no copies."""
    with GuestMemory(REGIONS) as memory:
        address = memory.regions[0].host_address
        for is_meant in (False, True):
            reader, writer = os.pipe()
            if is_meant:
                with memory.copied_by_fork():
                    child = os.fork()
            else:
                child = os.fork()
            if not child:
                try:
                    maps = Path("/proc/self/maps").read_text("ascii")
                    os.write(writer, b"y" if f"{address:x}-" in maps else b"n")
                finally:
                    os._exit(0)
            os.waitpid(child, 0)
            assert os.read(reader, 1) == (b"y" if is_meant else b"n")
            os.close(reader)
            os.close(writer)


def test_ctrl_c_at_the_fork_leaves_nothing(file: BinaryIO, monkeypatch: pytest.MonkeyPatch) -> None:
    set_mask = signal.pthread_sigmask

    def interrupted(how: int, mask: set[signal.Signals]) -> set[int | signal.Signals]:
        old = set_mask(how, mask)
        if how == signal.SIG_SETMASK:
            raise KeyboardInterrupt
        return old

    children = Path(f"/proc/self/task/{threading.get_native_id()}/children")
    before = sorted(os.listdir("/proc/self/fd")), children.read_text()
    with GuestMemory(REGIONS) as memory:
        scattered(memory)
        with monkeypatch.context() as patch:
            patch.setattr(signal, "pthread_sigmask", interrupted)
            with pytest.raises(KeyboardInterrupt):
                fork_writer(memory, file.fileno())
    assert (sorted(os.listdir("/proc/self/fd")), children.read_text()) == before
