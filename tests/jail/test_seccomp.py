"""Filters in real processes: the kernel takes each, and judges as the table says."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm.jail import bpf, seccomp
from pyvmm.jail.programs import PROGRAMS
from pyvmm.jail.syscalls import NAMES
from pyvmm.jail.table import ALL
from tests.support.bpf_interpreter import run
from tests.support.filtered_process import NOT_IN_FILTER
from tests.support.patience import patient

ROOT = Path(__file__).resolve().parents[2]
FILTERED = ROOT / "tests" / "support" / "filtered_process.py"
MINUS_ONE = ((1 << 64) - 1,) * 6

pytestmark = pytest.mark.skipif(
    bool(seccomp.why_not()), reason=f"no filters here: {seccomp.why_not()}"
)


@pytest.mark.parametrize("kind", ALL)
def test_the_kernel_judges_every_number_as_the_filter_says(kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-I", FILTERED, ROOT, kind], capture_output=True, text=True, check=False,
        timeout=patient(60),
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    found = {int(number): result for number, result in json.loads(done.stdout).items()}
    assert len(found) > 470
    program, _ = PROGRAMS[kind]
    for number, result in found.items():
        action = run(program, number, MINUS_ONE)
        name = NAMES.get(number, number)
        if action == bpf.KILL_PROCESS:
            assert result == NOT_IN_FILTER, name
        elif action == bpf.ALLOW:
            assert result != NOT_IN_FILTER, name
        else:
            assert result == action & 0xFFF, name


def status_of(kind: str, code: str) -> int:
    """The exit status of a process that enters ``kind``, if any, and then runs ``code``."""
    prelude = (
        "import sys, os, ctypes, fcntl, signal, socket, mmap, threading\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from pyvmm.jail import seccomp\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        + (f"seccomp.enter({kind!r})\n" if kind else "")
    )
    return subprocess.run(
        [sys.executable, "-I", "-c", prelude + code + "\nos._exit(0)"], check=False,
        capture_output=True, timeout=patient(60),
    ).returncode


@pytest.mark.parametrize("kind", ["vcpu", "disk", "snapshot", "main", "main-export"])
@pytest.mark.parametrize("code", [
    "os.execv('/bin/true', ['true'])",
    "socket.socket(socket.AF_UNIX)",
    "libc.ptrace(0, 0, 0, 0)",
    "mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)",
    "libc.mprotect(ctypes.c_void_p(id(0) & ~0xfff), 4096, 7)",
    "fcntl.ioctl(0, 0xAE01)",
    "os.kill(os.getppid(), 0)",
    "os.kill(-1, 0)",
    "os.unlink('/nowhere')",
    "libc.syscall((1 << 30) | 39)",
])
def test_an_escape_ends_the_process(kind: str, code: str) -> None:
    assert status_of(kind, code) == -signal.SIGSYS


@pytest.mark.parametrize("kind", ALL)
def test_the_filter_is_of_the_thread_and_its_end_is_the_process_s(kind: str) -> None:
    code = (
        "import threading\n"
        "thread = threading.Thread(target=lambda: (seccomp.enter('KIND'), os.getppid()))\n"
        "thread.start(); thread.join()\n"
    ).replace("KIND", kind)
    prelude = (
        f"import sys, os\nsys.path.insert(0, {str(ROOT)!r})\nfrom pyvmm.jail import seccomp\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", prelude + code], check=False, timeout=patient(60)
    )
    assert done.returncode == -signal.SIGSYS


def test_files_are_refused_so_that_python_can_tell_of_an_error() -> None:
    opens = "try:\n    open('/etc/passwd')\nexcept PermissionError:\n    os._exit(7)"
    imports = "try:\n    import decimal\nexcept ImportError:\n    os._exit(7)"
    assert [status_of("vcpu", opens), status_of("disk", imports)] == [7, 7]


def test_a_fork_of_the_saver_has_its_filter() -> None:
    code = (
        "child = os.fork()\n"
        "if not child:\n    os.getppid()\n    os._exit(0)\n"
        "os._exit(os.WTERMSIG(os.waitpid(child, 0)[1]))"
    )
    assert status_of("snapshot", code) == signal.SIGSYS


def test_the_saver_s_threads_take_their_own_filters() -> None:
    code = (
        "def body():\n    seccomp.enter('vcpu')\n    os.memfd_create('x')\n"
        "os.close(os.memfd_create('x'))\n"
        "thread = threading.Thread(target=body)\nthread.start(); thread.join()\nos._exit(1)"
    )
    assert status_of("snapshot", code) == -signal.SIGSYS


@pytest.mark.parametrize("kind", ALL)
def test_a_thread_that_ends_and_memory_that_grows_are_let_through(kind: str) -> None:
    code = (
        "import time\n"
        "def body():\n"
        "    seccomp.enter(KIND)\n"
        "    blocks = [bytearray(1 << size) for size in range(23) for _ in range(3)]\n"
        "    blocks += [bytes(100) for _ in range(30000)]\n"
        "    del blocks\n"
        "    time.sleep(0.001)\n"
        "    threading.Event().wait(0.001)\n"
        "thread = threading.Thread(target=body)\n"
        "thread.start()\n"
        "thread.join()\n"
    ).replace("KIND", repr(kind))
    assert status_of("", code) == 0


def test_abort_is_still_told_from_an_escape() -> None:
    assert status_of("vcpu", "os.abort()") == -signal.SIGABRT


def test_only_a_kick_of_this_process_s_own_threads_is_a_signal() -> None:
    kick = "signal.pthread_kill(threading.get_ident(), signal.SIGRTMIN)"
    ignore = "signal.signal(signal.SIGRTMIN, signal.SIG_IGN)\n"
    assert status_of("", f"{ignore}seccomp.enter('main')\n{kick}") == 0
    assert status_of("", f"{ignore}seccomp.enter('disk')\n{kick}") == -signal.SIGSYS
    assert status_of("main", "signal.pthread_kill(threading.get_ident(), 0)") == -signal.SIGSYS
    assert status_of("main", "os.kill(os.getpid(), 0)") == -signal.SIGSYS
    assert status_of("main", "libc.syscall(234, os.getppid(), os.getppid(), 34)") == -signal.SIGSYS


def test_an_unknown_kind_is_a_mistake_of_ours() -> None:
    with pytest.raises(KeyError):
        seccomp.enter("no such kind")


def test_a_host_without_filters_is_told() -> None:
    """A filter that refuses seccomp(2), as a container's may."""
    code = (
        "import ctypes, errno, struct, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from pyvmm.errors import HostError\nfrom pyvmm.jail import bpf, seccomp\n"
        "from pyvmm.jail.programs import PROGRAMS\n"
        "node = bpf.filter_of({317: bpf.Return(bpf.refuse_with(errno.EPERM))})\n"
        "data = bpf.assemble(node).data.replace(struct.pack('=HxxI', 6, bpf.KILL_PROCESS),"
        " struct.pack('=HxxI', 6, bpf.ALLOW))\n"
        "PROGRAMS['test'] = data, ()\n"
        "assert seccomp.why_not() == ''\n"
        "seccomp.enter('test')\n"
        "print(seccomp.why_not())\n"
        "try:\n    seccomp.enter('vcpu')\nexcept HostError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False,
        timeout=patient(60),
    )
    assert done.stdout.splitlines() == [
        "seccomp(2) is refused: Operation not permitted; the filter of a container may do that",
        "no filter for the system calls of a thread (vcpu): Operation not permitted",
    ], done.stderr


def test_looking_changes_nothing() -> None:
    assert seccomp.why_not() == ""
    status = Path("/proc/thread-self/status").read_text()
    before = Path(f"/proc/{os.getppid()}/status").read_text()
    (filters,) = re.findall(r"^Seccomp:.*", status, re.MULTILINE)
    assert filters in before
