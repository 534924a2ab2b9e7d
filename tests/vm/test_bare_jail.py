"""``pyvmm run`` in its jail, from outside: its descriptors, its threads, its lines."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.cli.jailed import OFF
from tests.support.bare import LONG_MODE_ENTRY, assemble
from tests.support.kernels import ElfSegment, elf
from tests.support.nbd_servers import nbdkit
from tests.support.patience import patient
from tests.support.tiny_guests import REPORT_7, SPIN, prints, write_guest

pytestmark = pytest.mark.bare

DEADLINE_S = 60.0
SECCOMP_FILTER = "2"


class Running:
    """``pyvmm run -vv`` of a guest that prints and spins, up to its first instruction."""

    def __init__(self, folder: Path, *options: str, inherited: int = -1) -> None:
        kernel = write_guest(folder / "guest", prints(b"runs\n"), SPIN)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pyvmm", "run", "--kernel", str(kernel), "-vv",
             "--timeout", str(patient(DEADLINE_S)), *options],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            pass_fds=(inherited,) if inherited >= 0 else (),
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._out, self._err = self._process.stdout, self._process.stderr
        self.said: list[str] = []
        while not any(line.startswith(("pyvmm: jail: ", f"pyvmm: {OFF}")) for line in self.said):
            line = self._err.readline().decode()
            assert line, self.said
            self.said.append(line)
        self.folder = Path(f"/proc/{self._process.pid}")

    def wait_for_guest(self) -> None:
        assert self._out.readline() == b"runs\n"

    @property
    def listed(self) -> dict[int, str]:
        """The written list: names by descriptor."""
        found = [re.fullmatch(r"pyvmm: open: (\d+) (.*)\n", line) for line in self.said]
        return {int(match[1]): match[2] for match in found if match}

    @property
    def open(self) -> dict[int, str]:
        """The descriptors that are open: links by number."""
        place = self.folder / "fd"
        return {int(name): os.readlink(place / name) for name in os.listdir(place)}

    def of_threads(self, field: str) -> dict[str, str]:
        """A field of /proc/PID/task/TID/status by the thread's number."""
        found = {}
        for thread in (self.folder / "task").iterdir():
            text = (thread / "status").read_text()
            match = re.search(rf"^{field}:[ \t]*(.*)$", text, re.MULTILINE)
            found[thread.name] = match[1] if match else ""
        return found

    def end(self) -> str:
        self._process.terminate()
        rest = self._err.read().decode()
        assert self._process.wait(patient(DEADLINE_S)) == 128 + 15, rest
        return rest

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._out.close()
        self._err.close()


@contextlib.contextmanager
def running(folder: Path, *options: str, inherited: int = -1) -> Iterator[Running]:
    with contextlib.closing(Running(folder, *options, inherited=inherited)) as run:
        yield run


@pytest.fixture
def disk(tmp_path: Path) -> str:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return str(path)


CONFIGURATIONS = {
    "no disk": (), "a disk": ("--disk", "DISK"), "read-only": ("--disk", "DISK,ro"),
    "snapshot": ("--disk", "DISK,snapshot"), "overlay": ("--disk", "DISK,overlay=OVERLAY"),
    "queues": ("--disk", "DISK,queues=4"), "at exit": ("--disk", "DISK", "--serve", "exit"),
    "trapped": ("--disk", "DISK", "--mmio", "trapped"), "vCPUs": ("--cpus", "3"),
    "hvc0": ("--append", "console=hvc0 console=ttyS0"), "nbd": ("--disk", "NBD"),
    "agent": ("--agent",),
}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may look into a process in the jail")
@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_nothing_is_open_but_what_the_list_names(
    tmp_path: Path, disk: str, options: tuple[str, ...]
) -> None:
    """And what each run makes for itself: an epoll for each worker, the pipe of the signals."""
    with contextlib.ExitStack() as stack:
        places = {"DISK": disk, "OVERLAY": str(tmp_path / "overlay")}
        if "NBD" in options:
            stack.enter_context(nbdkit(tmp_path / "nbd", "memory", "1M"))
            places["NBD"] = f"nbd+unix:///?socket={tmp_path / 'nbd'}"
        words = []
        for option in options:
            for name, place in places.items():
                option = option.replace(name, place)
            words.append(option)
        run = stack.enter_context(running(tmp_path, *words))
        run.wait_for_guest()
        present = run.open
        assert set(run.listed) - set(present) == set(), run.said
        own = [present[fd] for fd in set(present) - set(run.listed)]
        pipes = [link for link in own if link.startswith("pipe:")]
        polls = [link for link in own if link == "anon_inode:[eventpoll]"]
        assert len(pipes) == 2
        assert pipes[0] == pipes[1]
        workers = 2 + words.count("--disk") + words.count("--agent")
        assert len(polls) == workers
        assert len(own) == len(pipes) + len(polls), own
        assert not [link for link in present.values() if link == "/dev/kvm"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may look into a process in the jail")
@pytest.mark.parametrize("options", [
    ("--disk", "DISK,snapshot"), ("--disk", "DISK,overlay=OVERLAY", "--control", "SOCKET"),
    ("--disk", "DISK,snapshot", "--snapshot", "WARM", "--control", "SOCKET", "--agent"),
], ids=["run", "control", "snapshot"])
def test_no_directory_stays_open(tmp_path: Path, disk: str, options: tuple[str, ...]) -> None:
    """From one ".." leads to the host's root, also behind an empty one."""
    places = {"DISK": disk, "OVERLAY": str(tmp_path / "overlay"), "WARM": str(tmp_path / "warm"),
              "SOCKET": str(tmp_path / "socket")}
    words = []
    for option in options:
        for name, place in places.items():
            option = option.replace(name, place)
        words.append(option)
    with running(tmp_path, *words) as run:
        run.wait_for_guest()
        present = run.open
        directories = [
            present[fd] for fd in present
            if stat.S_ISDIR((run.folder / "fd" / str(fd)).stat().st_mode)
        ]
        assert len(present) > 5
        assert directories == []


def test_a_descriptor_that_somebody_left_open_is_closed(tmp_path: Path) -> None:
    read_fd, write_fd = os.pipe()
    with running(tmp_path, inherited=write_fd) as run:
        os.close(write_fd)
        run.wait_for_guest()
        os.set_blocking(read_fd, False)
        assert os.read(read_fd, 1) == b"", "its last writer has closed it"
        os.close(read_fd)


def test_each_thread_is_filtered_and_has_no_right_to_gain(tmp_path: Path, disk: str) -> None:
    with running(tmp_path, "--disk", disk, "--cpus", "2") as run:
        run.wait_for_guest()
        until_s = time.monotonic() + patient(DEADLINE_S)
        while len(run.of_threads("Seccomp")) < 6:  # the house, two vCPUs, three workers
            assert time.monotonic() < until_s
            time.sleep(0.01)
        assert set(run.of_threads("Seccomp").values()) == {SECCOMP_FILTER}
        assert set(run.of_threads("NoNewPrivs").values()) == {"1"}
        for field in ("CapEff", "CapPrm", "CapInh", "CapAmb"):
            assert {int(mask, 16) for mask in run.of_threads(field).values()} == {0}
        run.end()


def test_verbose_says_what_is_in_force(tmp_path: Path, disk: str) -> None:
    with running(tmp_path, "--disk", disk) as run:
        line = run.said[-1]
        for part in (
            "no_new_privs", "empty capability sets", "closed descriptors",
            "a filter of system calls",
        ):
            assert part in line
        run.wait_for_guest()
        assert "exit status 143" in run.end()


def test_off_says_so_and_confines_nothing(tmp_path: Path) -> None:
    with running(tmp_path, "--jail", "off") as run:
        run.wait_for_guest()
        assert set(run.of_threads("Seccomp").values()) == {"0"}
        assert run.listed == {}
        assert "jail: " not in run.end()


@pytest.mark.parametrize("mode", ["on", "off"])
def test_a_jail_changes_neither_output_nor_status(tmp_path: Path, mode: str) -> None:
    kernel = write_guest(tmp_path / "guest", prints(b"hello\n"), REPORT_7)
    done = subprocess.run(
        [sys.executable, "-m", "pyvmm", "run", "--kernel", str(kernel), "--jail", mode],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        timeout=patient(DEADLINE_S),
    )
    assert (done.returncode, done.stdout) == (7, "hello\n")
    assert done.stderr == ("" if mode == "on" else f"pyvmm: {OFF}\n")


@pytest.mark.parametrize("serve", ["thread", "exit"])
def test_a_guest_in_the_jail_is_given_random_bytes(tmp_path: Path, serve: str) -> None:
    """The vCPU's thread makes them: the entropy device is served at the exit (machine.py)."""
    kernel = tmp_path / "asks.elf"
    code = assemble("ask_device", LONG_MODE_ENTRY, tmp_path)
    kernel.write_bytes(elf(ElfSegment(data=code, p_memsz=len(code))))
    done = subprocess.run(
        [sys.executable, "-m", "pyvmm", "run", "--kernel", str(kernel), "--serve", serve,
         "--timeout", str(patient(DEADLINE_S))],
        stdin=subprocess.DEVNULL, capture_output=True, check=False,
    )
    assert (done.returncode, done.stderr) == (1, b""), "the devices that it was told of"
    assert len(set(done.stdout)) > 16, "of 64 random bytes"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_root_becomes_another_user_and_sees_nothing_of_the_host(
    tmp_path: Path, disk: str
) -> None:
    with running(tmp_path, "--disk", disk, "--user", "65534:65534") as run:
        run.wait_for_guest()
        assert set(run.of_threads("Uid").values()) == {"\t".join(["65534"] * 4)}
        assert set(run.of_threads("Gid").values()) == {"\t".join(["65534"] * 4)}
        assert set(run.of_threads("Groups").values()) == {""}
        for name in ("net", "mnt", "ipc", "uts"):
            assert os.readlink(run.folder / "ns" / name) != os.readlink(f"/proc/self/ns/{name}")
        assert os.listdir(run.folder / "root") == []
        run.end()
