"""The doctor's lines about the jail, and that the doctor itself stays outside of it."""

from __future__ import annotations

import errno
import os

import pytest

from pyvmm.cli.doctor import doctor_main
from pyvmm.jail import probe
from pyvmm.jail.probe import Part, parts
from tests.support.apart import apart, become_nobody, refuse_calls

CAPSET, UNSHARE, SECCOMP, CREATE_RULESET, PRCTL = 126, 272, 317, 444, 157
EVERYTHING = (CAPSET, UNSHARE, SECCOMP, CREATE_RULESET, PRCTL)
is_root = os.geteuid() == 0


def parts_in(refused: tuple[int, ...], *, as_nobody: bool = False) -> list[tuple[str, bool, str]]:
    """Return the parts that a container has that refuses ``refused``."""
    def body(_: int) -> list[tuple[str, bool, str]]:
        if as_nobody:
            become_nobody()
        refuse_calls(errno.EPERM, *refused)
        return [(part.text, part.is_there, part.remedy) for part in parts()]

    return apart(body)


def test_the_parts_are_those_of_a_run() -> None:
    found = [part.text.partition(" (")[0] for part in parts() if part.is_there]
    for name in ("no_new_privs", "empty capability sets", "hidden memory", probe.FILTERS):
        assert name in found
    assert ("an empty root and namespaces of its own" in found) <= is_root


def test_the_process_that_asks_stays_as_it_is() -> None:
    def body(_: int) -> bool:
        before = os.listdir("/proc/self/fd"), os.stat("/").st_ino
        list(parts())
        return (os.listdir("/proc/self/fd"), os.stat("/").st_ino) == before

    assert apart(body)


def test_a_user_needs_no_namespaces() -> None:
    assert not any("namespaces" in text for text, _, _ in parts_in((), as_nobody=True))


@pytest.mark.parametrize(("number", "text", "remedy"), [
    (CREATE_RULESET, "Landlock: Operation not permitted; the filter alone keeps files out of reach",
     "use Linux 5.13 or newer"),
    (SECCOMP, f"{probe.FILTERS}: seccomp(2) is refused: Operation not permitted",
     "a container's filter must allow seccomp"),
    (CAPSET, "empty capability sets: Operation not permitted; those that it has stay",
     "loosen the container"),
])
def test_a_part_that_is_lacking_has_a_remedy(number: int, text: str, remedy: str) -> None:
    lacking = [part for part in parts_in((number,)) if not part[1] and part[0].startswith(text)]
    assert len(lacking) == 1
    assert lacking[0][2].startswith(remedy)


@pytest.mark.skipif(not is_root, reason="a user has no namespaces")
def test_root_in_a_container_lacks_namespaces() -> None:
    lacking = [part for part in parts_in((UNSHARE,)) if "namespaces" in part[0]]
    assert [is_there for _, is_there, _ in lacking] == [False]
    assert lacking[0][2].startswith("run where root may make namespaces")


def test_a_container_may_lack_nearly_all_of_it() -> None:
    found = parts_in(EVERYTHING)
    assert [text for text, is_there, _ in found if is_there] == [
        "data that cannot be executed", "closed descriptors", "limits of files and core dumps",
    ]
    assert all(remedy for _, is_there, remedy in found if not is_there)


def test_a_process_that_is_killed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "confine", lambda _plan: os.kill(os.getpid(), 9))
    assert [(part.text, part.is_there) for part in parts()] == [
        ("all of it: a process that enters it is killed", False)
    ]


def test_the_doctor_says_it_in_notes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No part of the jail is needed to run a guest."""
    monkeypatch.setattr("pyvmm.cli.doctor.parts", lambda: iter([
        Part("hidden memory", is_there=True),
        Part("Landlock: Function not implemented", is_there=False, remedy="a newer kernel"),
    ]))
    doctor_main(["--device", "/dev/null"])
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("ok    jail: hidden memory")
    assert lines[at + 1 : at + 3] == [
        "note  jail: missing: Landlock: Function not implemented",
        "      remedy: a newer kernel",
    ]


def test_a_quiet_doctor_makes_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected() -> None:
        raise AssertionError

    monkeypatch.setattr(os, "fork", unexpected)
    assert doctor_main(["--device", "/dev/null", "--quiet"]) == 1
