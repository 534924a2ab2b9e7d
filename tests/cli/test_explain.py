"""What a person is told before and after a boot that cannot work."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvmm.cli import explain
from pyvmm.cli.parse import parse_disk
from pyvmm.config import RunConfig
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.run.verdict import Evidence
from tests.support.disk_heads import file_system, gpt_disk
from tests.support.kernels import COMPLETE_CONFIG as COMPLETE
from tests.support.kernels import bzimage, lacking, with_ikconfig

NO_ROOT = Outcome(Kind.PANIC, detail="VFS: Unable to mount root fs on unknown-block(254,0)")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of these tests."""
    path = tmp_path / "cache"
    monkeypatch.setenv("PYVMM_CACHE", str(path))
    return path


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    """A kernel with a complete configuration beside it, for tests to change."""
    path = tmp_path / "bzImage"
    path.write_bytes(bzimage())
    configure(path, COMPLETE)
    return path


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """The start of a disk of ext4."""
    path = tmp_path / "root.img"
    path.write_bytes(file_system("ext4"))
    return path


def configure(kernel: Path, text: str) -> None:
    (kernel.parent / "config-6.1.0-synthetic").write_text(text)


def run_of(kernel: Path, *disks: Path, append: str = "", initrd: Path | None = None) -> RunConfig:
    return RunConfig(
        kernel=kernel, disks=tuple(parse_disk(str(disk)) for disk in disks), append=append,
        initrd=initrd,
    )


def evidence(
    *, has_printed: bool = True, waits_for_root: bool = False, reached_init: bool = False
) -> Evidence:
    found = Evidence()
    found.has_printed, found.waits_for_root = has_printed, waits_for_root
    found.reached_init = reached_init
    return found


def after(config: RunConfig, outcome: Outcome, *, has_printed: bool = True) -> str:
    return "\n".join(explain.after(config, outcome, evidence(has_printed=has_printed)))


def test_nothing_is_said_of_a_kernel_that_can(kernel: Path, disk: Path) -> None:
    assert explain.before(run_of(kernel, disk)) == []


def test_a_kernel_that_finds_no_devices_is_named_too(kernel: Path, disk: Path) -> None:
    by_command_line, acpi = "CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES", "CONFIG_ACPI"
    configure(kernel, COMPLETE.replace(f"{by_command_line}=y\n", ""))
    assert explain.before(run_of(kernel, disk)) == []
    (line,) = explain.before(run_of(kernel, disk, append="acpi=off"))
    assert f"the kernel lacks {by_command_line} (virtio-mmio discovery with acpi=off)" in line
    no_acpi = RunConfig(kernel=kernel, disks=(parse_disk(str(disk)),), discovery="cmdline")
    assert explain.before(no_acpi) == [line]
    configure(kernel, COMPLETE.replace(f"{by_command_line}=y\n", "").replace(f"{acpi}=y\n", ""))
    (line,) = explain.before(run_of(kernel, disk))
    assert f"the kernel has neither {by_command_line} nor {acpi}" in line


def test_modules_want_an_initramfs(kernel: Path, disk: Path, tmp_path: Path) -> None:
    configure(kernel, COMPLETE.replace("VIRTIO_BLK=y", "VIRTIO_BLK=m"))
    (line,) = explain.before(run_of(kernel, disk))
    assert "CONFIG_VIRTIO_BLK=m" in line
    assert "--initrd" in line
    initrd = tmp_path / "initramfs"
    initrd.write_bytes(b"\x1f\x8b" + bytes(100))
    assert explain.before(run_of(kernel, disk, initrd=initrd)) == []


def test_what_the_kernel_has_inside_is_read_after_a_failure_and_remembered(
    kernel: Path, disk: Path
) -> None:
    (kernel.parent / "config-6.1.0-synthetic").unlink()
    kernel.write_bytes(with_ikconfig(lacking("VIRTIO_BLK")))
    config = run_of(kernel, disk)
    assert explain.before(config) == []
    (line,) = explain.after(config, NO_ROOT, evidence())
    assert line == (f"{kernel}: the kernel lacks CONFIG_VIRTIO_BLK (virtio-blk): no disk is found")
    assert explain.before(config) == [line]
    kernel.write_bytes(with_ikconfig(COMPLETE))
    assert explain.before(config) == [], "another kernel by the same name"


def test_what_the_kernel_has_inside_counts_more_than_what_lies_beside_it(
    kernel: Path, disk: Path
) -> None:
    configure(kernel, lacking("EXT4_FS"))
    kernel.write_bytes(with_ikconfig(COMPLETE))
    config = run_of(kernel, disk)
    assert len(explain.before(config)) == 1
    assert "root= and --disk must name it" in after(config, NO_ROOT)
    assert explain.before(config) == []


def test_a_configuration_beside_a_kernel_is_read_once(
    kernel: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(kernel, lacking("EXT4_FS"))
    lines = explain.before(run_of(kernel, disk))
    with monkeypatch.context() as patch:
        patch.setattr("pyvmm.x86.inspect.read_configuration", None)
        assert explain.before(run_of(kernel, disk)) == lines
    configure(kernel, COMPLETE)
    assert explain.before(run_of(kernel, disk)) == []


def test_a_cache_that_cannot_be_used_is_no_failure(
    kernel: Path, disk: Path, cache: Path
) -> None:
    cache.write_text("a file")
    configure(kernel, lacking("EXT4_FS"))
    for _ in range(2):
        assert len(explain.before(run_of(kernel, disk))) == 1


def test_what_is_wrong_with_the_command_line_is_said_too(kernel: Path, disk: Path) -> None:
    (line,) = explain.before(run_of(kernel, disk, append="root=/dev/vdb"))
    assert line == "root=/dev/vdb is not there: root= and --disk must name it (vda)"
    (kernel.parent / "config-6.1.0-synthetic").unlink()
    config = run_of(kernel, disk, append="root=UUID=1")
    (line,) = explain.before(config)
    assert "root=UUID= is for an initramfs" in line, "whatever the kernel has"
    assert "root=UUID= is for an initramfs" in after(config, NO_ROOT)


def test_a_root_on_a_partition_of_the_disk(kernel: Path, tmp_path: Path) -> None:
    path = tmp_path / "whole.img"
    path.write_bytes(gpt_disk(2, 4096, file_system("xfs")))
    configure(kernel, lacking("XFS_FS", "EFI_PARTITION"))
    first, second = explain.before(run_of(kernel, path, append="root=/dev/vda2"))
    assert "CONFIG_EFI_PARTITION (GPT partitions)" in first
    assert "CONFIG_XFS_FS (root file system xfs)" in second


def test_a_run_that_is_stuck_before_any_init_is_explained(kernel: Path, disk: Path) -> None:
    configure(kernel, lacking("VIRTIO_BLK"))
    config = run_of(kernel, disk, append="rootwait")
    (line,) = explain.after(config, Outcome(Kind.TIMEOUT), evidence())
    assert "lacks CONFIG_VIRTIO_BLK" in line
    assert explain.after(config, Outcome(Kind.TIMEOUT), evidence(reached_init=True)) == []
    configure(kernel, COMPLETE)
    assert explain.after(config, Outcome(Kind.TIMEOUT), evidence()) == []
    (line,) = explain.after(config, Outcome(Kind.TIMEOUT), evidence(waits_for_root=True))
    assert "root= and --disk must name it" in line


@pytest.mark.parametrize("detail", [
    NO_ROOT.detail, "No working init found.",
    "Attempted to kill init! exitcode=0x00000100 (cannot mount the root: no /dev/vda after 10 s)",
])
def test_a_root_that_is_not_mounted_has_a_remedy(
    kernel: Path, disk: Path, detail: str
) -> None:
    said = after(run_of(kernel, disk), Outcome(Kind.PANIC, detail=detail))
    assert "root= and --disk must name it" in said
    assert "pyvmm kernel inspect" in said


def test_another_panic_needs_no_remedy(kernel: Path, disk: Path) -> None:
    assert after(run_of(kernel, disk), Outcome(Kind.PANIC, detail="sysrq triggered crash")) == ""


@pytest.mark.parametrize("kind", [
    Kind.TIMEOUT, Kind.TRIPLE_FAULT, Kind.RESET, Kind.SHUTDOWN, Kind.QUIT, Kind.PANIC,
])
def test_a_silent_kernel_is_told_which_console_to_use(
    kernel: Path, disk: Path, kind: Kind
) -> None:
    config = run_of(kernel, disk, append="console=ttyS1")
    said = after(config, Outcome(kind), has_printed=False)
    assert "its consoles are console=ttyS0 console=ttyS1; console=ttyS0 is the serial port" in said
    assert after(config, Outcome(kind)) == ""


def test_a_silent_kernel_without_a_serial_console_is_told_so(kernel: Path, disk: Path) -> None:
    configure(kernel, COMPLETE.replace("CONFIG_SERIAL_8250_CONSOLE=y\n", ""))
    said = after(run_of(kernel, disk), Outcome(Kind.TIMEOUT), has_printed=False)
    assert "the kernel printed nothing" in said
    assert "lacks CONFIG_SERIAL_8250_CONSOLE" in said


def test_a_guest_that_gave_a_status_owes_no_output(kernel: Path, disk: Path) -> None:
    config = run_of(kernel, disk)
    assert after(config, Outcome(Kind.GUEST_STATUS, 0), has_printed=False) == ""


@pytest.mark.parametrize("text", ["missing", "nbd://127.0.0.1:1", "vhost-user=nowhere", "."])
def test_a_disk_that_cannot_be_looked_into_is_no_failure(
    kernel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    configure(kernel, COMPLETE.replace("CONFIG_EXT4_FS=y\n", ""))
    config = RunConfig(kernel=kernel, disks=(parse_disk(text),))
    assert explain.before(config) == [], "what is on the disk is not known"


@pytest.mark.parametrize(("agent", "option", "words"), [
    ("image", "VIRTIO_CONSOLE", "(the agent's port): no agent is heard"),
    ("inject", "VIRTIO_CONSOLE", "(the agent's port): no agent is heard"),
    ("inject", "BLK_DEV_INITRD", "(initramfs): the initrd is not used"),
    ("inject", "RD_GZIP", "(initramfs, GZIP): the initrd is not used"),
])
def test_needs_of_an_agent_are_said_before_the_boot(
    kernel: Path, disk: Path, agent: str, option: str, words: str
) -> None:
    configure(kernel, lacking(option))
    config = run_of(kernel, disk).replace(agent=agent)
    (line,) = explain.before(config, "6.1.0-synthetic")
    assert line == f"{kernel}: the kernel lacks CONFIG_{option} {words}"
    assert explain.before(run_of(kernel, disk), "6.1.0-synthetic") == []


def test_an_agent_that_is_brought_in_brings_modules_with_it(kernel: Path, disk: Path) -> None:
    modules = COMPLETE.replace("VIRTIO_BLK=y", "VIRTIO_BLK=m").replace("EXT4_FS=y", "EXT4_FS=m")
    configure(kernel, modules.replace("VIRTIO_CONSOLE=y", "VIRTIO_CONSOLE=m"))
    config = run_of(kernel, disk)
    assert len(explain.before(config, "6.1.0-synthetic")) == 2
    assert explain.before(config.replace(agent="inject"), "6.1.0-synthetic") == []
    assert len(explain.before(config.replace(agent="image"), "6.1.0-synthetic")) == 3
