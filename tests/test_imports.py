"""What the boot path imports: counts and names, never times (docs/architecture.md has the rule).

Of the standard library it is named module by module.  Of ours it does not matter into how many
files the code is cut, but how much of it there is: Python reads, decodes and runs it all at every
start.  100 kB of compiled code are 0.6 ms of decoding alone.
"""

from __future__ import annotations

import json
import marshal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.support.disk_heads import file_system
from tests.support.kernels import COMPLETE_CONFIG, ElfSegment, bzimage, elf, with_ikconfig
from tests.support.warm_runs import Warmed

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = (
    "collections.abc", "contextlib", "ctypes", "enum", "errno", "fcntl", "functools", "gc",
    "itertools", "mmap", "operator", "os", "select", "signal", "stat", "struct", "sys", "termios",
    "threading", "time", "types",
)
"""All that a module on the boot path may import of the standard library."""
RESTORE_ALLOWED = (*ALLOWED, "zlib")
"""The same for a restore, which checks CRCs."""
MAX_STANDARD = 45
"""Modules of the standard library that a bare interpreter does not have, with what they import."""

CODE_BYTES = 930_000
"""Compiled code of ours in a run with one disk, by CPython 3.11: without docstrings, asserts and
the names of files, which differ from checkout to checkout."""
RESTORE_CODE_BYTES = 1_050_000
"""The same of a restore with one disk."""
HEADROOM = 1.05 if sys.version_info[:2] == (3, 11) else 1.3
"""Other Pythons compile to other code."""

REPORT_STATUS_0 = bytes.fromhex("31c0 e6f4 f4")  # xor eax, eax; out 0xf4, al; hlt

TRIPLE_FAULT = bytes.fromhex("0f0b")  # ud2, and no interrupt table


def new_modules(code: str, *arguments: str) -> set[str]:
    """What ``code`` adds to the modules of a bare interpreter."""
    script = (
        f"import sys\nbefore = set(sys.modules)\nsys.path.insert(0, {str(ROOT)!r})\n{code}\n"
        "after = set(sys.modules) - before\nimport json\nprint(json.dumps(sorted(after)))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script, *arguments],
        capture_output=True, text=True, check=False, cwd=ROOT, stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def modules_of_a_run(folder: Path, *options: str) -> tuple[set[str], set[str]]:
    """Our modules, and others, that a whole ``pyvmm run`` imports; without a /dev/kvm as far as
    that matters."""
    kernel = folder / "guest.elf"
    kernel.write_bytes(elf(ElfSegment(data=REPORT_STATUS_0, p_memsz=4096)))
    code = (
        "from pyvmm.cli.main import main\n"
        "status = main(['run', *sys.argv[1:]])\n"
        "import os\n"
        "assert status == (0 if os.access('/dev/kvm', os.R_OK | os.W_OK) else 125), status"
    )
    found = new_modules(
        code, "--kernel", str(kernel), "--console", "none", "--timeout", "20", *options
    )
    ours = {name for name in found if name.partition(".")[0] == "pyvmm"}
    return ours, found - ours


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


def test_a_boot_imports_no_more_of_the_standard_library_than_it_may(
    tmp_path: Path, disk: Path
) -> None:
    allowed = new_modules("\n".join(f"import {name}" for name in (*ALLOWED, "__future__")))
    _, others = modules_of_a_run(tmp_path, "--disk", f"{disk},ro")
    assert others - allowed == set()
    assert len(others) <= MAX_STANDARD


def code_bytes(modules: Iterable[str]) -> int:
    """Return the size of the compiled code of ``modules`` of ours."""
    total = 0
    for name in modules:
        stem = ROOT.joinpath(*name.split("."))
        path = stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")
        code = compile(path.read_text(), "", "exec", dont_inherit=True, optimize=2)
        total += len(marshal.dumps(code))
    return total


def test_a_boot_loads_no_more_code_of_ours_than_it_may(tmp_path: Path, disk: Path) -> None:
    """Whoever needs more raises CODE_BYTES, in the commit that needs it; whoever needs much less
    lowers it, so that it does not creep."""
    ours, _ = modules_of_a_run(tmp_path, "--disk", f"{disk},ro")
    size = code_bytes(ours)
    assert size <= CODE_BYTES * HEADROOM, (
        f"a start loads {size} bytes of code in {len(ours)} modules: if all of it is needed, "
        f"raise CODE_BYTES ({CODE_BYTES}) in this commit"
    )
    assert size >= CODE_BYTES / HEADROOM, f"{size} bytes: lower CODE_BYTES"


def test_the_list_is_no_longer_than_need_be(tmp_path: Path, disk: Path) -> None:
    _, others = modules_of_a_run(tmp_path, "--disk", str(disk))
    built_in = set(sys.builtin_module_names) | {"os", "stat"}  # in a bare interpreter
    assert set(ALLOWED) - built_in - others == set()


@pytest.fixture
def warm(tmp_path: Path) -> Path:
    """A snapshot of a bare guest with a disk, which ends with status 0 when it goes on."""
    warmed = Warmed(tmp_path)
    warmed.warm(REPORT_STATUS_0)
    return warmed.directory


def modules_of_a_restore(directory: Path, *options: str) -> tuple[set[str], set[str]]:
    """Our modules, and others, that a whole ``pyvmm restore`` imports."""
    code = (
        "from pyvmm.cli.main import main\n"
        "assert main(['restore', *sys.argv[1:]]) == 0"
    )
    found = new_modules(code, str(directory), "--console", "none", "--timeout", "20", *options)
    ours = {name for name in found if name.partition(".")[0] == "pyvmm"}
    return ours, found - ours


@pytest.mark.bare
def test_a_restore_imports_no_more_than_it_may(warm: Path) -> None:
    allowed = new_modules("\n".join(f"import {name}" for name in (*RESTORE_ALLOWED, "__future__")))
    ours, others = modules_of_a_restore(warm)
    assert others - allowed == set()
    assert len(others) <= MAX_STANDARD + len(set(RESTORE_ALLOWED) - set(ALLOWED))
    for boots in (
        "x86.acpi", "x86.loader", "x86.elf", "x86.bzimage", "x86.boot_params", "x86.cpuid",
        "x86.cpu", "x86.cpu_features", "x86.cpu_model", "x86.mptable", "board.booting",
        "board.describe", "cli.run", "control", "snapshot.capture", "snapshot.checkpoints",
        "snapshot.files.writer", "launcher", "linux.",
    ):
        found = sorted(
            name for name in ours
            if name == f"pyvmm.{boots}" or name.startswith(f"pyvmm.{boots.rstrip('.')}.")
        )
        assert found == [] or found == ["pyvmm.linux.command_line"], boots


@pytest.mark.bare
def test_a_restore_loads_no_more_code_of_ours_than_it_may(warm: Path) -> None:
    ours, _ = modules_of_a_restore(warm)
    size = code_bytes(ours)
    assert size <= RESTORE_CODE_BYTES * HEADROOM, (
        f"a restore loads {size} bytes of code in {len(ours)} modules: if all of it is needed, "
        f"raise RESTORE_CODE_BYTES ({RESTORE_CODE_BYTES}) in this commit"
    )
    assert size >= RESTORE_CODE_BYTES / HEADROOM, f"{size} bytes: lower RESTORE_CODE_BYTES"


def test_nothing_is_imported_while_the_guest_runs(tmp_path: Path, disk: Path) -> None:
    kernel = tmp_path / "guest.elf"
    kernel.write_bytes(elf(ElfSegment(data=TRIPLE_FAULT, p_memsz=4096)))
    code = (
        "import pyvmm.cli.main, pyvmm.machine\n"
        "run, before, after = pyvmm.machine.Machine.run, set(), set()\n"
        "def watched(machine):\n"
        "    before.update(sys.modules)\n"
        "    outcome = run(machine)\n"
        "    after.update(sys.modules)\n"
        "    return outcome\n"
        "pyvmm.machine.Machine.run = watched\n"
        "status = pyvmm.cli.main.main(['run', *sys.argv[1:]])\n"
        "import os\n"
        "assert status == (122 if os.access('/dev/kvm', os.R_OK | os.W_OK) else 125), status\n"
        "assert before == after, after - before\n"
    )
    new_modules(code, "--kernel", str(kernel), "--disk", str(disk), "--timeout", "20")


def test_a_guest_without_disks_needs_nothing_of_them(tmp_path: Path) -> None:
    ours, _ = modules_of_a_run(tmp_path)
    assert not any(name.startswith(("pyvmm.virtio.block", "pyvmm.control")) for name in ours)
    assert "pyvmm.storage.raw" not in ours


def test_a_disk_needs_only_what_a_file_is_served_by(tmp_path: Path, disk: Path) -> None:
    ours, _ = modules_of_a_run(tmp_path, "--disk", str(disk))
    for late in ("overlay", "nbd", "faulty", "fault_script"):
        assert f"pyvmm.storage.{late}" not in ours
    assert not any(name.startswith(("pyvmm.vhost_user", "pyvmm.driver")) for name in ours)


def test_a_kernel_that_is_remembered_costs_a_start_little(tmp_path: Path, disk: Path) -> None:
    """What ``pyvmm kernel inspect`` left is judged without what read it."""
    kernel = tmp_path / "bzImage"
    kernel.write_bytes(with_ikconfig(COMPLETE_CONFIG))
    disk.write_bytes(file_system("ext4"))
    look = (
        "import os\n"
        f"os.environ['PYVMM_CACHE'] = {str(tmp_path / 'cache')!r}\n"
        "from pyvmm.cli.main import main\n"
        "main(['kernel', 'inspect', sys.argv[1]])"
    )
    new_modules(look, str(kernel))
    judge = (
        "import os\n"
        f"os.environ['PYVMM_CACHE'] = {str(tmp_path / 'cache')!r}\n"
        "from pyvmm.cli import explain, run\n"
        "from pyvmm.startup.options import parse_options\n"
        "config = run.config_from(parse_options(run.COMMAND, sys.argv[1:]))\n"
        "assert run.has_known_configuration(config.kernel, '')\n"
        "assert explain.before(config) == []\n"
    )
    found = new_modules(judge, "--kernel", str(kernel), "--disk", str(disk))
    allowed = new_modules("\n".join(f"import {name}" for name in (*ALLOWED, "__future__")))
    others = {name for name in found if name.partition(".")[0] != "pyvmm"}
    assert others - allowed == set()
    assert sorted(name for name in found if name.startswith("pyvmm.linux.")) == [
        f"pyvmm.linux.{name}" for name in (
            "command_line", "config_cache", "file_systems", "formats", "guest", "options",
            "partitions", "requirements", "root", "trust",
        )
    ]


@pytest.mark.parametrize("name", ["ext2", "ext4"])
def test_fault_22_an_ordinary_root_costs_a_start_no_import(tmp_path: Path, name: str) -> None:
    """A kernel of which nothing is known, and a disk of ext4 that is the root: one small read."""
    kernel, disk = tmp_path / "bzImage", tmp_path / "disk.img"
    kernel.write_bytes(bzimage())
    disk.write_bytes(file_system(name))
    judge = (
        "from pyvmm.cli import run\n"
        "from pyvmm.startup.options import parse_options\n"
        "import pyvmm.machine\n"
        "config = run.config_from(parse_options(run.COMMAND, sys.argv[1:]))\n"
        "assert not run.root_is_special(config)\n"
        "config.disks[0].source.open(report=print).close()\n"
    )
    options = ("--kernel", str(kernel), "--disk", str(disk))
    found = new_modules(judge, *options)
    ours = [name for name in found if name.startswith("pyvmm.linux.")]
    assert ours == ["pyvmm.linux.command_line"]
    assert "pyvmm.storage.image_kinds" not in found
    judge = judge.replace("assert not run.root", "assert run.root") + (
        "from pyvmm.cli import explain\n"
        "assert explain.before(config, is_known=False) == []\n"
    )
    found = new_modules(judge, *options, "--append", "root=/dev/vda")
    for late in ("pyvmm.linux.compression", "pyvmm.linux.config", "pyvmm.x86.inspect", "re"):
        assert late not in found
