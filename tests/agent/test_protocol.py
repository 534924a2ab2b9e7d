"""The requests of the host to the agent: bounds are checked before a byte is sent."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pyvmm.agent.protocol import MAX_PAYLOAD, RUN, RunRequest, path_bytes, printable
from pyvmm.errors import AgentError


def test_a_commands_texts_end_with_zero_bytes() -> None:
    request = RunRequest(
        argv=("ls", b"\xff", "\udcfe"), env=(("A", "b=c"),), cwd="/tmp", timeout_ms=7,
        has_input=True,
    )
    payload = request.payload()
    assert RUN.unpack_from(payload) == (1, 7, 3, 1)
    assert payload[RUN.size :] == b"/tmp\0ls\0\xff\0\xfe\0A=b=c\0"
    exact = RunRequest(argv=("ls",), is_env_exact=True).payload()
    assert RUN.unpack_from(exact) == (2, 0, 1, 0)


@pytest.mark.parametrize(("fields", "problem"), [
    ({"argv": ()}, "a command for the guest needs a program"),
    ({"argv": ("",)}, "a command for the guest needs a program"),
    ({"argv": ("a", "b\0c")}, r"an argument for the guest has a zero byte: b\\x00c"),
    ({"argv": ("a\ud800",)}, r"an argument for the guest is no text: a\\ud800"),
    ({"argv": ("a",), "cwd": "\0"}, "a working directory for the guest has a zero byte"),
    ({"argv": ("a",), "env": (("", "x"),)}, "'' cannot be the name of an environment variable"),
    ({"argv": ("a",), "env": (("A=B", "x"),)}, "'A=B' cannot be the name"),
    ({"argv": ("a",), "timeout_ms": -1}, "time limit must be 0 to 4294967295 ms, not -1"),
    ({"argv": ("a",), "timeout_ms": 1 << 32}, "time limit must be"),
    ({"argv": ("a", "x" * 70000)}, "arguments and environment of a are 70004 bytes; .* 65472"),
    ({"argv": ("a",), "env": (("X", "x" * 70000),)}, "put long data into a file"),
])
def test_what_the_agent_could_not_take_is_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(AgentError, match=problem) as refused:
        RunRequest(**fields).payload()
    assert str(refused.value).isprintable()


def test_the_longest_command_fits_into_a_frame() -> None:
    payload = RunRequest(argv=("a",) * (65472 // 2 - 1)).payload()
    assert len(payload) <= MAX_PAYLOAD


@pytest.mark.parametrize(("path", "problem"), [
    ("etc", "must begin with /, not 'etc'"), ("", "must begin with /"),
    ("/a\0b", "has a zero byte"), ("/" + "x" * 4095, "at most 4095 bytes, not 4096"),
])
def test_a_path_that_is_none_is_refused(path: str, problem: str) -> None:
    with pytest.raises(AgentError, match=problem):
        path_bytes(path)


def test_a_path_may_be_bytes() -> None:
    assert path_bytes(b"/\xff") == b"/\xff"
    assert path_bytes("/" + "x" * 4094) == b"/" + b"x" * 4094


def test_texts_for_a_line_are_escaped_and_cut() -> None:
    assert printable(b"a\x1b[31m\xff\n") == r"a\x1b[31m\udcff\n"
    assert printable("x" * 100) == "x" * 80 + "..."


def test_the_kinds_of_ends_are_plain_text_for_json() -> None:
    from pyvmm.agent.link import JobEnd

    assert json.dumps([JobEnd.EXITED, JobEnd.LOST]) == '["exited", "lost"]'
