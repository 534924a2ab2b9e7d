"""Saves, rewinds and restores in the jail, wherever it is: as root, as a user, in a container."""

from __future__ import annotations

import errno
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.apart import refuse_calls
from tests.support.guest import environment
from tests.support.launched import until
from tests.support.patience import patient
from tests.support.tiny_guests import REPORT_7, echoes_once, prints, write_guest
from tests.support.warm_runs import pyvmm

pytestmark = pytest.mark.bare

LIMIT_S = 60
USER = "54321"
SETPRIV_USER = ("setpriv", "--reuid", USER, "--regid", USER, "--clear-groups", "--inh-caps",
                "+dac_override", "--ambient-caps", "+dac_override")
"""Another user, who may still read this Python and /dev/kvm; the jail drops that capability."""
SETPRIV_CONTAINER = ("setpriv", "--inh-caps=-all", "--bounding-set",
                     "-all,+chown,+dac_override,+setgid,+setuid,+setpcap,+kill,+fowner")
MOUNT, PIVOT_ROOT, UNSHARE, SETNS, OPEN_TREE = 165, 155, 272, 308, 428
LACKS = "pyvmm: the jail lacks an empty root and namespaces of its own: Operation not permitted"


class Place:
    """Somewhere that pyvmm runs: behind ``prefix``, after ``before``, with options of the jail."""

    def __init__(
        self, folder: Path, prefix: Sequence[str] = (), options: Sequence[str] = (),
        before: Callable[[], None] | None = None, says: Sequence[str] = (),
    ) -> None:
        self.folder, self.options, self.says = folder, options, list(says)
        self._prefix, self._before = prefix, before

    def start(self, *words: str | Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*self._prefix, *pyvmm(*words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=environment(), cwd=self.folder, preexec_fn=self._before,
        )

    def run(self, *words: str | Path, stdin: bytes = b"") -> tuple[int, str, list[str]]:
        """Run to the end: exit status, standard output, lines of standard error."""
        return self.end(self.start(*words), stdin)

    def end(
        self, process: subprocess.Popen[bytes], stdin: bytes = b""
    ) -> tuple[int, str, list[str]]:
        out, said = process.communicate(stdin, timeout=patient(LIMIT_S))
        return process.returncode, out.decode(), said.decode().splitlines()

    def ctl(self, *words: str) -> None:
        status, _, said = self.run("ctl", "socket", *words)
        assert (status, said) == (0, []), words


def in_container() -> Callable[[], None]:
    """What a container's filter refuses, as root's in it too."""
    return functools.partial(
        refuse_calls, errno.EPERM, MOUNT, PIVOT_ROOT, UNSHARE, SETNS, OPEN_TREE
    )


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory in which every user may make files, as in /tmp."""
    path = Path(tempfile.mkdtemp(prefix="pyvmm-places-", dir="/tmp"))
    path.chmod(0o1777)
    yield path
    shutil.rmtree(path)


@pytest.fixture(params=["here", "a user", "--user", "a container"])
def place(request: pytest.FixtureRequest, folder: Path) -> Place:
    if request.param == "here":
        return Place(folder)
    if os.geteuid() != 0:
        pytest.skip("only root may choose where to be")
    if request.param == "a user":
        return Place(folder, prefix=SETPRIV_USER)
    if request.param == "--user":
        return Place(folder, options=["--user", f"{USER}:{USER}"])
    return Place(folder, prefix=SETPRIV_CONTAINER, before=in_container(), says=[LACKS])


def test_a_machine_is_saved_rewound_and_restored_everywhere(place: Place, folder: Path) -> None:
    (folder / "disk").write_bytes(bytes(1 << 20))
    kernel = write_guest(
        folder / "guest.elf", prints(b"first half"), echoes_once(), prints(b" bye\n"), REPORT_7
    )
    limit = ("--timeout", str(patient(LIMIT_S)))
    process = place.start(
        "run", "--kernel", kernel, "--disk", "disk,snapshot", "--control", "socket", *limit,
        *place.options,
    )
    assert process.stdout is not None
    assert process.stdout.read(len("first half")) == b"first half"
    for words in (
        ("pause",), ("registers",), ("resume",), ("checkpoint",), ("snapshot", "still"),
        ("snapshot", "--live", "live"), ("rewind", "1"), ("rewind",), ("stop",),
    ):
        place.ctl(*words)
    _, _, said = place.end(process)
    assert [line.partition(";")[0] for line in said] == place.says
    until(lambda: not (folder / "socket").exists())
    for name in ("still", "live"):
        if place.options:
            # The user whom root had made the machine may have put anything into it.
            status, _, said = place.run("restore", name, *limit, *place.options)
            assert status == 125, said
            for path in (folder / name, *(folder / name).iterdir()):
                os.chown(path, 0, 0)
            (folder / name).chmod(0o755)
        status, printed, said = place.run("restore", name, *limit, *place.options, stdin=b"x")
        assert (status, printed) == (7, "x bye\n"), said
        assert [line.partition(";")[0] for line in said] == place.says
