"""RAM written while the guest goes on: a forked child has it as it was, and writes it.

The child is a copy of this process with one thread.  Any lock may be held for ever in it, so it
imports nothing, reports nothing, closes the descriptors that are not its own, and ends by _exit.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import select
import signal
import struct
import time
from collections.abc import Sequence

from pyvmm.errors import HostError
from pyvmm.memory import GuestMemory
from pyvmm.ram.image import RamImage
from pyvmm.ram.runs import USUAL_RUNS
from pyvmm.ram.write import RamWriter, Written

# le32 errno (0: all is written); le32 CRCs; le64 held_bytes; le32 runs; le32 is a diff.  With
# _HOST_ERROR the text of one follows.
_HEAD = struct.Struct("<IIQII")
_CRC = struct.Struct("<II")
_RUN = struct.Struct("<QQ")
_HOST_ERROR = 0xFFFF_FFFF


def fork_writer(
    memory: GuestMemory, fd: int, *, over: RamImage | None = None, most_runs: int = USUAL_RUNS
) -> LiveWriter:
    """Have a child write ``memory``, as it is now, into ``fd`` as ``write_ram`` does; HostError.

    The guest must be quiesced, and may go on as soon as this returns.  ``fd`` stays the caller's.
    """
    ram_writer = RamWriter(memory, fd, over=over, most_runs=most_runs)
    layers = () if memory.image is None else memory.image.layers
    kept = sorted({fd, *(layer.fd for layer in layers)})
    reader, writer = os.pipe()  # both close on exec
    # A signal of the terminal's, as Ctrl-C, is the parent's business alone.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    child: LiveWriter | None = None
    try:
        with memory.copied_by_fork():
            pid = os.fork()
            if not pid:
                _child(ram_writer, writer, kept)
        child = LiveWriter(pid, reader)
    except OSError as error:
        os.close(reader)
        raise HostError(f"cannot fork a process that writes RAM: {error}") from error
    finally:
        os.close(writer)
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        except BaseException:  # a signal's handler that raises, such as Ctrl-C's
            if child is not None:
                child.kill()
            raise
    return child


class LiveWriter:
    """The child that writes; a context manager that ends it.

    It ends by itself within a chunk's time once this process is gone.
    """

    def __init__(self, pid: int, reader: int) -> None:
        self.pid = pid
        self._reader = reader
        self._answer = bytearray()
        self._is_reaped = False

    def wait(self, timeout_s: float | None = None) -> Written:
        """Return the result, once.

        TimeoutError: it writes on.  OSError: it could not write, as ENOSPC.  HostError: it died.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        while True:
            left_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
            if not poll.poll(None if left_s is None else left_s * 1000):
                raise TimeoutError(f"RAM is not written after {timeout_s} s")
            data = os.read(self._reader, 1 << 20)
            if not data:
                break
            self._answer += data
        status = self._reap()
        try:
            return _unpack(self._answer)
        except (struct.error, ValueError):
            how = f"signal {-status}" if status < 0 else f"status {status}"
            raise HostError(f"the process that writes RAM ended with {how}") from None

    def kill(self) -> None:
        """End the child, if it has not ended; idempotent."""
        if not self._is_reaped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self._reap()

    def __enter__(self) -> LiveWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()

    def _reap(self) -> int:
        """Return the exit status, negative for a signal; close the pipe."""
        if self._is_reaped:
            raise ValueError("the result was taken, or the child killed")
        self._is_reaped = True
        os.close(self._reader)
        try:
            return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        except ChildProcessError:  # the program that we run in reaps all children
            return 0


def _child(ram_writer: RamWriter, pipe: int, kept: Sequence[int]) -> None:
    """Write, answer, and end this process."""
    try:
        gc.disable()  # a finalizer of the parent's garbage could do anything
        _close_all_but(*kept, pipe)
        # Not PR_SET_PDEATHSIG: that comes when the thread ends that forked, too.
        poll = select.poll()
        poll.register(pipe, 0)

        def check_parent() -> None:
            if poll.poll(0):
                os._exit(1)

        try:
            answer = _pack(ram_writer.write(before_chunk=check_parent))
        except OSError as error:
            answer = _HEAD.pack(error.errno or errno.EIO, 0, 0, 0, 0)
        except HostError as error:
            answer = _HEAD.pack(_HOST_ERROR, 0, 0, 0, 0) + str(error).encode()
        at = 0
        while at < len(answer):
            at += os.write(pipe, answer[at:])
        os._exit(0)
    finally:
        os._exit(1)


def _close_all_but(*kept: int) -> None:
    """Close all other descriptors: sockets, locks, and a KVM that lives as long as they do."""
    top = max(map(int, os.listdir("/proc/self/fd"))) + 1
    first = 0
    for fd in sorted(kept):
        os.closerange(first, fd)
        first = fd + 1
    os.closerange(first, top)


def _pack(written: Written) -> bytes:
    runs: Sequence[tuple[int, int]] = written.runs or ()
    is_diff = written.runs is not None
    return b"".join((
        _HEAD.pack(0, len(written.crcs), written.held_bytes, len(runs), is_diff),
        *(_CRC.pack(chunk, crc) for chunk, crc in written.crcs.items()),
        *(_RUN.pack(*run) for run in runs),
    ))


def _unpack(answer: bytearray) -> Written:
    """Return the result, or raise the child's error; struct.error or ValueError if it is cut off.
    """
    error, crcs, held_bytes, runs, is_diff = _HEAD.unpack_from(answer)
    if error == _HOST_ERROR:
        raise HostError(answer[_HEAD.size :].decode())
    if error:
        raise OSError(error, os.strerror(error))
    end = _HEAD.size + crcs * _CRC.size
    if len(answer) != end + runs * _RUN.size:
        raise ValueError("cut off")
    return Written(
        held_bytes,
        dict(_CRC.iter_unpack(answer[_HEAD.size : end])),
        tuple(_RUN.iter_unpack(answer[end:])) if is_diff else None,
    )
