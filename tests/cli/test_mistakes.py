"""Mistakes in a command line: one line with one prefix, which says what may be meant; 125."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.cli import (
    ctl,
    doctor,
    export,
    image,
    kernel,
    lab,
    matrix,
    ps,
    restore,
    run,
    snapshot,
    test,
)
from pyvmm.cli.main import COMMANDS, main
from pyvmm.cli.parse import parse_console
from pyvmm.startup.commands import Command

TABLES = [
    run.COMMAND, test.COMMAND, matrix.COMMAND, export.COMMAND, doctor.COMMAND, lab.COMMAND,
    ps.COMMAND, *kernel.COMMAND.verbs, *image.COMMAND.verbs, *ctl.COMMAND.verbs,
    restore.COMMAND, *snapshot.COMMAND.verbs,
]
PAST = {"kernel inspect": ["f"], "kernel fetch": ["debian"], "kernel build": ["d"],
        "image build": ["--busybox", "o"], "matrix": ["f"],
        "run": ["--kernel", "k", "--disk", "d"],
        "test": ["--kernel", "k"],
        "export": ["--disk", "d", "--socket", "s"],
        "ctl SOCKET type": ["t"], "ctl SOCKET put": ["a", "/b"], "ctl SOCKET get": ["/a", "b"],
        "ctl SOCKET memory": ["0", "1"], "ctl SOCKET snapshot": ["a"],
        "restore": ["d"], "snapshot info": ["d"], "snapshot check": ["d"],
        "snapshot merge": ["d", "o"]}
"""The words that make the rest of a command line complete."""
NO_COMMAND = {
    "lab": "lab: no command given", "test": "test: has nothing to do",
    "ctl SOCKET run": "ctl run: names no command",
    "ctl SOCKET registers": "SOCKET: No such file",  # of vCPU 0
    "ctl SOCKET rewind": "SOCKET: No such file",  # to the newest
}


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that ``pyvmm argv`` is refused with, less its prefix."""
    assert main(list(argv)) == 125
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("pyvmm: ")
    assert captured.err.count("\n") == 1, captured.err
    return captured.err.removeprefix("pyvmm: ").rstrip("\n")


def mistakes(command: Command) -> Iterator[tuple[list[str], str]]:
    """Every sort of mistake that ``command`` can be given, and what the line begins with."""
    past = PAST.get(command.name, [])
    yield ["--nonsense", *past], "--nonsense: is no option of"
    yield ["--nonsense=1", *past], "--nonsense: is no option of"
    yield ["-Z", *past], "-Z: is no option of"
    for option in command.options:
        if option.metavar:
            yield [*past, option.name], f"{option.name}: needs a value"
            yield [option.name, "--nonsense", *past], f"{option.name}: needs a value"
        else:
            yield [f"{option.name}=1", *past], f"{option.name}: takes no value"
            yield [f"{option.short or option.name}=1"], f"{option.short or option.name}: takes no"
        if option.metavar and not option.many:
            yield [option.name, "1", f"{option.name}=2"], f"{option.name}: is given twice"
        if option.required:
            rest = [word for word in past if word != option.name]
            del rest[past.index(option.name)]
            yield rest, f"{option.name}: is missing"
    if any(word.takes_rest for word in command.words):
        yield past, NO_COMMAND[command.name]
    else:
        yield [*past, "extra"], "extra: is one word too many"
        yield [*past, "--", "-extra"], "-extra: is one word too many"
    needed = " ".join(word.metavar for word in command.words if not word.takes_rest)
    for place, word in enumerate(command.words):
        if not word.takes_rest:
            yield past[:place], f"{command.name}: needs {needed}"


@pytest.mark.parametrize("command", TABLES, ids=lambda command: command.name)
def test_fault_42_every_mistake_is_one_line_with_one_prefix(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv, beginning in mistakes(command):
        line = refusal(capsys, *command.name.split(), *argv)
        assert line.startswith(beginning)
        if beginning not in NO_COMMAND.values():
            assert line.endswith(f"(pyvmm {command.name} --help)")


BAD_VALUES = [
    (["run", "--kernel", "k", "--memory", "much"], "--memory much: "),
    (["run", "--kernel", "k", "--cpus", "many"], "--cpus many: "),
    (["run", "--kernel", "k", "--timeout", "soon"], "--timeout soon: "),
    (["run", "--kernel", "k", "--mmio", "x"], "--mmio x: "),
    (["run", "--kernel", "k", "--disk", "d,x"], "--disk d,x: "),
    (["export", "--disk", "d,x", "--socket", "s"], "--disk d,x: "),
    (["export", "--disk", "vhost-user=s", "--socket", "s"], "--disk vhost-user=s: "),
    (["lab", "--cpus", "many", "true"], "--cpus many: "),
    (["lab", "--memory", "much", "true"], "--memory much: "),
    (["lab", "--timeout", "soon", "true"], "--timeout soon: "),
    (["lab", "--rw", "/nowhere", "true"], "--rw /nowhere: "),
    (["lab", "--lock", "/nowhere", "true"], "/nowhere: "),
    (["kernel", "inspect", "/nowhere"], "/nowhere: "),
    (["kernel", "nonsense"], "nonsense: is not known to pyvmm kernel"),
    (["kernel"], "kernel: needs inspect, fetch or build"),
    (["kernel", "fetch", "/nowhere"], "/nowhere: is neither debian nor ubuntu"),
    (["kernel", "fetch", "ubunut"], "ubunut: is neither debian nor ubuntu"),
    (["kernel", "fetch", "/dev", "--version", "x"], "/dev: has no boot/vmlinuz-*"),
    (["kernel", "build", "/nowhere"], "/nowhere: is no kernel tree and no tarball"),
    (["kernel", "build", "/dev"], "/dev: is no kernel tree"),
    (["kernel", "build", "/dev", "--jobs", "all"], "--jobs all: is not a number from 1 to"),
    (["image"], "image: needs build"),
    (["image", "build", "/nowhere/x"], "image build: needs one of --from-dir"),
    (["image", "build", "o", "--busybox", "--from-dir", "d"], "image build: makes one image"),
    (["image", "build", "o", "--busybox", "--fs", "zfs"], "--fs zfs: is not known"),
    (["image", "build", "o", "--busybox", "--size", "x"], "--size x: is not a size"),
    (["image", "build", "o", "--busybox", "--include", "x"], "--include: is for --debootstrap"),
    (["image", "build", "o", "--from-dir", "/nowhere"], "--from-dir /nowhere: is no directory"),
    (["image", "build", "/dev/null", "--busybox"], "/dev/null: is there, and is no regular"),
    (["ctl"], "ctl SOCKET: needs status, pause, resume"),
    (["ctl", "status"], "status: pyvmm ctl needs the socket first: pyvmm ctl SOCKET status"),
    (["ctl", "run", "--", "x"], "run: pyvmm ctl needs the socket first: pyvmm ctl SOCKET run"),
    (["ctl", "--json"], "--json: pyvmm ctl needs the socket first"),
    (["ctl", "SOCKET", "nonsense"], "nonsense: is not known to pyvmm ctl SOCKET"),
    (["ctl", "SOCKET", "pause", "--timeout", "x"], "--timeout x: "),
    (["ctl", "SOCKET", "memory", "x", "1"], "GPA x: is no address"),
    (["ctl", "SOCKET", "memory", "0", "x"], "LENGTH x: is not a size"),
    (["ctl", "SOCKET", "registers", "x"], "registers x: is no number"),
    (["ctl", "SOCKET", "run", "--env", "A", "--", "x"], "--env A: is not NAME=VALUE"),
    (["nonsense"], "nonsense: no such command"),
]


@pytest.mark.parametrize(("argv", "beginning"), BAD_VALUES, ids=str)
def test_fault_42_a_bad_value_has_the_same_prefix(
    argv: list[str], beginning: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(capsys, *argv).startswith(beginning)


def test_fault_42_every_command_has_a_table() -> None:
    assert {table.name.split()[0] for table in TABLES} == set(COMMANDS)


def test_fault_42_no_command_has_a_parser_of_its_own() -> None:
    package = Path(sys.modules["pyvmm.cli.main"].__file__ or "").parents[1]
    users = [path.name for path in package.rglob("*.py") if "argparse." in path.read_text()]
    assert users == ["usage.py"]


MEANT = [
    ("run --timout 5 --kernel k", "did you mean --timeout?"),
    ("run --kernal k", "did you mean --kernel?"),
    ("run --kernel k --disc d", "did you mean --disk or --discovery?"),
    ("run --Memory=1G", "did you mean --memory?"),
    ("run --mem 1G", "did you mean --memory?"),
    ("run -m 1G", "did you mean --memory?"),
    ("run -kernel k", "did you mean --kernel?"),
    ("run -smp 2", "did you mean --cpus?"),
    ("run --smp 2", "did you mean --cpus?"),
    ("run -k bzImage", "did you mean --kernel?"),
    ("run --kernel k --disk d,readonly", "does not know 'readonly' (ro?);"),
    ("run --kernel k --disk d,snapshto", "does not know 'snapshto' (snapshot?);"),
    ("run --kernel k --disk d,ro=on", "does not know 'ro=on' (ro takes no value);"),
    ("run --kernel k --console sdtio", "did you mean stdio? (a new file: ./sdtio)"),
    ("run --kernel k --console -", "did you mean stdio? (a new file: ./-)"),
    ("run --kernel k --console off", "did you mean none?"),
    ("--verison", "did you mean pyvmm --version?"),
    ("version", "did you mean pyvmm --version?"),
    ("export --sockets s", "did you mean --socket?"),
    ("export --trust_memory", "did you mean --trust-memory?"),
    ("doctor --quite", "did you mean --quiet?"),
    ("lab --cpu 2 true", "did you mean --cpus?"),
    ("kernel inspect --conf f", "did you mean --config?"),
    ("kernel inspekt f", "did you mean inspect?"),
    ("kernel fetch ubunut", "did you mean ubuntu?"),
    ("rnu", "did you mean run?"),
    ("docter", "did you mean doctor?"),
    ("Run", "did you mean run?"),
    ("--kernel k", "options come behind the command, as in pyvmm run --kernel"),
    ("run build/bzImage build/root.img",
     "write --kernel build/bzImage --disk build/root.img"),
    ("run --kernel k root.img data.img", "write --disk root.img --disk data.img"),
    ("run k --disk=d", "write --kernel k"),
    ("run k --disk d e", "write --kernel k --disk e"),
    ("export root.img s", "write --disk root.img --socket s"),
    ("doctor /dev/kvm", "write --device /dev/kvm"),
    ("run --kernel k --append console=hvc0 quiet --cpus 2", "write --append 'console=hvc0 quiet'"),
]


@pytest.mark.parametrize(("line", "words"), MEANT, ids=[line for line, _ in MEANT])
def test_fault_39_a_mistake_is_told_what_may_be_meant(
    line: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refusal(capsys, *line.split(" "))


@pytest.mark.parametrize("line", ["run --xyzzy", "xyzzy", "kernel xyzzy", "lab --xyzzy true"])
def test_fault_39_what_is_like_nothing_gets_no_guess(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "did you mean" not in refusal(capsys, *line.split(" "))


def test_fault_39_a_kernel_for_a_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bzImage").touch()
    assert "pyvmm run --kernel FILE" in refusal(capsys, str(tmp_path / "bzImage"))


@pytest.mark.parametrize("name", ["./sdtio", "sdtio.log", "log", "here"])
def test_a_console_that_is_a_file_is_taken_as_it_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").touch()
    assert parse_console(name) == name


@pytest.mark.parametrize(("argv", "is_wrong"), [
    (["run", "--kernel", "/nowhere"], False), (["run", "--kernal", "k"], True),
])
def test_fault_39_guessing_is_imported_only_for_a_mistake(argv: list[str], is_wrong: bool) -> None:
    code = (
        "import sys\nfrom pyvmm.cli.main import main\nmain(sys.argv[1:])\n"
        "print('difflib' in sys.modules, 'argparse' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{is_wrong} False\n"
