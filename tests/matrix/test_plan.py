"""The file of a matrix: what it may say, and one clear line for each mistake."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvmm.cli.parse import parse_disk
from pyvmm.errors import ConfigError
from pyvmm.matrix.expand import MAX_RUNS, chosen, runs_of
from pyvmm.matrix.plan import MAX_FILE_BYTES, read_plan
from pyvmm.matrix.runs import Run

SMALL = """
[kernels]
k = "bzImage"
[commands]
c = ["true"]
"""
Runs = Callable[[str], tuple[Run, ...]]


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    """Return the runs of a matrix with this text, in a file of its own."""

    def expand(text: str) -> tuple[Run, ...]:
        path = tmp_path / "m.toml"
        path.write_text(text)
        return runs_of(read_plan(str(path), parse_disk))

    return expand


def test_the_smallest_matrix_is_one_run(runs: Runs, tmp_path: Path) -> None:
    (run,) = runs(SMALL)
    assert run.name == "k+256M+1cpu+c"
    assert run.guest.kernel == str(tmp_path / "bzImage")
    assert run.order.argv == ("true",)
    assert (run.guest.disks, run.guest.cpus, run.guest.agent) == ((), 1, "inject")


def test_all_combinations_less_the_excluded_and_the_included_ones(runs: Runs) -> None:
    found = runs("""
        memory = ["256M", "1G"]
        cpus = [1, 2]
        [kernels]
        a = "a"
        b = "b"
        [disks]
        root = "root.img"
        none = []
        [commands]
        c = ["true"]
        [[exclude]]
        kernel = "b"
        memory = "1G"
        [[exclude]]
        disk = "none"
        cpus = 2
        [[include]]
        kernel = "b"
        disk = "none"
        memory = "4G"
        cpus = 4
        name = "large"
    """)
    assert [run.name for run in found] == [
        "a+root+256M+1cpu+c", "a+root+256M+2cpu+c", "a+root+1G+1cpu+c", "a+root+1G+2cpu+c",
        "a+none+256M+1cpu+c", "a+none+1G+1cpu+c", "b+root+256M+1cpu+c", "b+root+256M+2cpu+c",
        "b+none+256M+1cpu+c", "large",
    ]
    assert found[-1].guest.memory == "4G"
    assert found[-1].places == ("b", "none", "4G", "4", "c")


def test_paths_are_relative_to_the_file_and_appends_are_joined(runs: Runs, tmp_path: Path) -> None:
    (run,) = runs("""
        append = "quiet"
        [kernels]
        k = { file = "boot/k", initrd = "../i", append = "k1" }
        [disks]
        d = { disks = ["one.img,ro", "/two.img,serial=x"], append = "root=/dev/vda" }
        [commands.c]
        run = ["sh", "-c", ""]
        put = ["a.ko:/tmp/", "dir/:/x"]
        get = ["/var/log", "/etc/passwd:users"]
        env = { A = "1" }
        cwd = "/tmp"
        timeout = 5
        boot-timeout = 2.5
    """)
    assert run.guest.kernel == str(tmp_path / "boot" / "k")
    assert run.guest.initrd == str(tmp_path.parent / "i")
    assert run.guest.append == "quiet k1 root=/dev/vda"
    one, two = run.guest.disks
    assert (one.location, one.read_only, one.source.snapshot) == (
        str(tmp_path / "one.img"), True, False)
    assert (two.location, two.serial, two.source.snapshot) == ("/two.img", "x", True)
    order = run.order
    assert order.puts == ((str(tmp_path / "a.ko"), "/tmp/"), (f"{tmp_path / 'dir'}/", "/x"))
    assert order.gets == (("/var/log", "./"), ("/etc/passwd", "users"))
    assert (order.env, order.cwd, order.timeout_s, order.boot_timeout_s) == (
        (("A", "1"),), "/tmp", 5.0, 2.5)
    assert order.argv == ("sh", "-c", "")


def test_lines_that_fail_a_run_are_those_of_the_file_and_of_the_command(runs: Runs) -> None:
    one, two = runs("""
        fail-on = "EXT4-fs error"
        allow = ["harmless"]
        [kernels]
        k = "k"
        [commands]
        one = ["true"]
        [commands.two]
        run = ["true"]
        expect = ["ready", "done"]
        fail-on = ["b"]
        no-fail-on = "warning"
    """)
    assert one.order.fail_on.patterns == ("EXT4-fs error",)
    assert "warning" in one.order.fail_on.classes
    assert two.order.fail_on.patterns == ("EXT4-fs error", "b")
    assert two.order.fail_on.allowed == ("harmless",)
    assert "warning" not in two.order.fail_on.classes
    assert two.order.expect == ("ready", "done")


MISTAKES = {
    "no TOML": ("[kernels", "m.toml: is no TOML: "),
    "twice": ("cpus = 1\ncpus = 2\n\n", "m.toml: is no TOML: Cannot overwrite a value (at line 2"),
    "empty": ("", "m.toml: kernels: has no entry, so the matrix is empty; write [kernels]"),
    "no command": ('[kernels]\nk = "k"', "m.toml: commands: has no entry, so the matrix is empty"),
    "empty axis": (f"cpus = []\n{SMALL}", "m.toml: cpus: is an empty list, so the matrix is empty"),
    "unknown key": (f"memry = '1G'\n{SMALL}", "memry: is no key here; did you mean memory?"),
    "underscore": (f"fail_on = 'x'\n{SMALL}", "fail_on: is no key here; did you mean fail-on?"),
    "quite unknown": (f"xyzzy = 1\n{SMALL}", "m.toml: xyzzy: is no key here; there are kernels,"),
    "no text": (SMALL.replace('"bzImage"', "5"), "kernels.k: must be a kernel's file or a table"),
    "below a table": (f"{SMALL}memory = ['1G']",
                      "commands.memory: for all runs stands above the first [table]"),
    "no size": (f"memory = '1 giga'\n{SMALL}", "memory: '1 giga' is no size from 16M"),
    "no unit": (f"memory = '512'\n{SMALL}", "; write \"512M\""),
    "a number": (f"memory = 512\n{SMALL}", "; write \"512M\""),
    "numbers": (f"memory = ['1G', 512]\n{SMALL}", "; write \"512M\""),
    "no number": (f"memory = 1.5\n{SMALL}", "memory: must be a list of texts, not a number"),
    "memory twice": (f"memory = ['1G', '1G']\n{SMALL}", "memory: has '1G' twice"),
    "no processors": (f"cpus = 0\n{SMALL}", "cpus: must be whole numbers from 1 to 8, not 0"),
    "half a processor": (f"cpus = [1, 1.5]\n{SMALL}", "from 1 to 8, not 1.5"),
    "true": (f"cpus = true\n{SMALL}", "cpus: must be whole numbers from 1 to 8, not True"),
    "no time": (f"timeout = 0\n{SMALL}", "timeout: must be a number of seconds above 0"),
    "nan": (f"timeout = nan\n{SMALL}", "timeout: must be a number of seconds above 0"),
    "agent": (f"agent = 'injekt'\n{SMALL}", "agent: must be inject or image, not 'injekt'"),
    "append": (f"append = 'ä'\n{SMALL}", "append: 'ä' is not ASCII"),
    "command as a text": (SMALL.replace('["true"]', '"ls -l"'),
                          'commands.c: must be a list of words: write ["ls", "-l"]'),
    "command of nothing": (SMALL.replace('["true"]', "[]"), "commands.c: must be a list of words"),
    "command of numbers": (SMALL.replace('["true"]', "['a', 1]"), "commands.c[1]: must be a text"),
    "no run": (SMALL.replace('["true"]', "{ expect = 'x' }"), "commands.c: has no run: write run"),
    "typing error": (SMALL.replace('["true"]', "{ run = ['x'], expct = 'x' }"),
                     "commands.c.expct: is no key here; did you mean expect?"),
    "no pattern": (SMALL.replace('["true"]', "{ run = ['x'], expect = '(' }"),
                   "commands.c.expect '(': is no regular expression: missing )"),
    "no class": (f"no-fail-on = 'warnings'\n{SMALL}", "m.toml: no-fail-on warnings: is no class"),
    "put": (SMALL.replace('["true"]', "{ run = ['x'], put = 'a' }"), "'a' is not SOURCE:TARGET"),
    "get above": (SMALL.replace('["true"]', "{ run = ['x'], get = '/a:../b' }"),
                  "commands.c.get: '/a:../b': the path behind the colon must be below"),
    "get a relative path": (SMALL.replace('["true"]', "{ run = ['x'], get = 'a' }"),
                            "the path in the guest must begin with /"),
    "name": (SMALL.replace("k =", "'a/b' ="), "kernels.a/b: is no name for a run"),
    "name up": (SMALL.replace("k =", "'..' ="), "kernels...: is no name for a run"),
    "long name": (SMALL.replace("k =", f"{'x' * 41} ="), "is no name for a run"),
    "disk option": (f"{SMALL}[disks]\nd = 'a,redonly'", "disks.d: 'a,redonly' does not know"),
    "overlay": (f"{SMALL}[disks]\nd = 'a,overlay=b'", "'a,overlay=b' has an overlay"),
    "back end": (f"{SMALL}[disks]\nd = 'vhost-user=s'", "cannot be in a matrix: its back end"),
    "exclude": (f"{SMALL}[[exclude]]\nkernel = 'kk'", "exclude[0].kernel: 'kk' is not among"),
    "exclude all": (f"{SMALL}[[exclude]]\nkernel = 'k'", "m.toml: exclude: leaves no run, so the"),
    "exclude nothing": (f"{SMALL}[[exclude]]", "exclude[0]: is empty"),
    "exclude no table": (f"exclude = 1\n{SMALL}", "exclude: must be a list of tables: write"),
    "include": (f"{SMALL}[[include]]\ncommand = 'd'", "include[0].command: 'd' is not among"),
    "include twice": (f"{SMALL}[[include]]\ncommand = 'c'", "two runs of the name k+256M+1cpu+c"),
    "include less": (f"memory = ['1G', '2G']\n{SMALL}[[include]]\nname = 'x'",
                     "include[0].memory: is missing: name one of 1G, 2G"),
}


@pytest.mark.parametrize(("text", "line"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_names_file_and_key(text: str, line: str, runs: Runs) -> None:
    with pytest.raises(ConfigError) as caught:
        runs(text)
    assert line in str(caught.value)
    assert "m.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_large_a_matrix_is_counted_not_made(runs: Runs) -> None:
    commands = "\n".join(f"c{number} = ['true']" for number in range(200))
    with pytest.raises(ConfigError, match=f"has 1608 runs .* the limit is {MAX_RUNS}"):
        runs(f"cpus = [1,2,3,4,5,6,7,8]\n{SMALL}{commands}\n")


@pytest.mark.parametrize(("content", "problem"), [
    (b"x" * (MAX_FILE_BYTES + 1), "is over 1M"), (b"a = '\xff'", "is not UTF-8 at byte 5"),
    (b"a = " + b"[" * 50_000, "is no TOML"),
], ids=["long", "binary", "deep"])
def test_a_file_that_is_no_text_of_ours(content: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=problem):
        read_plan(str(path), parse_disk)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_plan(str(tmp_path / "none"), parse_disk)
    with pytest.raises(ConfigError, match="is not a file"):
        read_plan(str(tmp_path), parse_disk)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError, match="is not a file"):
        read_plan(str(tmp_path / "fifo"), parse_disk)


def test_only_takes_runs_by_pattern(runs: Runs) -> None:
    found = runs(f"cpus = [1, 2]\n{SMALL}d = ['false']\n")
    assert len(found) == 4
    assert [run.name for run in chosen(found, ["*+2cpu+*"])] == ["k+256M+2cpu+c", "k+256M+2cpu+d"]
    assert chosen(found, ["*+c", "k+*"]) == found
    with pytest.raises(ConfigError, match="--only x: matches none of the 4 runs"):
        chosen(found, ["*+c", "x"])


def test_a_directory_of_kernel_fetch_has_kernel_and_initramfs(runs: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "kernel"
    folder.mkdir()
    for name in ("vmlinuz-6.1", "initramfs-6.1.cpio.gz", "mine.gz"):
        (folder / name).touch()
    for entry, initrd in (
        ('k = "kernel"', "initramfs-6.1.cpio.gz"),
        ('k = { file = "kernel" }', "initramfs-6.1.cpio.gz"),
        ('k = { file = "kernel", initrd = "kernel/mine.gz" }', "mine.gz"),
    ):
        (run,) = runs(SMALL.replace('k = "bzImage"', entry))
        assert run.guest.kernel == str(folder / "vmlinuz-6.1")
        assert run.guest.initrd == str(folder / initrd)
