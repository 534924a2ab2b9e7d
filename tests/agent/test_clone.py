"""The agent's own program is told that its guest is a clone: the hook, its output, its end."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from pyvmm.agent.binary import PROGRAM
from pyvmm.agent.clone import MAX_HOOK_OUTPUT, CloneAnswer, CloneNotice, HookEnd
from pyvmm.agent.link import AgentLink, LinkState
from tests.support.agent_rig import AgentRig
from tests.support.patience import patient


class ClonedRig(AgentRig):
    """An agent whose guest is a clone: its working directory has the hook."""

    def __init__(
        self, cwd: Path, *, timeout_s: float = 20.0, sets_clock: bool = False
    ) -> None:
        super().__init__(PROGRAM, cwd)
        self.clone_id = uuid4()
        self.link = AgentLink(
            on_state=self._note, wake=lambda: None,
            notice=lambda: CloneNotice(
                clone_id=self.clone_id, hook_timeout_s=timeout_s, sets_clock=sets_clock
            ),
        )
        self.link.opened(True)


@contextmanager
def cloned(
    cwd: Path, *, timeout_s: float = 20.0, sets_clock: bool = False
) -> Iterator[ClonedRig]:
    rig = ClonedRig(cwd, timeout_s=timeout_s, sets_clock=sets_clock)
    try:
        yield rig
    finally:
        assert rig.close() == ""


def write_hook(folder: Path, script: str, mode: int = 0o755) -> Path:
    """Write the hook of the agent that runs in ``folder``."""
    path = folder / "etc/pyvmm/clone"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(mode)
    return path


def answer_of(folder: Path, *, timeout_s: float = 20.0) -> CloneAnswer:
    """Return the answer of an agent in ``folder``."""
    with cloned(folder, timeout_s=timeout_s) as rig:
        rig.ready()
        assert rig.link.clone is not None
        assert rig.link.clone.clone_id == rig.clone_id
        return rig.link.clone


def test_an_image_without_a_hook_is_told_and_takes_orders(tmp_path: Path) -> None:
    with cloned(tmp_path) as rig:
        rig.ready()
        answer = rig.link.clone
        assert answer is not None
        assert (answer.is_told, answer.hook, answer.problem) == (True, HookEnd.NONE, "")
        assert rig.shell("echo yes").stdout == b"yes\n"


def test_the_kernel_is_reseeded_only_with_the_right_to(tmp_path: Path) -> None:
    """In a user namespace of its own no process may: that is no error."""
    may = os.geteuid() == 0 and int(
        next(line for line in Path("/proc/self/status").read_text().splitlines()
             if line.startswith("CapEff")).split()[1], 16
    ) >> 21 & 1
    assert answer_of(tmp_path).is_reseeded == bool(may)


def test_a_date_that_is_right_is_left_alone_and_told(tmp_path: Path) -> None:
    with cloned(tmp_path, sets_clock=True) as rig:
        rig.ready()
        assert rig.link.clone is not None
        assert rig.link.clone.is_clock_set


def test_the_hook_gets_the_clones_number_and_nothing_to_read(tmp_path: Path) -> None:
    write_hook(tmp_path, 'env | sort; cat; echo "to stderr" >&2; echo "$0"')
    answer = answer_of(tmp_path)
    assert (answer.hook, answer.value, answer.problem) == (HookEnd.EXITED, 0, "")
    lines = answer.output.decode().splitlines()
    assert f"PYVMM_CLONE_ID={answer.clone_id}" in lines
    assert "HOME=/root" in lines
    assert "to stderr" in lines


def test_a_hook_that_fails_is_a_problem_with_its_last_words(tmp_path: Path) -> None:
    write_hook(tmp_path, "echo 'no address\x1b[31m'; exit 3")
    assert answer_of(tmp_path).problem == (
        "the hook for clones in the guest, /etc/pyvmm/clone, exited with status 3: "
        r"no address\x1b[31m"
    )


def test_a_hook_that_a_signal_ends_is_a_problem(tmp_path: Path) -> None:
    write_hook(tmp_path, "kill -TERM $$")
    answer = answer_of(tmp_path)
    assert (answer.hook, answer.value) == (HookEnd.SIGNALLED, 15)
    assert answer.problem.endswith("was ended by signal 15")


def test_a_hook_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    write_hook(tmp_path, "sleep 1000 & echo $!; sleep 1000")
    answer = answer_of(tmp_path, timeout_s=0.3)
    assert answer.hook is HookEnd.TIMED_OUT
    assert "took too long and was killed" in answer.problem
    child = Path(f"/proc/{int(answer.output)}/stat")
    until_s = time.monotonic() + patient(10)
    while child.exists() and child.read_text().split()[2] != "Z":
        assert time.monotonic() < until_s, "a child of the hook lives on"
        time.sleep(0.01)


def test_a_hook_that_floods_is_read_to_its_end_and_little_is_kept(tmp_path: Path) -> None:
    write_hook(tmp_path, "head -c 8M /dev/zero; exit 1")
    answer = answer_of(tmp_path)
    assert answer.output == bytes(MAX_HOOK_OUTPUT)
    assert len(answer.problem) < 2000


def test_the_group_of_root_may_write_the_hook(tmp_path: Path) -> None:
    """As it may after ``pyvmm image build --add``, for people with a umask of 002."""
    path = write_hook(tmp_path, "exit 0", 0o775)
    assert answer_of(tmp_path).hook is HookEnd.EXITED
    if os.geteuid() == 0:
        os.chown(path, 0, 1234)
        assert answer_of(tmp_path).hook is HookEnd.FAILED


@pytest.mark.parametrize("mode", [0o644, 0o757])
def test_a_hook_that_others_may_write_or_that_cannot_be_run_is_not_run(
    tmp_path: Path, mode: int
) -> None:
    write_hook(tmp_path, "touch ran", mode)
    answer = answer_of(tmp_path)
    assert answer.hook is HookEnd.FAILED
    assert "did not run: /etc/pyvmm/clone: is no regular file that root owns" in answer.problem
    assert not (tmp_path / "ran").exists()


def test_a_directory_in_the_hooks_place_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "etc/pyvmm/clone").mkdir(parents=True)
    assert answer_of(tmp_path).hook is HookEnd.FAILED


def test_a_hook_without_its_interpreter_says_so(tmp_path: Path) -> None:
    path = write_hook(tmp_path, "")
    path.write_text("#!/no/such/shell\n")
    assert "clone: No such file or directory" in answer_of(tmp_path).problem


def test_commands_wait_until_the_hook_has_ended(tmp_path: Path) -> None:
    write_hook(tmp_path, "while [ ! -e go ]; do sleep 0.01; done; echo done")
    with cloned(tmp_path) as rig:
        rig.until(lambda: rig.link.hello)
        for _ in range(10):
            rig.step(0.02)
        assert rig.link.state is LinkState.WAITING
        assert rig.link.free_jobs == 0
        (tmp_path / "go").touch()
        rig.ready()
        assert rig.link.clone is not None
        assert rig.link.clone.output == b"done\n"
        assert rig.shell("exit 4").result is not None


def test_an_agent_that_died_before_its_answer_is_told_again(tmp_path: Path) -> None:
    write_hook(tmp_path, "[ -e again ] || { touch again; sleep 1000; }")
    seen: list[UUID] = []
    clone_id = uuid4()

    def notice() -> CloneNotice:
        seen.append(clone_id)
        return CloneNotice(clone_id=clone_id)

    first = AgentRig(PROGRAM, tmp_path)
    link = first.link = AgentLink(on_state=lambda: None, wake=lambda: None, notice=notice)
    link.opened(True)
    first.until((tmp_path / "again").exists)
    first.process.kill()
    first.close()
    link.opened(False)
    assert link.state is LinkState.LOST
    second = AgentRig(PROGRAM, tmp_path)
    second.link = link
    link.opened(True)
    second.ready()
    assert second.close() == ""
    assert seen == [clone_id, clone_id]
    assert link.clone is not None
    assert link.clone.hook is HookEnd.EXITED
