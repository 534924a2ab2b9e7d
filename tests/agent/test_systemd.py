"""The agent waits until systemd answers at its private socket, not only until the file is there."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest.agent.build import HERE
from tests.support.patience import patient

HARNESS = """
#define _GNU_SOURCE
#include <unistd.h>
#include "agent.h"
/* Asks each time that a line comes, and says what it found. */
int main(int argc, char **argv)
{
	int root = argc > 1 ? open(argv[1], O_PATH | O_DIRECTORY) : -1;
	char line[10];
	while (read(0, line, sizeof line) > 0)
		if (write(1, systemd_answers(root) ? "y" : "n", 1) < 0)
			return 1;
	return 0;
}
"""


@pytest.fixture
def asked(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    (tmp_path / "harness.c").write_text(HARNESS)
    subprocess.run(
        ["gcc", "-std=gnu11", f"-I{HERE}", "-o", tmp_path / "harness",
         tmp_path / "harness.c", HERE / "systemd.c", HERE / "util.c"], check=True
    )
    with subprocess.Popen(
        [tmp_path / "harness", tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(patient(10)) == 0


def ask(process: subprocess.Popen[bytes]) -> bool:
    """True if the agent finds systemd ready now."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"?\n")
    process.stdin.flush()
    return process.stdout.read(1) == b"y"


def test_only_an_answer_makes_systemd_ready(
    asked: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    assert not ask(asked)
    folder = tmp_path / "run/systemd"
    folder.mkdir(parents=True)
    stale = socket.socket(socket.AF_UNIX)
    with contextlib.closing(stale):
        stale.bind(str(folder / "private"))
        assert not ask(asked), "nobody listens: one of an initramfs may be left"
    (folder / "private").unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.settimeout(patient(10))
        listener.bind(str(folder / "private"))
        listener.listen()
        assert [ask(asked) for _ in range(5)] == [False] * 5, "its loop does not run yet"
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(100) == b"\0AUTH EXTERNAL 30\r\n"
            assert not ask(asked)
            connection.sendall(b"OK 0123456789abcdef0123456789abcdef\r\n")
            assert ask(asked)
