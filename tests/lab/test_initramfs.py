"""The archive for one run of the lab, and the shell text in it."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

from pyvmm.lab.initramfs import (
    APPLETS,
    BUSYBOX_IN_HOST,
    command_script,
    pack_initramfs,
    run_settings,
)
from tests.support.cpio import unpack

SHOW_WORDS = "import os, sys; sys.stdout.buffer.write(b'\\0'.join(map(os.fsencode, sys.argv[1:])))"


def test_initramfs_holds_init_busybox_modules_and_this_run(tmp_path: Path) -> None:
    busybox = tmp_path / "busybox"
    busybox.write_bytes(b"BUSYBOX")
    module = tmp_path / "00-first.ko"
    module.write_bytes(b"MODULE")
    files = unpack(pack_initramfs(busybox, [module], b"settings", b"script"))
    assert files["init"][0] == stat.S_IFREG | 0o755
    assert files["init"][1].startswith(b"#!/bin/busybox sh\n")
    assert files["bin/busybox"] == (stat.S_IFREG | 0o755, b"BUSYBOX")
    assert files["modules/00-first.ko"][1] == b"MODULE"
    assert files["lab/run"][1] == b"settings"
    assert files["lab/command"][1] == b"script"
    assert files["bin/mount"] == (stat.S_IFLNK | 0o777, b"busybox")


def test_init_is_a_shell_script_whose_commands_are_all_linked(tmp_path: Path) -> None:
    busybox = tmp_path / "busybox"
    busybox.write_bytes(b"")
    init = tmp_path / "init"
    init.write_bytes(unpack(pack_initramfs(busybox, [], b"", b""))["init"][1])
    subprocess.run(["sh", "-n", str(init)], check=True)
    text = init.read_text()
    assert all(applet in text for applet in APPLETS)
    builtins = {"exec", "echo", "read", "until", "kill", "printf", "wait", "export"}
    first_words = {line.split()[0] for line in text.splitlines() if line[:1].isalpha()}
    shell_words = {"if", "fi", "for", "done", "case", "esac", "else", "while", "do"}
    functions = {"fail()", "mount_writable()", "mount_all_writable"}
    commands = {word for word in first_words if "=" not in word}
    assert commands <= set(APPLETS) | builtins | shell_words | functions


def run_script(script: bytes) -> bytes:
    """Run it here: the host's env in the place of busybox's, and no lab to leave a pid for."""
    text = script.replace(f"{BUSYBOX_IN_HOST} env".encode(), b"env")
    text = text.replace(b"/run/lab/pid", b"/dev/null")
    return subprocess.run(["sh"], input=text, stdout=subprocess.PIPE, check=True).stdout


def test_command_script_keeps_every_word_variable_and_directory(tmp_path: Path) -> None:
    words = ["plain", "two words", "", "$HOME", "`id`", "it's", 'a"b', "new\nline", "-n", "é\udcff"]
    directory = tmp_path / "o'dd $dir"
    directory.mkdir()
    environment = {b"A": b"1 '2'", b"BASH_FUNC_f%%": b"() { :\n}", b"EMPTY": b""}
    show = [sys.executable, "-c", SHOW_WORDS]
    shown = run_script(command_script([*show, *words], directory, environment))
    assert shown == b"\0".join(word.encode("utf-8", "surrogateescape") for word in words)
    env = run_script(command_script(["/usr/bin/env", "-0"], directory, environment))
    assert set(env.split(b"\0")) - {b""} == {b"A=1 '2'", b"BASH_FUNC_f%%=() { :\n}", b"EMPTY="}
    where = run_script(command_script(["/bin/pwd"], directory, environment))
    assert where == f"{directory}\n".encode()


def test_settings_are_shell_that_calls_back_for_each_directory() -> None:
    settings = run_settings([Path("/a b"), Path("/it's")], "mark", (33, 101), True)
    script = (
        b"mount_writable() { echo \"<$1> <$2>\"; }\n"
        + settings
        + b'mount_all_writable\necho "$END $TERMINAL $ROWS $COLUMNS $STDERR_ON_TERMINAL"\n'
    )
    done = subprocess.run(["sh"], input=script, stdout=subprocess.PIPE, check=True)
    assert done.stdout == b"<w0> </a b>\n<w1> </it's>\nmark 1 33 101 1\n"


def test_settings_without_terminal_or_directories() -> None:
    script = run_settings([], "mark", None, False) + b'mount_all_writable\necho "$TERMINAL"\n'
    done = subprocess.run(["sh"], input=script, stdout=subprocess.PIPE, check=True)
    assert done.stdout == b"0\n"
