"""Who is measured: reading peers.toml."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import peers
from bench.figures import BenchError
from bench.peers import Contender
from bench.run import Plan

ANY_VMM = '[[vmm]]\nname = "v"\nours = true\ncommand = "v"\n'


def test_the_peers_of_the_checkout_are_in_order() -> None:
    found = peers.load()
    assert [one.name for one in found["vmm"]] == ["pyvmm", "QEMU microvm"]
    assert [one.name for one in found["daemon"]] == ["pyvmm export", "qemu-storage-daemon"]
    assert [one.ours for one in found["vmm"]] == [True, False]


def test_another_vmm_is_a_name_and_a_command(tmp_path: Path) -> None:
    file = tmp_path / "peers.toml"
    file.write_text(f'{peers.PEERS_FILE.read_text()}\n[[vmm]]\nname = "z"\n'
                    'command = "echo -k {kernel} -p {append}"\n')
    plan = Plan(peers.load(file), ["start.user_space", "guest"])
    rows = plan.results([])
    assert [row.peer for row in rows if row.key == "start.user_space"] == ["QEMU microvm", "z"]
    last = peers.load(file)["vmm"][-1]
    assert last.command("command", kernel="/k", append="a 'b' {kernel}") == [
        "echo", "-k", "/k", "-p", "a 'b' {kernel}"
    ]
    with pytest.raises(BenchError, match="z has no `data`"):
        last.command("command", "data", kernel="k", append="")


def test_a_program_that_is_not_there_is_named() -> None:
    contender = Contender(name="n", lines={"command": "no-such-program -x"})
    with pytest.raises(BenchError, match="no-such-program is not installed"):
        contender.command("command")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[vmm", "peers.toml"),
        ("[[vm]]", "vm: there are"),
        ("[vmm]", "several"),
        ("", "exactly one"),
        (ANY_VMM, "daemon: exactly one"),
        (ANY_VMM + ANY_VMM, "two are named v"),
        ('[[vmm]]\ncommand = "x"', "no name"),
        ('[[vmm]]\nname = "x"', "no command"),
        ('[[vmm]]\nname = "x"\nours = 1\ncommand = "x"', "true or false"),
        ('[[vmm]]\nname = "x"\ncommand = 7', "command: is not text"),
        ('[[vmm]]\nname = "x"\ncommand = "{kernle}"', "nothing is called {kernle}"),
        ("[[vmm]]\nname = \"x\"\ncommand = \"it's\"", "No closing quotation"),
    ],
)
def test_a_bad_peers_file_is_one_error(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "peers.toml"
    file.write_text(text)
    with pytest.raises(BenchError) as caught:
        peers.load(file)
    assert said in str(caught.value)
    assert str(file) in str(caught.value)
