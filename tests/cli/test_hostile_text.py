"""Names, and texts of guests and servers, that would have the terminal obey them: every command."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.guest import environment
from tests.support.kernels import bzimage
from tests.support.nbd_servers import greet, option_reply, scripted
from tests.support.patience import patient
from tests.support.tiny_guests import HALT, REBOOT, TRIPLE_FAULT, prints, write_guest

HOSTILE = {
    "title": b"\x1b]0;owned\x07",
    "clear": b"\x1b[2J",
    "return": b"\r\rpyvmm: forged line",
    "line": b"x\npyvmm: forged line",
    "c1": b"\xc2\x9b2J",
    "no utf-8": b"\x9b2J\xff\xfe",
    "order": "\u202egnorw\u2066".encode(),
    "separator": "x\u2028pyvmm: forged line\x85".encode(),
    "query": b"\x1b[6n\x05",
}
TEXTS = pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
PREFIX = "pyvmm: "


def check(output: bytes, *, ours: bool = True) -> str:
    """``output`` is text and nothing else, each line ours if ``ours``; the text."""
    text = output.decode("utf-8", "strict")
    for character in text.replace("\r\n", "\n").replace("\n", ""):
        assert character.isprintable(), f"{character!r} in {text!r}"
    for line in text.splitlines() if ours else []:
        assert line.startswith(PREFIX), text
        assert not line.startswith("pyvmm: forged"), text
    return text


def run(*arguments: bytes | str, cwd: Path, ours: bool = True) -> tuple[int, str, str]:
    """``python -m pyvmm`` with ``arguments``, to its end."""
    done = subprocess.run(
        [os.fsencode(sys.executable), b"-m", b"pyvmm", *map(os.fsencode, arguments)], cwd=cwd,
        stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=patient(120),
        env={**environment(), "PYVMM_CACHE": str(cwd / "cache")},
    )
    return done.returncode, check(done.stdout, ours=False), check(done.stderr, ours=ours)


COMMANDS: dict[str, list[str]] = {
    "no such command": ["{}"],
    "kernel missing": ["run", "--kernel", "{}"],
    "kernel bad": ["run", "--kernel", "there-{}"],
    "run option": ["run", "--kernel", "k", "--{}"],
    "run argument": ["run", "--kernel", "k", "{}"],
    "run -vv": ["run", "-vv", "--kernel", "{}"],
    "disk": ["run", "--kernel", "guest", "--disk", "{}"],
    "disk option": ["run", "--kernel", "guest", "--disk", "disk,{}"],
    "serial": ["run", "--kernel", "guest", "--disk", "disk,serial={}"],
    "overlay": ["run", "--kernel", "guest", "--disk", "disk,overlay=/nowhere/{}"],
    "faults": ["run", "--kernel", "guest", "--disk", "disk,faults={}"],
    "script": ["run", "--kernel", "guest", "--disk", "disk,faults=script"],
    "nbd": ["run", "--kernel", "guest", "--disk", "nbd+unix:///?socket=/nowhere/{}"],
    "vhost-user": ["run", "--kernel", "guest", "--disk", "vhost-user=/nowhere/{}"],
    "initrd": ["run", "--kernel", "guest", "--initrd", "{}"],
    "console": ["run", "--kernel", "guest", "--console", "/nowhere/{}"],
    "cpu": ["run", "--kernel", "guest", "--cpu", "{}"],
    "cpu file": ["run", "--kernel", "guest", "--cpu", "{}.json"],
    "memory": ["run", "--kernel", "guest", "--memory", "{}"],
    "timeout": ["run", "--kernel", "guest", "--timeout", "{}"],
    "mmio": ["run", "--kernel", "guest", "--mmio", "{}"],
    "rtc": ["run", "--kernel", "guest", "--rtc", "{}"],
    "cmdline": ["run", "--kernel", "guest", "--append", "{}\u00e4"],
    "export disk": ["export", "--disk", "{}", "--socket", "s"],
    "export socket": ["export", "--disk", "disk", "--socket", "/nowhere/{}"],
    "export option": ["export", "--{}"],
    "doctor device": ["doctor", "--device", "{}"],
    "doctor option": ["doctor", "--{}"],
    "inspect": ["kernel", "inspect", "{}"],
    "inspect bad": ["kernel", "inspect", "there-{}"],
    "inspect config": ["kernel", "inspect", "guest", "--config", "{}"],
    "fetch": ["kernel", "fetch", "{}"],
    "kernel verb": ["kernel", "{}"],
    "matrix": ["matrix", "{}"],
    "matrix bad": ["matrix", "there-{}"],
    "matrix out": ["matrix", "disk", "--out", "/nowhere/{}"],
    "matrix option": ["matrix", "--{}"],
    "lab option": ["lab", "--{}"],
    "lab memory": ["lab", "--memory", "{}", "--", "true"],
    "lab cpus": ["lab", "--cpus", "{}", "--", "true"],
    "lab rw": ["lab", "--rw", "/nowhere/{}", "--", "true"],
    "lab lock": ["lab", "--lock", "{}", "--", "true"],
}


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_fault_2_whatever_a_person_is_made_to_type(tmp_path: Path, arguments: list[str]) -> None:
    """All texts in one, so that 40 commands start once each."""
    hostile = b"".join(HOSTILE.values()).replace(b"/", b"")
    write_guest(tmp_path / "guest", HALT)
    (tmp_path / "disk").write_bytes(bytes(4096))
    (tmp_path / "script").write_bytes(hostile)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/there-" + hostile)).write_bytes(hostile)
    words = [os.fsencode(word).replace(b"{}", hostile) for word in arguments]
    # A traceback's lines and a usage have no prefix.
    status, _, errors = run(*words, cwd=tmp_path, ours="-vv" not in arguments)
    assert status in (1, 125, 127)
    assert errors or "doctor" in arguments
    assert "\npyvmm: forged" not in errors


@TEXTS
def test_fault_2_a_kernels_own_version(tmp_path: Path, text: bytes) -> None:
    name = tmp_path / os.fsdecode(b"kernel " + text)
    name.write_bytes(bzimage(version_text=b"6.1 " + text))
    status, shown, _ = run("kernel", "inspect", str(name), cwd=tmp_path)
    assert status == 0
    assert "version        6.1 " in shown
    assert not any(line.startswith("pyvmm: forged") for line in shown.splitlines())


@TEXTS
def test_fault_2_what_an_nbd_server_says(tmp_path: Path, text: bytes) -> None:
    def refuse(connection: socket.socket) -> None:
        greet(connection)
        connection.sendall(option_reply(0x80000002, b"because " + text))

    write_guest(tmp_path / "guest", HALT)
    with scripted(tmp_path / "sock", refuse):
        uri = f"nbd+unix:///?socket={tmp_path}/sock"
        status, _, errors = run("run", "--kernel", "guest", "--disk", uri, cwd=tmp_path)
    assert (status, "because" in errors) == (125, True)


@pytest.mark.bare
@pytest.mark.parametrize("console", ["none", "file"])
@TEXTS
def test_fault_2_what_a_guest_panics_with(tmp_path: Path, text: bytes, console: str) -> None:
    line = b"[    0.1] Kernel panic - not syncing: " + text.replace(b"\n", b"") + b"\n"
    kernel = write_guest(tmp_path / "guest", prints(line), REBOOT)
    where = console if console == "none" else str(tmp_path / "log")
    status, shown, errors = run(
        "run", "-v", "--kernel", str(kernel), "--console", where, "--timeout", "60", cwd=tmp_path
    )
    assert (status, shown) == (121, "")
    assert "kernel panic: " in errors


@pytest.mark.bare
def test_fault_2_registers_are_lines_of_ours(tmp_path: Path) -> None:
    kernel = write_guest(tmp_path / "guest", TRIPLE_FAULT)
    status, _, errors = run(
        "run", "--kernel", str(kernel), "--console", "none", "--timeout", "60", cwd=tmp_path
    )
    assert status == 122
    assert "pyvmm: code 0f 0b" in errors
    assert "\\n" not in errors


@TEXTS
def test_fault_2_an_export_of_a_disk_with_such_a_name(tmp_path: Path, text: bytes) -> None:
    disk = tmp_path / os.fsdecode(b"disk " + text)
    disk.write_bytes(bytes(4096))
    process = subprocess.Popen(
        [sys.executable, "-m", "pyvmm", "export", "-v", "--disk", str(disk), "--socket", "s"],
        cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment(),
    )
    until_s = time.monotonic() + patient(60)
    while not (tmp_path / "s").exists() and time.monotonic() < until_s:
        time.sleep(0.02)
    disk.write_bytes(bytes(8192))
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    shown, errors = process.communicate(timeout=patient(60))
    assert (process.returncode, shown) == (0, b"")
    assert check(errors).count("disk ") == 2  # it is served, and has grown


def test_fault_2_a_terminal_of_another_encoding(tmp_path: Path) -> None:
    """What it cannot show is spelled out, not an error."""
    name = tmp_path / "k\u00e4rn\u4e2d"
    name.write_bytes(bzimage(version_text=b"6.1"))
    done = subprocess.run(
        [sys.executable, "-m", "pyvmm", "kernel", "inspect", str(name), "--config", "\u4e2d"],
        cwd=tmp_path, capture_output=True, check=False, timeout=patient(60),
        env={**environment(), "PYTHONIOENCODING": "latin-1"},
    )
    assert done.returncode == 125
    assert b"\\u4e2d: " in done.stderr


def test_the_bench_of_hostile_names_knows_a_raw_one() -> None:
    with pytest.raises(AssertionError):
        check(b"pyvmm: \x1b[2J\n")
    with pytest.raises(AssertionError):
        check(b"something else\n")
