"""``pyvmm run`` refuses what cannot work: one line with file or option, fault and limit; 125.

Each case is a whole ``pyvmm run``, so it also shows that nothing is left half-built.
"""

from __future__ import annotations

import fcntl
import functools
import os
import re
import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm.cli.main import main
from pyvmm.cli.run import COMMAND, config_from
from pyvmm.kvm.abi import KVM_CAP_MAX_VCPUS
from pyvmm.startup.options import parse_options
from tests.support.kernels import bzimage, elf
from tests.support.tiny_guests import REPORT_0, write_guest


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "bzImage"
    path.write_bytes(bzimage())
    return path


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    return path


def refusal(capsys: pytest.CaptureFixture[str], *options: str | Path) -> str:
    """The one line with which ``pyvmm run`` refuses ``options``."""
    open_before = sorted(os.listdir("/proc/self/fd"))
    assert main(["run", *map(str, options)]) == 125
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("pyvmm: ")
    assert captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    assert sorted(os.listdir("/proc/self/fd")) == open_before, "a descriptor was left open"
    return captured.err


def test_no_kernel_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--kernel" in refusal(capsys, "--memory", "256M")


def test_an_unknown_option(capsys: pytest.CaptureFixture[str], kernel: Path) -> None:
    line = refusal(capsys, "--kernel", kernel, "--disks", "x")
    assert "--disks" in line
    assert "pyvmm run --help" in line


def test_a_kernel_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    line = refusal(capsys, "--kernel", missing)
    assert str(missing) in line
    assert "No such file" in line


@pytest.mark.parametrize(("name", "content"), [
    ("empty", b""), ("text", b"#!/bin/sh\n" * 100), ("elf32", elf()[:4] + b"\x01" + elf()[5:]),
    ("cut", bzimage()[:700]),
])
def test_a_kernel_that_is_none(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, content: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert str(path) in refusal(capsys, "--kernel", path)


@pytest.mark.parametrize(("memory", "words"), [
    ("8M", "16M"), ("1P", "not a size"), ("999T", "512G"), ("16M", "--memory must be at least"),
])
def test_memory_that_cannot_be(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, memory: str, words: str
) -> None:
    path = tmp_path / "bzImage"
    path.write_bytes(bzimage(init_size=20 << 20))
    line = refusal(capsys, "--kernel", path, "--memory", memory)
    assert "--memory" in line
    assert words in line


def test_a_command_line_that_is_too_long(
    capsys: pytest.CaptureFixture[str], kernel: Path
) -> None:
    line = refusal(capsys, "--kernel", kernel, "--append", "x" * 3000)
    assert "2047" in line


@pytest.mark.parametrize(("options", "blamed", "length"), [
    (["--append", "x" * 3000], "--append", 3000),
    (["--append", "x" * 1500, "--append", "y" * 1500], "--append", 3001),
    (["--cmdline", "x" * 3000], "--cmdline", 3000),
    (["--cmdline", "x" * 3000, "--append", "y"], "--cmdline", 3000),
    (["--cmdline", "x", "--append", "y" * 3000], "--append", 3000),
])
def test_fault_25_the_option_that_is_too_long_is_named(
    capsys: pytest.CaptureFixture[str], kernel: Path, options: list[str], blamed: str, length: int
) -> None:
    line = refusal(capsys, "--kernel", kernel, *options)
    assert line.startswith(f"pyvmm: {blamed}: has {length} bytes")
    assert line.endswith("is 2047\n")


@pytest.mark.parametrize("option", ["--cmdline", "--append"])
@pytest.mark.parametrize("text", ["ümlaut", "a\nü", "\udcff"])
def test_a_command_line_of_other_characters(
    capsys: pytest.CaptureFixture[str], kernel: Path, option: str, text: str
) -> None:
    assert refusal(capsys, "--kernel", kernel, option, text).startswith(f"pyvmm: {option}: has ")


def test_fault_25_a_console_without_a_name(
    capsys: pytest.CaptureFixture[str], kernel: Path
) -> None:
    for options in (["--console", ""], ["--console="]):
        assert "--console: names no file" in refusal(capsys, "--kernel", kernel, *options)


def test_an_initrd_that_is_not_there(
    capsys: pytest.CaptureFixture[str], kernel: Path, tmp_path: Path
) -> None:
    missing = tmp_path / "initrd"
    assert str(missing) in refusal(capsys, "--kernel", kernel, "--initrd", missing)


def test_an_initrd_too_large(
    capsys: pytest.CaptureFixture[str], kernel: Path, tmp_path: Path
) -> None:
    large = tmp_path / "initrd"
    with large.open("wb") as file:
        file.truncate(1 << 30)
    line = refusal(capsys, "--kernel", kernel, "--initrd", large)
    assert str(large) in line
    assert "limit" in line


def test_a_disk_that_is_not_there(
    capsys: pytest.CaptureFixture[str], kernel: Path, tmp_path: Path
) -> None:
    missing = tmp_path / "root.img"
    line = refusal(capsys, "--kernel", kernel, "--disk", missing)
    assert str(missing) in line
    assert "no such file" in line


def test_a_disk_that_is_a_directory(
    capsys: pytest.CaptureFixture[str], kernel: Path, tmp_path: Path
) -> None:
    assert "directory" in refusal(capsys, "--kernel", kernel, "--disk", tmp_path)


def test_bad_input_119_a_disk_in_use(
    capsys: pytest.CaptureFixture[str], kernel: Path, disk: Path
) -> None:
    with disk.open("r+b") as other:
        fcntl.fcntl(other, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))
        line = refusal(capsys, "--kernel", kernel, "--disk", disk)
    assert str(disk) in line
    assert "locked" in line


def test_the_same_disk_twice(
    capsys: pytest.CaptureFixture[str], kernel: Path, disk: Path
) -> None:
    line = refusal(capsys, "--kernel", kernel, "--disk", disk, "--disk", disk)
    assert "given twice" in line
    alias = disk.with_name("alias")
    alias.symlink_to(disk)
    assert "locked" in refusal(capsys, "--kernel", kernel, "--disk", disk, "--disk", alias)


@pytest.mark.parametrize("option", [
    ("--disk", "d,rw"), ("--disk", ""), ("--cpu", "486"), ("--cpu", "host,-nonsense"),
    ("--initrd", ""), ("--kernel", ""),
    ("--timeout", "0"), ("--timeout", "soon"), ("--console", "/nonexistent/file"),
])
def test_an_option_with_a_bad_value_is_named(
    capsys: pytest.CaptureFixture[str], kernel: Path, option: tuple[str, str]
) -> None:
    assert option[0] in refusal(capsys, "--kernel", kernel, *option)


@pytest.mark.parametrize(("option", "words"), [
    (("--cpus", "0"), "from 1 to 8"), (("--cpus", "9"), "from 1 to 8"),
    (("--cpus", "-1"), "--cpus"), (("--cpus", "many"), "from 1 to 8"),
    (("--rtc", "local"), "utc, none"), (("--mmio", "x"), "mapped, trapped"),
])
def test_a_choice_that_is_none_names_the_choices(
    capsys: pytest.CaptureFixture[str], kernel: Path, option: tuple[str, str], words: str
) -> None:
    line = refusal(capsys, "--kernel", kernel, *option)
    assert option[0] in line
    assert words in line


def test_more_disks_than_interrupt_lines(
    capsys: pytest.CaptureFixture[str], kernel: Path, tmp_path: Path
) -> None:
    disks: list[str | Path] = []
    for index in range(9):
        path = tmp_path / f"disk{index}"
        path.write_bytes(bytes(512))
        disks += ["--disk", path]
    line = refusal(capsys, "--kernel", kernel, *disks)
    assert "--disk" in line
    assert "9 disks; this machine has lines for 8" in line


class SmallKvm:
    """A KVM that allows two vCPUs and does no more than say so."""

    def __enter__(self) -> SmallKvm:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def check_extension(self, capability: int) -> int:
        return 2 if capability == KVM_CAP_MAX_VCPUS else 0


def test_more_cpus_than_this_kvm_allows(
    capsys: pytest.CaptureFixture[str], kernel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyvmm.machine.Kvm", SmallKvm)
    line = refusal(capsys, "--kernel", kernel, "--initrd", "/etc/hostname", "--cpus", "3")
    assert "--cpus 3: this host's KVM allows at most 2" in line


@pytest.mark.parametrize(("content", "words"), [
    ('{"cpuid_modifiers": [], "msr_modifiers": []}', "msr_modifiers"),
    ("[1]", "object"), ("{", "JSON"), ("\x00", "JSON"),
])
def test_a_cpu_model_that_says_too_much_or_too_little(
    capsys: pytest.CaptureFixture[str], kernel: Path, tmp_path: Path, content: str, words: str
) -> None:
    model = tmp_path / "model.json"
    model.write_text(content)
    line = refusal(capsys, "--kernel", kernel, "--cpu", model)
    assert str(model) in line
    assert words in line


@pytest.mark.parametrize("use", ["kernel", "disk"])
def test_a_console_that_is_a_file_of_the_run_is_refused(
    capsys: pytest.CaptureFixture[str], kernel: Path, disk: Path, use: str
) -> None:
    target = kernel if use == "kernel" else disk
    before = target.read_bytes()
    line = refusal(capsys, "--kernel", kernel, "--disk", disk, "--console", target)
    assert "--console" in line
    assert target.read_bytes() == before


def test_a_refused_run_leaves_an_old_log_alone(
    capsys: pytest.CaptureFixture[str], kernel: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    log.write_text("old")
    refusal(capsys, "--kernel", kernel, "--console", log, "--cpu", "host,+la57,+svm,+xop,+tbm")
    assert log.read_text() == "old"


@pytest.mark.parametrize("option", [
    ("--timeout", "1e306"), ("--memory", "9" * 5000 + "M"), ("--memory", "0M"),
])
def test_absurd_numbers_are_refused(
    capsys: pytest.CaptureFixture[str], kernel: Path, option: tuple[str, str]
) -> None:
    assert option[0] in refusal(capsys, "--kernel", kernel, *option)


@pytest.mark.parametrize("closed", [(0,), (1,), (0, 1, 2)])
def test_closed_standard_descriptors_are_survived(tmp_path: Path, closed: tuple[int, ...]) -> None:
    def close() -> None:
        for fd in closed:
            os.close(fd)

    done = subprocess.run(
        [sys.executable, "-m", "pyvmm", "run", "--kernel", tmp_path / "missing"],
        preexec_fn=close, check=False,
    )
    assert done.returncode == 125


def test_too_few_descriptors_is_one_line(kernel: Path, disk: Path) -> None:
    seen = set()
    for limit in range(9, 24):
        done = subprocess.run(
            [sys.executable, "-m", "pyvmm", "run", "--kernel", kernel, "--disk", disk,
             "--timeout", "1"],
            preexec_fn=functools.partial(
                resource.setrlimit, resource.RLIMIT_NOFILE, (limit, limit)
            ),
            capture_output=True, text=True, check=False,
        )
        assert "Traceback" not in done.stderr, (limit, done.stderr)
        seen.add(done.returncode)
    assert 125 in seen


@pytest.mark.parametrize("options", [["-vv"], ["-v", "--verbose"]])
def test_vv_shows_the_traceback_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    assert main(["run", *options, "--kernel", str(tmp_path / "missing")]) == 125
    traceback, _, line = capsys.readouterr().err.rstrip().rpartition("\n")
    assert traceback.startswith("Traceback (most recent call last):")
    assert line.startswith(f"pyvmm: {tmp_path}/missing: ")


def test_what_is_appended_in_parts_comes_together() -> None:
    args = parse_options(COMMAND, ["--kernel", "k", "--append", "a=1", "--append=b c"])
    assert config_from(args).append == "a=1 b c"


@pytest.mark.bare
@pytest.mark.parametrize("options", [
    [], ["--cpus", "3"], ["--disk", "DISK"], ["--disk", "DISK,snapshot,queues=4"],
    ["--disk", "DISK,ro", "--disk", "DISK,ro"],
], ids=str)
def test_fault_25_how_many_open_files_a_run_needs_is_said_and_enough(
    kernel: Path, disk: Path, options: list[str]
) -> None:
    def run(limit: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pyvmm", "run", "--kernel", kernel, "--timeout", "1",
             *(option.replace("DISK", str(disk)) for option in options)],
            preexec_fn=functools.partial(
                resource.setrlimit, resource.RLIMIT_NOFILE, (limit, limit)
            ),
            capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    enough = 0
    for limit in (10, 14, 16):
        done = run(limit)
        assert done.returncode == 125
        match = re.fullmatch(
            rf"pyvmm: too few open files: the limit is {limit}, this run needs (\d+); "
            r"raise it with `ulimit -n \1`", done.stderr.splitlines()[-1],
        )
        assert match, done.stderr
        enough = int(match[1])
    assert run(enough).returncode not in (125, 128 + 9)
    assert enough < 40


@pytest.mark.parametrize("options", [
    ["--disk", "/none"], ["--console", "/none/x"], ["--cpus", "2", "--cpu", "/none.json"],
    ["--disk", "vhost-user=/none"], ["--disk", "OVERLAY"],
], ids=str)
@pytest.mark.bare
def test_fault_21_a_refused_start_leaves_no_overlay(
    capsys: pytest.CaptureFixture[str], kernel: Path, disk: Path, options: list[str]
) -> None:
    new = disk.with_name("new.overlay")
    options = [option.replace("OVERLAY", f"{disk},overlay={new}") for option in options]
    refusal(capsys, "--kernel", kernel, "--disk", f"{disk},overlay={new}", *options)
    assert not new.exists()


@pytest.mark.bare
def test_fault_21_a_guest_that_ran_keeps_its_overlay(tmp_path: Path, disk: Path) -> None:
    """Even if it wrote nothing: who names a file finds it."""
    new = disk.with_name("new.overlay")
    guest = write_guest(tmp_path / "guest", REPORT_0)
    assert main(["run", "--kernel", str(guest), "--disk", f"{disk},overlay={new}"]) == 0
    assert new.stat().st_size > disk.stat().st_size


def test_with_an_agent_the_initramfs_of_a_directory_is_no_initrd_of_the_users(
    tmp_path: Path,
) -> None:
    """The root is the first disk, as without an initrd; the agent finds that file by itself."""
    (tmp_path / "vmlinuz-6.1.0").touch()
    (tmp_path / "initramfs-6.1.0.cpio.gz").touch()
    options = ["--kernel", str(tmp_path), "--disk", "root.img"]
    config = config_from(parse_options(COMMAND, options))
    assert str(config.initrd) == f"{tmp_path}/initramfs-6.1.0.cpio.gz"
    config = config_from(parse_options(COMMAND, [*options, "--agent"]))
    assert (config.agent, config.initrd) == ("inject", None)
    assert "root=/dev/vda rw" in config.kernel_command_line()
