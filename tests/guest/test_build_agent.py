"""guest/agent/build.py: the program in the package is what this source makes, byte for byte."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from guest.agent import build
from pyvmm.agent.binary import BUILT_WITH, PROGRAM, read_program


def test_the_program_in_the_package_is_rebuilt_byte_for_byte(tmp_path: Path) -> None:
    recorded, found = BUILT_WITH.read_text().splitlines(), build.tool_versions()
    assert recorded == found, (
        f"{PROGRAM.name} was built with {recorded}, here are {found}: its bytes cannot be "
        "compared; `make agent` builds it with the tools that are here"
    )
    build.build(tmp_path / "agent")
    assert (tmp_path / "agent").read_bytes() == read_program(), (
        "guest/agent/*.c make another program than the one in pyvmm/agent: run `make agent`"
    )


def test_nothing_of_the_place_and_time_of_a_build_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CPATH", "/nowhere")
    monkeypatch.setenv("CFLAGS", "-O0")
    out = tmp_path / "a folder" / "agent"
    assert build.main(["--out", str(out)]) == 0
    data = out.read_bytes()
    assert data == read_program()
    for path in (tmp_path, build.HERE):
        assert os.fsencode(path) not in data


def test_it_is_a_small_static_program_for_this_machine() -> None:
    data = read_program()
    assert data[:6] == b"\x7fELF\x02\x01"
    assert data[16:20] == b"\x02\x00\x3e\x00"  # ET_EXEC for x86-64
    assert b"/ld-musl" not in data
    assert len(data) < 128 << 10
    assert stat.S_IMODE(PROGRAM.stat().st_mode) & 0o111


def test_a_missing_compiler_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "COMPILER", "no-such-compiler")
    assert build.main(["--out", str(tmp_path / "agent")]) == 1
    assert capsys.readouterr().err == (
        "build: no-such-compiler is missing; install Debian's musl-tools and gcc\n"
    )
