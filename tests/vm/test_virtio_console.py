"""The virtio console as a person meets it: output, a shell on hvc0, the terminal's size."""

from __future__ import annotations

import fcntl
import struct
import termios
from collections.abc import Iterator

import pytest

from tests.support.guest import IMAGE, USER_SPACE, boot, run_in_guest
from tests.support.terminal import Terminal

pytestmark = pytest.mark.kvm


@pytest.fixture
def shell() -> Iterator[Terminal]:
    terminal = Terminal(
        "--disk", f"{IMAGE},snapshot", "--append", "quiet console=hvc0 pyvmm.shell",
        rows=30, columns=90,
    )
    terminal.wait_for("# ", 100)
    yield terminal
    terminal.close()


def test_output_comes_by_it() -> None:
    run = boot("--disk", f"{IMAGE},snapshot", "--cpus", "2",
               append=f"console=hvc0 {run_in_guest('tty; seq 1 1000')}")
    assert run.status == 0, run.console + run.messages
    assert run.lines(USER_SPACE)
    assert run.lines("/dev/hvc0") == [""]
    assert [line for line in run.console.splitlines() if line.isdigit()] == [
        str(number) for number in range(1, 1001)
    ]


def test_a_shell_knows_the_terminals_size_and_learns_a_new_one(shell: Terminal) -> None:
    shell.type("stty size; tty\r")
    shell.wait_for("30 90")
    shell.wait_for("/dev/hvc0")
    shell.wait_for("# ")
    fcntl.ioctl(shell.master, termios.TIOCSWINSZ, struct.pack("HHHH", 43, 132, 0, 0))
    # The news travels by an interrupt: what is typed at once may be ahead of it.
    shell.type("until [ $(stty size | tr ' ' x) = 43x132 ]; do sleep 0.1; done; echo re'sized'\r")
    shell.wait_for("resized")
    shell.wait_for("# ")
    shell.type("exit 6\r")
    assert shell.status() == 6
