"""A kernel that lacks each needed option in turn: ``kernel inspect`` and ``run`` name it.

The guest is a stand-in, so this needs no KVM; tests/vm/test_explained.py boots some of the kind.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace, TracebackType

import pytest

from pyvmm.cli.main import main
from pyvmm.config import RunConfig
from pyvmm.linux.requirements import BUILT_IN, known_options
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.run.verdict import Evidence
from tests.support import disk_heads
from tests.support.guest import KERNEL, TWICE
from tests.support.kernels import COMPLETE_CONFIG, bzimage, lacking, with_ikconfig

NO_ROOT = Outcome(Kind.PANIC, detail="VFS: Unable to mount root fs on unknown-block(0,0)")
ROOT = "root.img"
PARTITION = ("--append", "root=/dev/vda1")
NO_ACPI = ("--discovery", "cmdline")

NO_INIT = Outcome(Kind.PANIC, detail="No working init found.")
ON_THE_IMAGE = {"DEVTMPFS", "DEVTMPFS_MOUNT", "BINFMT_SCRIPT"}
"""What an image may do without: said when it did not."""

Arguments = tuple[str, ...]


def disk(content: bytes, *more: str) -> Arguments:
    """Options for a disk that is ``content``; where it is written comes later."""
    return ("--disk", f"{ROOT}:{content.hex()}", *more)


def initrd(content: bytes) -> Arguments:
    return ("--initrd", f"initrd:{content.hex()}")


def fs(name: str, compressor: str = "ZLIB") -> Arguments:
    return disk(disk_heads.file_system(name, compressor))


EXT4 = disk_heads.file_system("ext4")
PLAIN = disk(EXT4)
RD_MAGICS = {
    "GZIP": b"\x1f\x8b", "BZIP2": b"BZh9", "LZMA": b"\x5d\0\0\x80\0", "XZ": b"\xfd7zXZ\0",
    "LZO": b"\x89LZO\0\r\n\x1a\n", "LZ4": b"\x02\x21\x4c\x18", "ZSTD": b"\x28\xb5\x2f\xfd",
}  # fmt: skip

# By option, a run that needs it, and the options that would do in its place.
CASES: dict[str, tuple[Arguments, tuple[str, ...]]] = {
    **dict.fromkeys((
        "64BIT", "PRINTK", "TTY", "SERIAL_8250", "SERIAL_8250_CONSOLE", "SERIAL_8250_PNP",
        "VIRTIO_MMIO", "PCI", "BLOCK", "VIRTIO_BLK", "EXT4_FS", "DEVTMPFS", "DEVTMPFS_MOUNT",
        "BINFMT_ELF", "BINFMT_SCRIPT",
    ), (PLAIN, ())),
    "VIRTIO_CONSOLE": ((*PLAIN, "--append", "console=hvc0"), ()),
    "SMP": ((*PLAIN, "--cpus", "2"), ()),
    "NR_CPUS": ((*PLAIN, "--cpus", "4"), ()),
    "X86_MPPARSE": ((*PLAIN, "--cpus", "2", *NO_ACPI), ()),
    "ACPI": ((*PLAIN, "--discovery", "acpi"), ()),
    "VIRTIO_MMIO_CMDLINE_DEVICES": ((*PLAIN, *NO_ACPI), ()),
    "EFI_PARTITION": (disk(disk_heads.gpt_disk(1, 2048, EXT4), *PARTITION), ()),
    "MSDOS_PARTITION": (disk(disk_heads.dos_disk(1, 2048, EXT4), *PARTITION), ()),
    "EXT3_FS": (fs("ext3"), ("EXT4_FS",)),
    "EXT2_FS": (fs("ext2"), ("EXT4_FS",)),
    "XFS_FS": (fs("xfs"), ()),
    "BTRFS_FS": (fs("btrfs"), ()),
    "F2FS_FS": (fs("f2fs"), ()),
    "EROFS_FS": (fs("erofs"), ()),
    "ISO9660_FS": (fs("iso9660"), ()),
    "JFS_FS": (fs("jfs"), ()),
    "CRAMFS": (fs("cramfs"), ()),
    "ROMFS_FS": (fs("romfs"), ()),
    "SQUASHFS": (fs("squashfs"), ()),
    **{f"SQUASHFS_{name}": (fs("squashfs", name), ())
       for name in ("ZLIB", "LZO", "XZ", "LZ4", "ZSTD")},
    "BLK_DEV_INITRD": (initrd(b"070701"), ()),
    "BLK_DEV_RAM": (initrd(disk_heads.file_system("squashfs")), ()),
    **{f"RD_{name}": (initrd(magic), ()) for name, magic in RD_MAGICS.items()},
}  # fmt: skip


class StandIn:
    """A machine whose guest ends as it is told to; ``said_before`` is what came before it ran."""

    has_printed, console_line_ended, marks, exits = True, True, (), 0
    kernel = SimpleNamespace(
        version="6.1.0-synthetic", describe=lambda: "a kernel", is_linux=True
    )

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.outcome = Outcome(Kind.RESET)
        self.said_before = ""
        self._capsys = capsys

    @property
    def evidence(self) -> Evidence:
        found = Evidence()
        found.has_printed = self.has_printed
        return found

    def build(self, _config: RunConfig, *, report: Callable[[str], None]) -> StandIn:
        return self

    def run(self) -> Outcome:
        self.said_before = self._capsys.readouterr().err
        return self.outcome

    def __enter__(self) -> StandIn:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass


class Rig:
    """A kernel, and ways to look at it and to run it."""

    def __init__(self, folder: Path, machine: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
        self.kernel = folder / "bzImage"
        self._folder = folder
        self._machine = machine
        self._capsys = capsys

    def beside(self, config: str) -> None:
        """A kernel with ``config`` beside it."""
        self.kernel.write_bytes(bzimage())
        (self._folder / "config-6.1.0-synthetic").write_text(config)

    def inside(self, config: str) -> None:
        """A kernel with ``config`` inside it."""
        self.kernel.write_bytes(with_ikconfig(config))

    def inspect(self) -> str:
        """What ``inspect`` says."""
        assert main(["kernel", "inspect", str(self.kernel)]) in (0, 1)
        out, err = self._capsys.readouterr()
        assert err == ""
        return out

    def run(self, options: Arguments, outcome: Outcome = NO_ROOT) -> tuple[list[str], list[str]]:
        """The lines that ``run`` says before the guest runs, and after it ended in ``outcome``."""
        self._machine.outcome = outcome
        main(["run", "--kernel", str(self.kernel), *self._written(options)])
        after = self._capsys.readouterr().err
        return _lines(self._machine.said_before), _lines(after)

    def _written(self, options: Arguments) -> Iterator[str]:
        for option in options:
            name, colon, content = option.partition(":")
            if colon and name in (ROOT, "initrd"):
                path = self._folder / name
                path.write_bytes(bytes.fromhex(content))
                yield str(path)
            else:
                yield option


def _lines(text: str) -> list[str]:
    return [line.removeprefix("pyvmm: ") for line in text.splitlines()
            if not line.startswith(("pyvmm: neither --disk nor", "pyvmm: kernel panic: "))]


@pytest.fixture
def rig(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Rig:
    machine = StandIn(capsys)
    monkeypatch.setattr("pyvmm.machine.build", machine.build)
    monkeypatch.setattr(
        "pyvmm.cli.session.run_at_terminal", lambda machine, _snapshot: machine.run()
    )
    monkeypatch.setenv("PYVMM_CACHE", str(tmp_path / "cache"))
    return Rig(tmp_path, machine, capsys)


def config_without(option: str) -> str:
    """A complete configuration but for ``option`` and what would do in its place."""
    if option == "NR_CPUS":
        return COMPLETE_CONFIG.replace("NR_CPUS=8", "NR_CPUS=1")
    return lacking(option, *CASES[option][1])


def assert_named(option: str, lines: list[str], kernel: Path) -> None:
    (line,) = lines
    assert line.startswith(f"{kernel}: the kernel "), line
    assert re.search(rf" (lacks|has|neither|nor) CONFIG_{option}\b", line), line


def test_every_option_has_its_case() -> None:
    assert CASES.keys() == known_options() - set(BUILT_IN)


@pytest.mark.parametrize("option", CASES)
def test_inspect_names_it(rig: Rig, option: str) -> None:
    for put in (rig.beside, rig.inside):
        put(config_without(option))
        said = rig.inspect()
        state = "NR_CPUS=1" if option == "NR_CPUS" else f"{option} is not set"
        word = "note" if option in ON_THE_IMAGE else "missing"
        assert re.search(rf"^{word}  .*\b{state}", said, re.MULTILINE), said


@pytest.mark.parametrize("option", sorted(CASES.keys() - ON_THE_IMAGE))
def test_run_names_it_before_the_boot_if_it_is_said_beside_the_kernel(
    rig: Rig, option: str
) -> None:
    rig.beside(config_without(option))
    for _ in ("read", "remembered"):
        before, after = rig.run(CASES[option][0])
        assert_named(option, before, rig.kernel)
        assert after == before


@pytest.mark.parametrize("option", sorted(CASES.keys() - ON_THE_IMAGE))
def test_run_names_it_after_a_failure_and_before_the_next(rig: Rig, option: str) -> None:
    rig.inside(config_without(option))
    before, after = rig.run(CASES[option][0])
    assert before == [], "nothing is unpacked before a boot"
    assert_named(option, after, rig.kernel)
    before, _ = rig.run(CASES[option][0])
    assert before == after


@pytest.mark.parametrize("option", sorted(CASES.keys() - ON_THE_IMAGE))
def test_run_names_it_before_the_boot_if_inspect_has_seen_the_kernel(
    rig: Rig, option: str
) -> None:
    rig.inside(config_without(option))
    rig.inspect()
    before, _ = rig.run(CASES[option][0], Outcome(Kind.RESET))
    assert_named(option, before, rig.kernel)


@pytest.mark.parametrize("option", sorted(ON_THE_IMAGE))
def test_run_names_what_depends_on_the_image_if_no_init_ran(rig: Rig, option: str) -> None:
    rig.beside(config_without(option))
    before, after = rig.run(PLAIN, NO_INIT)
    assert before == []
    assert_named(option, after, rig.kernel)
    before, (line,) = rig.run(PLAIN, NO_ROOT)
    assert before == []
    assert "root= and --disk must name it" in line


@pytest.mark.parametrize("outcome", [
    Outcome(Kind.TIMEOUT), NO_INIT, NO_ROOT,
], ids=lambda outcome: str(outcome.kind))
def test_every_failure_that_an_option_may_cause_names_it(rig: Rig, outcome: Outcome) -> None:
    rig.inside(lacking("BINFMT_ELF"))
    _, after = rig.run(PLAIN, outcome)
    assert "lacks CONFIG_BINFMT_ELF (programs)" in after[-1]


@pytest.mark.parametrize("options", [run for run, _ in CASES.values()])
def test_a_kernel_that_lacks_nothing_is_not_warned_of(rig: Rig, options: Arguments) -> None:
    rig.beside(COMPLETE_CONFIG)
    before, _ = rig.run(options)
    assert before == []
    assert not re.search("^missing", rig.inspect(), re.MULTILINE)


@pytest.mark.slow  # and needs build/twice/bzImage
@pytest.mark.parametrize("options", [
    (*PLAIN, *NO_ACPI), (*PLAIN, "--append", "acpi=off"),
    (*PLAIN, "--cpus", "4", *NO_ACPI, "--append", "console=hvc0"),
])
def test_our_own_kernel_for_the_command_line_is_not_warned_of(
    rig: Rig, options: Arguments
) -> None:
    rig.kernel = TWICE
    rig.inspect()
    assert rig.run(options)[0] == []


@pytest.mark.slow  # and needs build/bzImage
@pytest.mark.parametrize("options", [
    PLAIN, (*PLAIN, "--append", "console=hvc0"), (*PLAIN, "--cpus", "8"),
    (*PLAIN, "--discovery", "acpi"),
    (*PLAIN, "--mmio", "trapped", "--serve", "exit", "--rtc", "none"),
    (*initrd(gzip.compress(b"070701")), *PLAIN), initrd(b"070701"), fs("ext2"), fs("ext3"),
    disk(disk_heads.gpt_disk(1, 2048, EXT4), *PARTITION),
    ("--disk", "vhost-user=/run/disk.sock"), ("--disk", "nbd://127.0.0.1:1/x"),
    (*PLAIN, "--append", "pyvmm.run='uname -a; exit 7'"), (*PLAIN, "--append", "pyvmm.shell"),
])
def test_our_own_kernel_is_not_warned_of(rig: Rig, options: Arguments) -> None:
    rig.kernel = KERNEL
    rig.inspect()
    before, _ = rig.run(options)
    assert before == []


@pytest.mark.parametrize("kind", [Kind.QUIT, Kind.SIGNAL])
def test_who_stopped_a_run_does_not_wait_for_the_kernel_to_be_unpacked(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    monkeypatch.setattr(StandIn, "has_printed", False)
    rig.inside(lacking("SERIAL_8250"))
    with monkeypatch.context() as patch:
        patch.setattr("pyvmm.x86.inspect.read_configuration", None)
        _, after = rig.run(PLAIN, Outcome(kind, 15))
    assert "the kernel printed nothing" in after[-1]
    rig.inspect()
    _, after = rig.run(PLAIN, Outcome(kind, 15))
    assert "lacks CONFIG_SERIAL_8250 " in after[-1]


def test_the_outcome_comes_before_its_explanation(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StandIn, "has_printed", False)
    rig.inside(COMPLETE_CONFIG)
    _, after = rig.run(PLAIN, Outcome(Kind.SIGNAL, 15))
    assert after[0] == "stopped by a signal (15)"
    assert after[1].startswith("the kernel printed nothing")


@pytest.mark.parametrize("place", [".config/", "config-6.0", "config-6.1.0-synthetic/", ".config"])
def test_what_is_no_configuration_of_the_kernel_costs_a_start_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Nearly every home directory has a ``.config`` in it."""
    rig.inside(lacking("SERIAL_8250"))
    path = rig.kernel.parent / place
    if place.endswith("/"):
        path.mkdir()
    else:
        path.write_text(lacking("TTY"))
    monkeypatch.setattr("pyvmm.cli.explain.before", None)
    before, _ = rig.run(PLAIN, Outcome(Kind.RESET))
    assert before == []
