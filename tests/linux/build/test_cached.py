"""Cached kernels, of a source package whose Makefile only pretends to be a kernel's."""

from __future__ import annotations

import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from kernels.build import main
from pyvmm.errors import HostError
from pyvmm.linux.build import cached, options, source, tools
from pyvmm.linux.build.cached import build, build_all
from pyvmm.linux.build.progress import BuildError
from tests.support.planted import give_away

MAKEFILE = """\
allnoconfig:
\tgrep -v CONFIG_GHOST $(KCONFIG_ALLCONFIG) > .config
bzImage: vmlinux
\tmkdir -p arch/x86/boot
\techo "bzImage of $(KBUILD_BUILD_USER), LOCALVERSION=$(LOCALVERSION)" > arch/x86/boot/bzImage
object.o:
\techo compiled >> $(HOME)/objects
\ttouch object.o
vmlinux: object.o .config
\t@if grep -q CONFIG_BROKEN=y .config; then echo "cc: the compiler said no"; exit 1; fi
\techo built >> $(HOME)/count
\tsleep 0.3
\techo vmlinux > vmlinux
"""


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replaces the source package; the file returned gets a line for each build done."""
    tree = tmp_path / source.PACKAGE
    for name in cached.TINY_CONFIGS:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("CONFIG_EMBEDDED=y\n")
    (tree / "arch/x86").mkdir(exist_ok=True)
    (tree / "Makefile").write_text(MAKEFILE)
    tarball = tmp_path / "source.tar.xz"
    subprocess.run(["tar", "-cJf", tarball, "-C", tmp_path, source.PACKAGE], check=True)
    count = tmp_path / "count"
    count.touch()
    monkeypatch.setattr(source, "TARBALL", tarball)
    monkeypatch.setattr(tools, "missing_tools", list)
    monkeypatch.setenv("HOME", str(tmp_path))
    return count


@pytest.fixture
def fragment(tmp_path: Path) -> Path:
    path = tmp_path / "fragment.config"
    path.write_text("# a reason\nCONFIG_A=y\n# CONFIG_B is not set\n")
    return path


def test_parse_config_reads_values_strings_and_unset_options() -> None:
    text = '# CONFIG_SMP is not set\nCONFIG_HZ=100\nCONFIG_V="-x y"\n# prose CONFIG_NO=y\n'
    assert options.parse_config(text) == {
        "CONFIG_SMP": "n", "CONFIG_HZ": "100", "CONFIG_V": '"-x y"'}


@pytest.mark.parametrize(("wanted", "final", "named"), [
    ("CONFIG_A=y", "CONFIG_A=y", []),
    ("# CONFIG_A is not set", "", []),
    ("# CONFIG_A is not set", "# CONFIG_A is not set", []),
    ("CONFIG_A=y", "", ["CONFIG_A=y (became n)"]),
    ("CONFIG_A=y", "# CONFIG_A is not set", ["CONFIG_A=y (became n)"]),
    ("CONFIG_A=y", "CONFIG_A=m", ["CONFIG_A=y (became m)"]),
    ("# CONFIG_A is not set", "CONFIG_A=y", ["CONFIG_A=n (became y)"]),
    ("CONFIG_N=1\nCONFIG_B=y", "CONFIG_N=4", ["CONFIG_N=1 (became 4)", "CONFIG_B=y (became n)"]),
])
def test_refused_options_are_named(wanted: str, final: str, named: list[str]) -> None:
    found = options.refused_options(options.parse_config(wanted), options.parse_config(final))
    assert found == named


def test_cache_key_follows_what_the_kernel_depends_on_and_nothing_else() -> None:
    wanted = {"CONFIG_A": "y", "CONFIG_B": "n"}
    key = cached.cache_key(wanted, "6.1-1", "gcc 12")
    assert key == cached.cache_key(dict(reversed(wanted.items())), "6.1-1", "gcc 12")
    assert key != cached.cache_key(wanted | {"CONFIG_B": "y"}, "6.1-1", "gcc 12")
    assert key != cached.cache_key(wanted, "6.1-2", "gcc 12")
    assert key != cached.cache_key(wanted, "6.1-1", "gcc 13")


def test_builds_once_and_leaves_only_the_result(
    builds: Path, fragment: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    done = build([fragment], cache)
    assert build([fragment], cache) == done
    assert builds.read_text() == "built\n"
    assert sorted(path.name for path in done.iterdir()) == [
        "build.log", "bzImage", "config", "vmlinux"]
    assert sorted(path.name for path in cache.iterdir()) == [done.name, f"{done.name}.lock"]


def test_a_later_fragment_has_the_last_word(builds: Path, fragment: Path, tmp_path: Path) -> None:
    extra = tmp_path / "extra.config"
    extra.write_text("CONFIG_B=y\n")
    done = build([fragment, extra], tmp_path / "cache")
    assert options.parse_config((done / "config").read_text())["CONFIG_B"] == "y"


def test_an_option_that_did_not_survive_fails_by_name(
    builds: Path, fragment: Path, tmp_path: Path
) -> None:
    fragment.write_text("CONFIG_A=y\nCONFIG_GHOST=y\n")
    with pytest.raises(BuildError, match=r"refused: CONFIG_GHOST=y \(became n\)"):
        build([fragment], tmp_path / "cache")
    assert builds.read_text() == ""


def test_a_failed_build_shows_the_tail_and_the_path_of_its_log(
    builds: Path, fragment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fragment.write_text("CONFIG_BROKEN=y\n")
    cache = tmp_path / "cache"
    with pytest.raises(BuildError, match="compiling failed with status 2") as failure:
        build([fragment], cache)
    (log,) = cache.glob("*.log")
    assert "\n  | cc: the compiler said no\n" in capsys.readouterr().err
    assert str(log) in str(failure.value)
    assert not list(cache.glob("*.work"))


def test_two_racing_builds_both_succeed_and_build_once(
    builds: Path, fragment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results: list[Path] = []
    threads = [threading.Thread(
        target=lambda: results.append(build([fragment], tmp_path / "cache")))
        for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert results[0] == results[1]
    assert builds.read_text() == "built\n"
    assert "waiting for it" in capsys.readouterr().err


def test_an_outer_make_does_not_leak_into_the_build(
    builds: Path, fragment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCALVERSION", "-leaked")
    monkeypatch.setenv("MAKEFLAGS", " -- KBUILD_BUILD_USER=leaked")
    done = build([fragment], tmp_path / "cache")
    assert (done / "bzImage").read_text() == "bzImage of pyvmm, LOCALVERSION=\n"


def test_a_build_sees_little_of_the_environment() -> None:
    environment = {"PATH": "/bin", "HOME": "/root", "TMPDIR": "/t", "MAKEFLAGS": "-n",
                   "MAKELEVEL": "1", "KCFLAGS": "-O0", "KBUILD_OUTPUT": "/o", "ARCH": "arm64"}
    assert tools.build_environment(environment) == {
        "PATH": "/bin", "HOME": "/root", "TMPDIR": "/t", "LC_ALL": "C"}


def test_main_copies_both_files_and_leaves_identical_ones_alone(
    builds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYVMM_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    assert main(["--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["bzImage", "vmlinux"]
    before = (out / "bzImage").stat()
    assert main(["--out", str(out)]) == 0
    assert (out / "bzImage").stat().st_ino == before.st_ino


def test_main_says_a_failure_in_one_line(
    builds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PYVMM_CACHE", str(tmp_path / "with space"))
    assert main(["--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "PYVMM_CACHE" in error


def test_missing_tools_are_named_with_the_command_that_installs_them(
    fragment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=r"apt-get install .*bison.*flex.*gcc.*libelf-dev"):
        build([fragment], tmp_path / "cache")


def test_missing_source_is_said_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "TARBALL", tmp_path / "absent")
    monkeypatch.setenv("PATH", str(tmp_path))  # no apt either
    with pytest.raises(BuildError, match=r"apt-get install .*linux-source-6\.1"):
        source.find_source(tmp_path)


def test_a_tarball_downloaded_before_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "TARBALL", tmp_path / "absent")
    monkeypatch.setenv("PATH", str(tmp_path))
    kept = tmp_path / f"{source.PACKAGE}_6.1.9-1.tar.xz"
    kept.touch()
    assert source.find_source(tmp_path) == source.Source(version="6.1.9-1", tarball=kept)


def test_kernels_are_kept_in_pyvmms_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYVMM_CACHE", "/c")
    assert cached.cache_directory() == Path("/c/kernels")


@pytest.mark.parametrize("planted", ["KEY", "KEY.lock", "KEY.log", "KEY.work", "tarball"])
def test_fault_9_what_is_planted_for_a_kernel_is_not_believed(
    planted: str, builds: Path, fragment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache, victim = tmp_path / "cache", tmp_path / "victim"
    victim.write_text("precious")
    done = build([fragment], cache)
    (cache / f"{done.name}.lock").unlink()
    if planted == "KEY":
        give_away(monkeypatch, done)
    else:
        shutil.rmtree(done)
    if planted == "tarball":
        source.TARBALL.rename(cache / f"{source.PACKAGE}_6.1.9-1.tar.xz")
        give_away(monkeypatch, *cache.glob("*.tar.xz"))
        for module in (tools, source):
            monkeypatch.setattr(
                module, "output_of", lambda *command: "gcc 12" if "gcc" in command else ""
            )
    elif planted != "KEY":
        (cache / planted.replace("KEY", done.name)).symlink_to(victim)
    if planted in ("KEY", "KEY.lock", "tarball"):
        with pytest.raises(HostError, match=f"{cache}/.*(a symbolic link|belongs to).*PYVMM_CACHE"):
            build([fragment], cache)
        assert builds.read_text() == "built\n", "by the build that was there first"
    else:
        assert cached.is_complete(build([fragment], cache))
    assert victim.read_text() == "precious"


def test_fault_9_a_cache_that_others_may_write_is_one_line(
    builds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    monkeypatch.setenv("PYVMM_CACHE", str(tmp_path / "cache"))
    assert main(["--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert f"kernels/build.py: {tmp_path}/cache: others may write there (mode 0777)" in error
    assert "chmod go-w" in error
    assert error.count("\n") == 1


def test_fault_43_variants_are_built_in_one_tree(
    builds: Path, fragment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second kernel takes from the first what both have, and is what it would be alone."""
    extra, fragments = tmp_path / "extra.config", tmp_path / "cache"
    extra.write_text("CONFIG_C=y\n")
    monkeypatch.setenv("PYVMM_CACHE", str(tmp_path / "both"))
    monkeypatch.setattr("kernels.build.FRAGMENT", fragment)
    out = tmp_path / "out"
    assert main(["--out", str(out), "--variant", str(extra), str(out / "extra")]) == 0
    assert builds.read_text() == "built\n" * 2
    assert (tmp_path / "objects").read_text() == "compiled\n"
    for folder in (out, out / "extra"):
        assert sorted(path.name for path in folder.iterdir() if path.is_file()) == [
            "bzImage", "vmlinux"]
    both = {path.name for path in cached.cache_directory().iterdir() if path.is_dir()}
    alone = {build(which, fragments).name for which in ([fragment], [fragment, extra])}
    assert both == alone
    for name in both:
        left, right = cached.cache_directory() / name, fragments / name
        assert (left / "config").read_text() == (right / "config").read_text()


def test_fault_43_only_the_variant_that_is_absent_is_built(
    builds: Path, fragment: Path, tmp_path: Path
) -> None:
    extra, cache = tmp_path / "extra.config", tmp_path / "cache"
    extra.write_text("CONFIG_C=y\n")
    first = build([fragment], cache)
    both = build_all([[fragment], [fragment, extra]], cache)
    assert both[0] == first
    assert cached.is_complete(both[1])
    assert builds.read_text() == "built\n" * 2
    assert build_all([[fragment, extra], [fragment]], cache) == both[::-1]
    assert builds.read_text() == "built\n" * 2


def test_fault_43_a_variant_that_fails_leaves_the_one_before(
    builds: Path, fragment: Path, tmp_path: Path
) -> None:
    broken, cache = tmp_path / "broken.config", tmp_path / "cache"
    broken.write_text("CONFIG_BROKEN=y\n")
    with pytest.raises(BuildError, match="compiling failed"):
        build_all([[fragment], [fragment, broken]], cache)
    build([fragment], cache)
    assert builds.read_text() == "built\n"
    assert not list(cache.glob("*.work*"))


def test_fault_43_racing_runs_of_several_variants_do_not_wait_for_each_other(
    builds: Path, fragment: Path, tmp_path: Path
) -> None:
    extra, cache = tmp_path / "extra.config", tmp_path / "cache"
    extra.write_text("CONFIG_C=y\n")
    variants = [[fragment], [fragment, extra]]
    results: list[list[Path]] = []
    threads = [
        threading.Thread(target=lambda order=order: results.append(build_all(order, cache)))
        for order in (variants, variants[::-1], variants[:1], variants[1:])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(len, results)) == [1, 1, 2, 2]
    assert len({path for found in results for path in found}) == 2
    assert builds.read_text() == "built\n" * 2
