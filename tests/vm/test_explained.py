"""What ``pyvmm run`` says around a boot: what is missing, why no root, how long it took."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.support.guest import IMAGE, KERNEL, boot, run_in_guest
from tests.support.kernels import COMPLETE_CONFIG

pytestmark = pytest.mark.kvm


def test_an_option_that_is_missing_is_named_before_the_boot(tmp_path: Path) -> None:
    kernel = shutil.copyfile(KERNEL, tmp_path / "bzImage-mine")
    lacking = COMPLETE_CONFIG.replace("CONFIG_EXT4_FS=y\n", "")
    (tmp_path / "config-mine").write_text(lacking)
    run = boot("--disk", f"{IMAGE},snapshot", append=run_in_guest("exit 3"), kernel=kernel)
    assert run.status == 3, run.console + run.messages
    assert run.messages == (
        f"pyvmm: {kernel}: the kernel lacks CONFIG_EXT4_FS (root file system ext4): "
        "a root of ext4 is not mounted\n"
    )


def test_a_root_that_is_not_there_is_a_panic_with_a_remedy() -> None:
    run = boot("--disk", f"{IMAGE},snapshot", append="root=/dev/vdz")
    assert run.status == 121, run.console + run.messages
    assert "kernel panic: VFS: Unable to mount root fs" in run.messages
    assert "root= and --disk must name it" in run.messages


def test_a_kernel_that_prints_nothing_is_told_which_console_to_use() -> None:
    run = boot(
        "--disk", f"{IMAGE},snapshot",
        "--cmdline", "console=tty1 reboot=k panic=-1 root=/dev/vda init=/missing",
    )
    assert run.console == ""
    assert "the kernel printed nothing: its consoles are console=tty1" in run.messages
    assert "console=ttyS0 is the serial port" in run.messages


def test_timing_says_how_long_each_stage_took() -> None:
    run = boot("--disk", f"{IMAGE},snapshot", "--timing",
               append=run_in_guest("pyvmm-mark 200; exit 4"))
    assert run.status == 4, run.console + run.messages
    stages = re.findall(r"^pyvmm: (\S.*?) +(?:at )?(\d+\.\d{3}) s", run.messages, re.MULTILINE)
    assert [name for name, _ in stages] == [
        "start-up", "kernel", "init", "user space", "shutdown", "mark 200", "total"
    ]
    times_s = {name: float(took_s) for name, took_s in stages}
    parts_s = sum(times_s[name] for name, _ in stages[:5])
    assert parts_s == pytest.approx(times_s["total"], abs=0.01)
    assert times_s["kernel"] > 0
