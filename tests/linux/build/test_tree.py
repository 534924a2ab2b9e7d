"""Building in a tree of the user's, whose Makefile only pretends to be a kernel's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyvmm.cli.main import main
from pyvmm.errors import ConfigError
from pyvmm.linux.build import cached, options, source, tools
from pyvmm.linux.build.progress import BuildError
from pyvmm.linux.build.tree import BEFORE, LOG, build_tree
from tests.linux.build.test_cached import MAKEFILE

OLDDEFCONFIG = "olddefconfig:\n\techo asked >> asked\n\tsed -i /CONFIG_GHOST/d .config\n"


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "linux"
    (folder / "arch/x86").mkdir(parents=True)
    for name in cached.TINY_CONFIGS[1:]:  # a newer Linux has not all of them
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("CONFIG_EMBEDDED=y\n")
    (folder / "Makefile").write_text(MAKEFILE + OLDDEFCONFIG)
    (tmp_path / "count").touch()
    monkeypatch.setattr(tools, "missing_tools", list)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYVMM_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def fragment(tmp_path: Path) -> Path:
    path = tmp_path / "my.config"
    path.write_text("CONFIG_XFS_FS=y\n# CONFIG_PVH is not set\n")
    return path


def config_of(tree: Path) -> dict[str, str]:
    return options.parse_config((tree / ".config").read_text())


def test_a_tree_without_a_configuration_gets_ours(tree: Path, fragment: Path) -> None:
    files = build_tree(tree, [fragment])
    assert files == {"bzImage": tree / "arch/x86/boot/bzImage", "vmlinux": tree / "vmlinux",
                     "config": tree / ".config"}
    assert files["bzImage"].read_text().startswith("bzImage of")
    found, ours = config_of(tree), options.read_fragment(options.FRAGMENT)
    assert found == ours | {"CONFIG_EMBEDDED": "y", "CONFIG_XFS_FS": "y", "CONFIG_PVH": "n"}
    assert not (tree / LOG).exists()


def test_a_configuration_that_is_there_gets_only_what_a_guest_needs(
    tree: Path, fragment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = "CONFIG_MINE=m\nCONFIG_HZ=1000\nCONFIG_LOCALVERSION=\"-mine\"\n# CONFIG_TTY is not set\n"
    (tree / ".config").write_text(mine)
    build_tree(tree, [fragment])
    found = config_of(tree)
    needs = options.read_fragment(options.NEEDS)
    assert found == needs | {
        "CONFIG_MINE": "m", "CONFIG_HZ": "1000", "CONFIG_LOCALVERSION": '"-mine"',
        "CONFIG_XFS_FS": "y", "CONFIG_PVH": "n",
    }
    assert (tree / BEFORE).read_text() == mine
    assert f"gets what a guest of pyvmm needs (it was: {tree / BEFORE})" in capsys.readouterr().err
    build_tree(tree, [fragment])
    assert (tree / "asked").read_text() == "asked\n", "nothing was missing the second time"
    assert (tree / BEFORE).read_text() == mine


def test_an_option_of_the_user_that_does_not_survive_fails_by_name(
    tree: Path, fragment: Path
) -> None:
    fragment.write_text("CONFIG_GHOST=y\n")
    with pytest.raises(BuildError, match=r"refused: CONFIG_GHOST=y \(became n\)"):
        build_tree(tree, [fragment])


def test_an_option_of_ours_that_this_linux_lacks_is_said(
    tree: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = tmp_path / "ours.config"
    ours.write_text("CONFIG_GHOST=y\nCONFIG_A=y\n")
    monkeypatch.setattr("pyvmm.linux.build.tree.FRAGMENT", ours)
    build_tree(tree, [])
    said = capsys.readouterr().err
    assert "kernel: this Linux does not take: CONFIG_GHOST=y (became n)\n" in said


def test_a_failed_build_keeps_its_log(
    tree: Path, fragment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fragment.write_text("CONFIG_BROKEN=y\n")
    with pytest.raises(BuildError, match=f"the log, whose end is above, is {tree / LOG}$"):
        build_tree(tree, [fragment])
    assert "  | cc: the compiler said no\n" in capsys.readouterr().err
    assert "the compiler said no" in (tree / LOG).read_text()


def test_the_users_compiler_is_theirs_and_an_outer_make_is_not() -> None:
    environment = {"CC": "ccache gcc", "LLVM": "1", "LOCALVERSION": "-x", "MAKEFLAGS": "-n",
                   "MAKELEVEL": "1", "KBUILD_OUTPUT": "/o", "ARCH": "arm64"}
    assert tools.tree_environment(environment) == {
        "CC": "ccache gcc", "LLVM": "1", "LOCALVERSION": "-x", "LC_ALL": "C"}


@pytest.mark.parametrize(("text", "words"), [
    ("nonsense\n", "has no option; write lines such as"), (None, "No such file"),
])
def test_a_fragment_that_is_none(text: str | None, words: str, tree: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.config"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=f"{path}: .*{words}"):
        build_tree(tree, [path])


def test_the_command_builds_a_tree_and_says_how_to_boot_it(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["kernel", "build", str(tree), "--jobs", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"kernel     {tree}/arch/x86/boot/bzImage", f"vmlinux    {tree}/vmlinux",
        f"config     {tree}/.config", f"boot it    pyvmm run --kernel {tree} --disk root.img",
    ]
    out = tmp_path / "out"
    assert main(["kernel", "build", str(tree), "--out", str(out)]) == 0
    assert sorted(os.listdir(out)) == ["bzImage", "config", "vmlinux"]
    assert f"boot it    pyvmm run --kernel {out} --disk" in capsys.readouterr().out


@pytest.mark.parametrize("packing", ["", "z", "J"])
def test_the_command_builds_a_tarball_in_the_cache(
    packing: str, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tarball = tmp_path / "linux.tar"
    tools.output_of("tar", f"-c{packing}f", str(tarball), "-C", str(tmp_path), "linux")
    for _ in range(2):
        assert main(["kernel", "build", str(tarball)]) == 0
    assert (tmp_path / "count").read_text() == "built\n", "once"
    out = capsys.readouterr().out
    assert f"kernel     {cached.cache_directory()}/" in out
    assert not (tree / ".config").exists()


def test_a_tarball_of_something_else(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").touch()
    tarball = tmp_path / "other.tar"
    tools.output_of("tar", "-cf", str(tarball), "-C", str(tmp_path), "other")
    assert main(["kernel", "build", str(tarball)]) == 125
    assert f"{tarball}: is no kernel source" in capsys.readouterr().err.splitlines()[-1]
    tarball.write_bytes(b"nonsense")
    assert main(["kernel", "build", str(tarball)]) == 125
    assert "unpacking failed with status 2" in capsys.readouterr().err
    assert source.own_source(tarball).tarball == tarball
