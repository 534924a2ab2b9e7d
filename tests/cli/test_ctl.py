"""``pyvmm ctl`` as a user runs it; the machine is a stand-in with the agent's own program."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.run.outcome import Kind, Outcome
from tests.support.agent_process import AgentPort
from tests.support.guest import environment
from tests.support.patience import patient
from tests.support.stand_in_target import Served, served, wait_until


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Served]:
    """A machine without an agent."""
    with served(tmp_path) as found:
        yield found


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A machine with an agent: the guest's files are this host's."""
    port = AgentPort()
    with served(tmp_path_factory.mktemp("guest"), port, is_counted=False) as found:
        yield found
    port.close()


def command(rig: Served, *words: str) -> list[str]:
    return [sys.executable, "-m", "pyvmm", "ctl", str(rig.path), *words]


def ctl(
    rig: Served, *words: str, given: bytes = b"", cwd: Path | None = None
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        command(rig, *words), input=given, capture_output=True, check=False, env=environment(),
        cwd=cwd, timeout=patient(60),
    )


def complaint(done: subprocess.CompletedProcess[bytes], status: int = 125) -> str:
    """Return the one line on standard error."""
    assert done.returncode == status, done
    assert done.stdout == b""
    line = done.stderr.decode()
    assert line.startswith("pyvmm: ")
    assert line.count("\n") == 1
    return line


# The machine


def test_status_is_for_people_and_for_programs(rig: Served) -> None:
    done = ctl(rig, "status")
    assert done.returncode == 0
    assert b"kernel   stand-in (1.0)\nmemory   1M, vCPUs: 2\n" in done.stdout
    assert json.loads(ctl(rig, "status", "--json").stdout)["cpus"] == 2


def test_a_guest_is_paused_looked_at_and_resumed(rig: Served) -> None:
    assert "the guest runs; pause it first" in complaint(ctl(rig, "registers"))
    assert ctl(rig, "pause").returncode == 0
    done = ctl(rig, "registers", "1")
    assert b"     rax 0000000000000001      rbx 0000000000000000" in done.stdout
    assert "is no number of a vCPU" in complaint(ctl(rig, "registers", "x"))
    assert "vcpu must be an integer of 0 to 1" in complaint(ctl(rig, "registers", "2"))
    assert ctl(rig, "resume").returncode == 0
    assert not rig.target.is_paused
    assert ctl(rig, "refresh").returncode == 0
    assert rig.target.refreshed == 1


def test_a_pause_that_takes_too_long_says_so(rig: Served) -> None:
    rig.target.is_stuck = True
    assert "stays asked for" in complaint(ctl(rig, "pause", "--timeout", "0.1"))


def test_memory_is_shown_or_copied(rig: Served) -> None:
    assert ctl(rig, "memory", "0x41", "18").stdout == (
        b"0000000000000041  41 42 43 44 45 46 47 48 49 4a 4b 4c 4d 4e 4f 50  ABCDEFGHIJKLMNOP\n"
        b"0000000000000051  51 52                                            QR\n"
    )
    assert ctl(rig, "memory", "65", "1M", "--raw").returncode == 125  # beyond its end
    assert ctl(rig, "memory", "0", "2M").stdout == b""  # the same, before anything is shown
    assert ctl(rig, "memory", "0", "1M", "--raw").stdout == bytes(range(256)) * 4096
    assert "is no address" in complaint(ctl(rig, "memory", "xyz", "1"))
    assert "is not a size" in complaint(ctl(rig, "memory", "0", "much"))


def test_what_is_typed_arrives_with_enter(rig: Served) -> None:
    assert ctl(rig, "type", "ls -l").returncode == 0
    assert ctl(rig, "type", "--no-enter", "x").returncode == 0
    assert rig.target.typed == b"ls -l\rx"


def test_the_console_is_shown_and_followed_to_the_end(rig: Served) -> None:
    rig.target.print_out(b"before\x1b[1m\n")
    assert ctl(rig, "console").stdout == b"before\x1b[1m\n"
    follower = subprocess.Popen(
        command(rig, "console", "--follow"), stdout=subprocess.PIPE, env=environment()
    )
    assert follower.stdout is not None
    assert follower.stdout.readline() == b"before\x1b[1m\n"
    rig.target.print_out(b"later\n")
    assert follower.stdout.readline() == b"later\n"
    rig.target.print_out(b"last" * 1000)
    rig.target.finish(Outcome(Kind.POWER_OFF))
    rig.end()
    assert follower.communicate(timeout=patient(20))[0] == b"last" * 1000
    assert follower.returncode == 0


def test_wait_has_the_exit_status_of_the_run(rig: Served) -> None:
    done = ctl(rig, "wait", "--timeout", "0.1")
    assert "still runs after 0.1 s" in complaint(done, status=124)
    waiting = subprocess.Popen(command(rig, "wait"), stdout=subprocess.PIPE, env=environment())
    rig.target.finish(Outcome(Kind.PANIC, detail="no \x1b[2Jinit"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyvmm.control.server.LINGER_S", patient(10))
        wait_until(lambda: rig.server.requests_under_way == 1)
        rig.end()
    assert waiting.communicate(timeout=patient(20))[0] == b"kernel panic: no \\x1b[2Jinit\n"
    assert waiting.returncode == 121


def test_stop_ends_the_machine(rig: Served) -> None:
    stopping = subprocess.Popen(command(rig, "stop"), env=environment())
    assert rig.target.finished.wait(patient(20))
    wait_until(lambda: rig.server.requests_under_way == 1)
    rig.end()
    assert stopping.wait(patient(20)) == 0
    assert "No such file" in complaint(ctl(rig, "status"))


@pytest.mark.parametrize(("words", "said"), [
    (["statsu"], "did you mean status?"),
    (["status", "now"], "now"),
    (["memory", "0"], "LENGTH"),
    (["pause", "--timeout", "-1"], "--timeout"),
    (["run"], "names no command"),
    (["run", "--env", "A", "--", "x"], "--env A: is not NAME=VALUE"),
    (["put", "/etc/passwd", "relative"], "relative: a path in the guest must begin with /"),
    (["put", "/missing", "/tmp"], "/missing: No such file or directory"),
    (["get", "relative", "."], "relative: a path in the guest must begin with /"),
    (["get", "/etc/passwd", "/missing/x"], "/missing: No such file or directory"),
])
def test_a_mistake_is_one_line(rig: Served, words: list[str], said: str) -> None:
    assert said in complaint(ctl(rig, *words))


def test_a_socket_that_is_none_is_named(tmp_path: Path) -> None:
    for path, said in (
        (tmp_path / "missing", "No such file or directory; pyvmm ps lists the machines"),
        (tmp_path / ("x" * 120), "the limit is 107"),
        (tmp_path, "is no socket"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "pyvmm", "ctl", str(path), "status"],
            capture_output=True, check=False, env=environment(),
        )
        assert said in complaint(done)


# The agent


def test_a_commands_streams_and_status_are_passed_on(guest: Served) -> None:
    done = ctl(guest, "run", "--env", "A=b=c", "--cwd", "/usr", "--", "sh", "-c",
               "echo $A; pwd; cat; echo err >&2; exit 7", given=b"input\n")
    assert done.returncode == 7
    assert done.stdout == b"b=c\n/usr\ninput\n"
    assert done.stderr == b"err\n"


def test_bytes_go_through_a_pipe_as_they_are(guest: Served) -> None:
    data = os.urandom(3_000_000)
    assert ctl(guest, "run", "--", "cat", given=data).stdout == data


@pytest.mark.parametrize(("words", "status"), [
    (["--", "sh", "-c", "kill -9 $$"], 128 + 9),
    (["--timeout", "0.2", "--", "sleep", "100"], 124),
    (["--no-input", "--", "cat"], 0),
    (["--", "true"], 0),
])
def test_the_exit_status_is_the_commands(guest: Served, words: list[str], status: int) -> None:
    done = ctl(guest, "run", *words)
    assert (done.returncode, done.stderr) == (status, b"")


@pytest.mark.parametrize(("program", "status"), [
    ("/no/such", 127), ("no-such", 127), ("/etc/passwd", 126),
])
def test_a_command_that_cannot_be_is_told_as_a_shell_does(
    guest: Served, program: str, status: int
) -> None:
    assert program in complaint(ctl(guest, "run", "--", program), status)


def test_ctrl_c_interrupts_the_command(guest: Served) -> None:
    running = subprocess.Popen(
        command(guest, "run", "--", "sh", "-c", "trap 'echo caught; exit 3' INT; echo ready;"
                "while :; do sleep 0.1; done"),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment(),
    )
    assert running.stdout is not None
    assert running.stdout.readline() == b"ready\n"
    running.send_signal(signal.SIGINT)
    assert running.communicate(timeout=patient(20))[0] == b"caught\n"
    assert running.returncode == 3


def test_a_second_ctrl_c_kills_the_command(guest: Served) -> None:
    running = subprocess.Popen(
        command(guest, "run", "--", "sh", "-c", "trap '' INT; echo ready; sleep 100"),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment(),
    )
    assert running.stdout is not None
    assert running.stdout.readline() == b"ready\n"
    running.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert running.poll() is None
    running.send_signal(signal.SIGINT)
    assert running.wait(patient(20)) == 128 + 9
    running.stdout.close()


def test_a_command_whose_reader_goes_away_is_ended(guest: Served) -> None:
    """As in a pipeline here: ``pyvmm ctl S run -- yes | head -1``."""
    running = subprocess.Popen(
        command(guest, "run", "--", "yes"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        env=environment(),
    )
    assert running.stdout is not None
    assert running.stdout.readline() == b"y\n"
    running.stdout.close()
    assert running.wait(patient(20)) == 128 + signal.SIGPIPE


def test_a_terminal_gets_no_control_sequences(guest: Served) -> None:
    master, slave = pty.openpty()
    running = subprocess.Popen(
        command(guest, "run", "--", "printf", r"a\033]0;evil\007b\n"),
        stdin=subprocess.DEVNULL, stdout=slave, env=environment(),
    )
    assert running.wait(patient(20)) == 0
    assert rb"a\x1b]0;evil\x07b" in os.read(master, 1000)
    os.close(master)
    os.close(slave)


def test_files_and_directories_go_in_and_out(guest: Served, tmp_path: Path) -> None:
    """The rules of ``cp -r``, both ways."""
    (tmp_path / "source" / "inner").mkdir(parents=True)
    (tmp_path / "source" / "inner" / "data").write_bytes(os.urandom(100_000))
    os.symlink("data", tmp_path / "source" / "inner" / "link")
    place = tmp_path / "place"
    place.mkdir()
    for words, made in (
        (["put", "source", f"{place}"], "source"),
        (["put", "source", f"{place}/new"], "new"),
        (["put", "source/inner/data", f"{place}/"], "data"),
        (["get", f"{place}/source", f"{place}/back"], "back"),
        (["get", f"{place}/data", "."], "../data"),
    ):
        done = ctl(guest, *words, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, b""), words
        assert (place / made).exists(), words
    assert (tmp_path / "data").read_bytes() == (place / "back/inner/data").read_bytes()
    assert os.readlink(place / "back/inner/link") == "data"
    said = complaint(ctl(guest, "get", f"{place}/missing", str(tmp_path)))
    assert said.count("missing: ") == 1
    assert "No such file" in said
    assert not (tmp_path / "missing").exists()


def test_a_machine_without_an_agent_says_so(rig: Served) -> None:
    assert "has no port for an agent" in complaint(ctl(rig, "run", "--", "ls"))
