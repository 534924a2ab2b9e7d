"""The agent's own program, on this host: commands, their streams, ends and limits."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyvmm.agent.binary import PROGRAM
from pyvmm.agent.link import JobEnd, RunRequest
from pyvmm.agent.protocol import MAX_JOBS, WINDOW
from pyvmm.errors import AgentError
from tests.support.agent_rig import AgentRig, Events, agent_rig
from tests.support.patience import patient

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[AgentRig]:
    with agent_rig(cwd=tmp_path) as rig:
        yield rig


def ended(events: Events) -> tuple[JobEnd, int]:
    """Return how a job ended, and with what value."""
    assert events.result is not None
    return events.result.kind, events.result.value


def test_says_who_it_is(rig: AgentRig) -> None:
    assert rig.link.hello is not None
    assert rig.link.hello.text.startswith("pyvmm-agent 2 on Linux ")


def test_both_outputs_come_apart_and_the_status_comes_last(rig: AgentRig) -> None:
    events = rig.shell("echo out; echo err >&2; exit 7")
    assert (events.stdout, events.stderr, ended(events)) == (b"out\n", b"err\n", (JobEnd.EXITED, 7))
    assert sorted(events.ended) == [1, 2]


@pytest.mark.parametrize("status", [0, 1, 119, 127, 255])
def test_every_status_comes_as_it_is(rig: AgentRig, status: int) -> None:
    assert ended(rig.shell(f"exit {status}")) == (JobEnd.EXITED, status)


def test_arguments_are_no_text_for_a_shell_and_need_not_be_utf_8(rig: AgentRig) -> None:
    words = [b"", b"a b", b"$HOME;'\"", bytes(range(1, 256))]
    events = rig.run("/usr/bin/printf", "%s\\n", *words)
    assert events.stdout == b"".join(word + b"\n" for word in words)


def test_the_environment_is_added_to_the_defaults(rig: AgentRig) -> None:
    given = (("A", "1 2"), ("HOME", "/tmp"), (b"B", b"\xff"))
    lines = rig.run("env", env=given).stdout.splitlines()
    assert sorted(lines) == sorted([
        b"A=1 2", b"HOME=/tmp", b"B=\xff", b"TERM=linux", b"PATH=" + DEFAULT_PATH.encode(),
    ])
    exact = rig.run("/usr/bin/env", env=(("A", "1"),), is_env_exact=True)
    assert exact.stdout == b"A=1\n"


def test_the_working_directory_is_the_asked_one(rig: AgentRig, tmp_path: Path) -> None:
    (tmp_path / "ä b").mkdir()
    assert rig.run("pwd", cwd=str(tmp_path / "ä b")).stdout.decode() == f"{tmp_path}/ä b\n"


@pytest.mark.parametrize(("argv", "more", "errno", "reason"), [
    (("no-such-program",), {}, 2, "no-such-program: No such file or directory"),
    (("/etc/passwd",), {}, 13, "/etc/passwd: Permission denied"),
    (("true",), {"cwd": "/no/such"}, 2, "/no/such: No such file or directory"),
    (("/etc",), {}, 13, "/etc: Permission denied"),
])
def test_a_command_that_cannot_start_says_why(
    rig: AgentRig, argv: tuple[str, ...], more: dict[str, Any], errno: int, reason: str
) -> None:
    events = rig.run(*argv, **more)
    assert events.result is not None
    assert ended(events) == (JobEnd.FAILED, errno)
    assert events.result.reason == reason


def test_input_goes_to_the_command_and_ends(rig: AgentRig) -> None:
    data = os.urandom(3 * WINDOW + 17)
    events = rig.run("cat", feed=data)
    assert events.stdout == data
    assert ended(events) == (JobEnd.EXITED, 0)


def test_without_input_a_command_reads_the_end_at_once(rig: AgentRig) -> None:
    assert rig.run("cat").stdout == b""


def test_a_command_that_does_not_read_its_input_may_be_sent_any_amount(rig: AgentRig) -> None:
    events = rig.shell("exec <&-; sleep 0.2; echo done", feed=bytes(8 * WINDOW))
    assert events.stdout == b"done\n"
    assert ended(events) == (JobEnd.EXITED, 0)


def test_a_command_that_closes_its_outputs_goes_on(rig: AgentRig) -> None:
    events = rig.start("/bin/sh", "-c", "exec >&- 2>&-; sleep 0.3; exit 3")
    rig.until(lambda: len(events.ended) == 2)
    assert events.result is None
    rig.until(lambda: events.result)
    assert ended(events) == (JobEnd.EXITED, 3)


def test_64_mib_of_output_come_whole_and_the_agent_stays_small(rig: AgentRig) -> None:
    script = "head -c 64M /dev/zero | tr '\\0' x"
    assert rig.shell(script).stdout == b"x" * (64 << 20)
    assert resident_kb(rig.process.pid) < 1024


def resident_kb(pid: int) -> int:
    """Return the largest size that a process had, of memory of its own, in KiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))


def test_a_signal_that_kills_a_command_is_told(rig: AgentRig) -> None:
    assert ended(rig.shell("kill -SEGV $$")) == (JobEnd.SIGNALLED, signal.SIGSEGV)


def test_kill_reaches_the_whole_process_group(rig: AgentRig, tmp_path: Path) -> None:
    script = "sleep 1000 & echo $! >child; wait"
    events = rig.start("/bin/sh", "-c", script, cwd=str(tmp_path))
    child = tmp_path / "child"
    rig.until(lambda: child.exists() and child.read_text())
    assert events.job is not None
    events.job.kill(signal.SIGTERM)
    rig.until(lambda: events.result)
    assert ended(events) == (JobEnd.SIGNALLED, signal.SIGTERM)
    rig.until(lambda: not is_alive(int(child.read_text())))


def is_alive(pid: int) -> bool:
    """True if a process runs: a dead one that nobody waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_command_may_take_a_signal_and_end_as_it_likes(rig: AgentRig) -> None:
    events = rig.start("/bin/sh", "-c", "trap 'echo got it; exit 5' TERM; echo ready; "
                       "while :; do sleep 0.05; done")
    rig.until(lambda: events.stdout)
    assert events.job is not None
    events.job.kill(signal.SIGTERM)
    rig.until(lambda: events.result)
    assert (events.stdout, ended(events)) == (b"ready\ngot it\n", (JobEnd.EXITED, 5))


def test_at_its_time_limit_a_command_is_killed_with_its_children(
    rig: AgentRig
) -> None:
    began_s = time.monotonic()
    events = rig.shell("sleep 1000 & echo $!; wait", timeout_ms=300)
    assert events.result is not None
    assert events.result.is_timeout
    assert ended(events) == (JobEnd.SIGNALLED, signal.SIGKILL)
    assert 0.3 <= time.monotonic() - began_s < patient(10)
    rig.until(lambda: not is_alive(int(events.stdout)))


def test_a_command_within_its_time_limit_is_left_alone(rig: AgentRig) -> None:
    events = rig.shell("exit 4", timeout_ms=1000 * int(patient(60)))
    assert events.result is not None
    assert (ended(events), events.result.is_timeout) == ((JobEnd.EXITED, 4), False)


def test_a_daemon_that_holds_the_pipes_open_does_not_hold_up_the_end(
    rig: AgentRig, tmp_path: Path
) -> None:
    """Its parent's output is whole; the daemon lives on, and its own output is lost."""
    script = "(setsid sh -c 'echo $$ >pid; sleep 1000') & head -c 100000 /dev/zero; echo end"
    began_s = time.monotonic()
    events = rig.shell(script, cwd=str(tmp_path))
    assert time.monotonic() - began_s < patient(10)
    assert ended(events) == (JobEnd.EXITED, 0)
    assert events.stdout == bytes(100000) + b"end\n"
    pid = tmp_path / "pid"
    rig.until(lambda: pid.exists() and pid.read_text())
    assert is_alive(int(pid.read_text()))
    os.kill(int(pid.read_text()), signal.SIGKILL)


def test_a_daemon_that_writes_without_end_does_not_hold_up_the_end(rig: AgentRig) -> None:
    events = rig.shell("yes & echo $! >&2")
    assert ended(events) == (JobEnd.EXITED, 0)
    # It writes into a pipe that nobody reads any more.
    rig.until(lambda: not is_alive(int(events.stderr)))


def test_sixteen_commands_run_at_once_and_a_seventeenth_is_refused(rig: AgentRig) -> None:
    held = [Events() for _ in range(MAX_JOBS)]
    for index, events in enumerate(held):
        script = f"read line; echo {index} $line; exit {index}"
        request = RunRequest(argv=("/bin/sh", "-c", script), has_input=True)
        events.job = rig.link.run(request, events)
    with pytest.raises(AgentError, match="16 jobs"):
        rig.start("true")
    for events in reversed(held):
        assert events.job is not None
        events.job.write(b"go\n")
    rig.until(lambda: all(events.result for events in held))
    assert [events.stdout for events in held] == [b"%d go\n" % n for n in range(MAX_JOBS)]
    assert [ended(events)[1] for events in held] == list(range(MAX_JOBS))
    assert ended(rig.run("true")) == (JobEnd.EXITED, 0)


def test_an_output_that_nobody_takes_holds_up_only_its_own_command(rig: AgentRig) -> None:
    stuck = rig.start("yes", limit=0)
    rig.until(lambda: len(stuck.stdout) == WINDOW)
    also = rig.start("/bin/sh", "-c", "yes >&2", limit=0)
    rig.until(lambda: len(also.stderr) == WINDOW)
    assert rig.shell("head -c 4M /dev/zero").stdout == bytes(4 << 20)
    assert len(stuck.stdout) == WINDOW
    for events in (stuck, also):
        assert events.job is not None
        events.job.kill(signal.SIGKILL)
    # What is in the pipe has no credit to come, until it is dropped.
    for events in (stuck, also):
        assert events.job is not None
        rig.until(lambda events=events: events.result or events.job.kill(9))  # type: ignore[misc]


def test_one_stuck_output_does_not_hold_up_the_other_of_its_command(rig: AgentRig) -> None:
    events = rig.start("/bin/sh", "-c", "yes & head -c 100000 /dev/zero >&2; wait", limit=0)
    rig.until(lambda: len(events.stdout) == WINDOW and len(events.stderr) == 100000)
    assert events.job is not None
    events.job.kill(signal.SIGKILL)


def test_an_input_that_a_command_does_not_read_holds_up_only_itself(rig: AgentRig) -> None:
    stuck = rig.start("sleep", "1000", feed=bytes(2 * WINDOW))
    assert rig.run("cat", feed=bytes(4 * WINDOW)).stdout == bytes(4 * WINDOW)
    assert stuck.job is not None
    assert stuck.job.room == 0
    stuck.job.kill(signal.SIGKILL)
    rig.until(lambda: stuck.result)


def test_killing_a_command_that_has_ended_drops_what_is_left(rig: AgentRig) -> None:
    """Its output fits into the window and the pipe, so that it ends while nobody takes it."""
    events = rig.start("/bin/sh", "-c", f"head -c {WINDOW + 60000} /dev/zero", limit=0)
    rig.until(lambda: len(events.stdout) == WINDOW)
    deadline_s = time.monotonic() + 0.3
    rig.until(lambda: time.monotonic() > deadline_s)
    assert events.result is None
    assert events.job is not None
    events.job.kill(signal.SIGKILL)
    rig.until(lambda: events.result)
    assert ended(events) == (JobEnd.EXITED, 0)


def test_another_signal_to_a_command_that_has_ended_takes_nothing_away(rig: AgentRig) -> None:
    size = WINDOW + 60000
    events = rig.start("/bin/sh", "-c", f"head -c {size} /dev/zero", limit=0)
    rig.until(lambda: len(events.stdout) == WINDOW)
    deadline_s = time.monotonic() + 0.3
    rig.until(lambda: time.monotonic() > deadline_s)
    assert events.job is not None
    events.job.kill(signal.SIGTERM)
    events.job.consumed(1, WINDOW)
    rig.until(lambda: events.result)
    assert ended(events) == (JobEnd.EXITED, 0)
    assert len(events.stdout) == size


def test_a_ping_is_answered_while_commands_are_stuck(rig: AgentRig) -> None:
    stuck = rig.start("yes", limit=0)
    pongs: list[int] = []
    for index in range(5):
        rig.link.ping(lambda index=index: pongs.append(index))  # type: ignore[misc]
    rig.until(lambda: len(pongs) == 5)
    assert pongs == [0, 1, 2, 3, 4]
    assert stuck.job is not None
    stuck.job.kill(signal.SIGKILL)


def test_a_thousand_commands_leave_no_descriptor_and_no_process(rig: AgentRig) -> None:
    folder = Path(f"/proc/{rig.process.pid}/fd")
    rig.run("true")
    before = len(os.listdir(folder))
    for _ in range(50):
        together = [rig.start("true") for _ in range(MAX_JOBS)]
        rig.until(lambda jobs=together: all(e.result for e in jobs))  # type: ignore[misc]
    assert len(os.listdir(folder)) == before
    children = Path(f"/proc/{rig.process.pid}/task/{rig.process.pid}/children")
    assert children.read_text() == ""


def test_a_command_inherits_its_three_streams_only_and_signals_as_they_were(
    rig: AgentRig
) -> None:
    others = [rig.start("sleep", "1000", feed=bytes(2 * WINDOW)) for _ in range(3)]
    assert rig.run("ls", "/proc/self/fd").stdout.split() == [b"0", b"1", b"2", b"3"]  # 3: its own
    lines = rig.run("cat", "/proc/self/status").stdout.splitlines()
    status = dict(line.split(b":\t") for line in lines)
    assert {int(status[name], 16) for name in (b"SigBlk", b"SigIgn", b"SigCgt")} == {0}
    for events in others:
        assert events.job is not None
        events.job.kill(signal.SIGKILL)


def test_a_signal_that_the_c_library_hides_is_as_it_was_too(tmp_path: Path) -> None:
    hidden, ignored = 32, (ctypes.c_ulong * 4)(signal.SIG_IGN)
    libc, rt_sigaction = ctypes.CDLL(None), 13
    before = (ctypes.c_ulong * 4)()
    assert libc.syscall(rt_sigaction, hidden, ignored, before, 8) == 0
    try:
        rig = AgentRig(PROGRAM, tmp_path)
    finally:
        libc.syscall(rt_sigaction, hidden, before, None, 8)
    rig.ready()
    lines = rig.run("grep", "SigIgn", "/proc/self/status").stdout.split()
    assert int(lines[1], 16) == 0
    rig.close()


def test_when_the_host_goes_away_its_commands_are_killed(tmp_path: Path) -> None:
    rig = AgentRig(PROGRAM, tmp_path)
    rig.ready()
    rig.start("/bin/sh", "-c", f"echo $$ >{tmp_path}/pid; exec sleep 1000")
    pid = tmp_path / "pid"
    rig.until(lambda: pid.exists() and pid.read_text())
    assert rig.close() == ""
    end_s = time.monotonic() + patient(10)
    while is_alive(int(pid.read_text())):
        assert time.monotonic() < end_s
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGPIPE])
def test_a_signal_right_behind_a_command_is_not_lost(rig: AgentRig, number: int) -> None:
    """Both orders come in one read: the command's process has just begun then."""
    def end_of_one() -> tuple[JobEnd, int]:
        events = Events()
        rig.link.run(RunRequest(argv=("sleep", "60")), events).kill(number)
        rig.until(lambda: events.result)
        return ended(events)

    assert {end_of_one() for _ in range(20)} == {(JobEnd.SIGNALLED, number)}


def test_what_a_process_left_behind_takes_from_the_pipe_holds_up_no_end(
    rig: AgentRig, tmp_path: Path
) -> None:
    """The agent has counted the bytes in the pipe by then, and waits for credit to send them."""
    events = rig.start(
        "/bin/sh", "-c", f"head -c {WINDOW + 9} /dev/zero; "
        "(dd bs=9 count=1 of=/dev/null 2>/dev/null; touch taken; exec sleep 600) "
        "</proc/self/fd/1 & echo $! >left; exit 0", limit=0,
    )
    rig.until(lambda: (tmp_path / "taken").exists())
    assert events.job is not None
    events.job.consumed(1, WINDOW)
    rig.until(lambda: events.result)
    os.kill(int((tmp_path / "left").read_text()), signal.SIGKILL)
    assert ended(events) == (JobEnd.EXITED, 0)
