"""A function called in a process of its own: for what cannot be undone, as all of a jail.

Also the sandboxes in which such a process may be: another user, or a container that refuses calls.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import struct
import warnings
from collections.abc import Callable
from typing import TypeVar

from pyvmm.errors import ConfigError
from pyvmm.jail.calls import prctl, system_call

NOBODY = 65534
"""A user and a group that own nothing."""

_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP, _SET_MODE_FILTER = 317, 1
_INSTRUCTION = struct.Struct("=HBBI")
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_REFUSE, _ALLOW = 0x0005_0000, 0x7FFF_0000

T = TypeVar("T")


class EndedApartError(AssertionError):
    """The process ended without a result; ``status`` is as from os.waitpid."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the process ended with {os.waitstatus_to_exitcode(status)}")
        self.status = status


def apart(function: Callable[[int], T]) -> T:
    """Return ``function(fd)``, called in a child process; raise what it raises.

    The child must leave ``fd`` open, because its result goes there.
    """
    out, into = os.pipe()
    with warnings.catch_warnings():
        # Python warns of forks beside threads, as xdist's: the child needs no lock of theirs.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            os.close(out)
            answer: tuple[bool, object]
            try:
                answer = True, function(into)
            except ConfigError as error:  # pickle would make it of its text
                answer = False, (ConfigError, error.subject, error.problem)
            except BaseException as error:
                answer = False, (type(error), *error.args)
            with os.fdopen(into, "wb") as file:
                file.write(pickle.dumps(answer))
        finally:
            os._exit(0)
    os.close(into)
    with os.fdopen(out, "rb") as file:
        data = file.read()
    _, status = os.waitpid(pid, 0)
    if not data:
        raise EndedApartError(status)
    is_result, found = pickle.loads(data)
    if not is_result:
        kind, *arguments = found
        raise kind(*arguments)
    return found  # type: ignore[no-any-return]


def become_nobody() -> None:
    """Be an ordinary user; in a process that is one already, do nothing."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def refuse_calls(error: int, *numbers: int) -> None:
    """Have system calls fail with ``error`` from now on, as a container's seccomp filter does.

    ``numbers`` are as x86-64 has them; the filter is this thread's.
    """
    prctl(_PR_SET_NO_NEW_PRIVS, 1)
    code = [_INSTRUCTION.pack(_LOAD, 0, 0, 0)]
    for number in numbers:
        code.append(_INSTRUCTION.pack(_JUMP_IF_EQUAL, 0, 1, number))
        code.append(_INSTRUCTION.pack(_RETURN, 0, 0, _REFUSE | error))
    code.append(_INSTRUCTION.pack(_RETURN, 0, 0, _ALLOW))
    program = ctypes.create_string_buffer(b"".join(code))
    header = struct.pack("=H6xQ", len(code), ctypes.addressof(program))
    system_call(_SECCOMP, _SET_MODE_FILTER, 0, header)


def status_field(name: str) -> str:
    """Return the field of this thread in /proc, as ``NoNewPrivs``."""
    with open("/proc/thread-self/status") as file:  # noqa: PTH123 - needs no import in a jail
        for line in file:
            if line.startswith(f"{name}:"):
                return line.partition(":")[2].strip()
    raise KeyError(name)
