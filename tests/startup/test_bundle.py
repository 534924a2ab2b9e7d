"""The bundle: modules come from it, and only if they are the ones that lie in the tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

from pyvmm.startup import bundle
from tests.support.planted import ANOTHER

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import sys
sys.path.insert(0, sys.argv[1])
from pyvmm.startup.bundle import Bundle, default_path
with Bundle(default_path()) as bundle:
    import pyvmm.config, pyvmm.run.runner
    missing = bundle.left_out()
bundle.update(missing)
loaders = {name: type(module.__loader__).__name__ for name, module in sys.modules.items()}
print(sum(kind == "_Loader" for kind in loaders.values()), loaders["pyvmm.config"])
print(pyvmm.config.__file__, getattr(pyvmm.config, "ADDED", None), pyvmm.virtio.__path__)
for name, module in sys.modules.items():
    if name.startswith("pyvmm."):
        parent, _, own_name = name.rpartition(".")
        assert getattr(sys.modules[parent], own_name) is module, name
        spec = module.__spec__
        assert (spec.name, spec.loader) == (name, module.__loader__) and module.__name__ == name
        assert module.__package__ == (name if hasattr(module, "__path__") else parent), name
print(*sorted(sys.modules))
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the package without compiled code."""
    shutil.copytree(
        ROOT / "pyvmm", tmp_path / "tree" / "pyvmm", ignore=shutil.ignore_patterns("__pycache__")
    )
    return tmp_path / "tree"


def run(tree: Path, *options: str) -> tuple[int, str, str]:
    """How many modules came from the bundle, what loaded pyvmm.config, and what that is."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", *options, "-c", RUN, str(tree)],
        capture_output=True, text=True, check=True,
    )
    first, second, modules = done.stdout.splitlines()
    count, loader = first.split()
    return int(count), loader, f"{second} {modules}"


def files(tree: Path) -> list[Path]:
    return list((tree / "pyvmm" / "__pycache__").glob("run.*"))


def test_the_first_run_leaves_what_the_second_takes(tree: Path) -> None:
    count, loader, what = run(tree)
    assert (count, loader) == (0, "SourceFileLoader")
    assert len(files(tree)) == 1
    count, loader, again = run(tree)
    assert count > 25
    assert loader == "_Loader"
    assert again == what, "the module has the file, and a package the path, that it always had"


def test_a_changed_source_counts(tree: Path) -> None:
    run(tree)
    config = tree / "pyvmm" / "config.py"
    config.write_text(config.read_text() + "ADDED = 'added'\n")
    count, loader, what = run(tree)
    assert loader == "SourceFileLoader"
    assert " added " in what
    assert count > 20, "the others are as they were"


def test_so_does_one_of_the_same_size(tree: Path) -> None:
    run(tree)
    config = tree / "pyvmm" / "config.py"
    config.write_text(config.read_text().replace("MAX_DISKS", "MAX_DISKZ"))
    assert run(tree)[1] == "SourceFileLoader"


def test_a_copied_tree_has_its_own_modules(tree: Path) -> None:
    run(tree)
    copy = tree.with_name("copy")
    shutil.copytree(tree, copy)  # with times
    assert run(copy)[0] == 0
    count, loader, what = run(copy)
    assert (count > 25, loader) == (True, "_Loader")
    assert str(copy) in what
    assert str(tree) + os.sep not in what


def test_damaged_code_is_had_from_its_source(tree: Path) -> None:
    run(tree)
    (file,) = files(tree)
    content = file.read_bytes()
    code = content.index(b"pyvmm.config", 8)  # the index; its code is zeros from here on
    start = 8 + int.from_bytes(content[:8], "little")
    assert code < start
    file.write_bytes(content[:start] + bytes(len(content) - start))
    count, _, what = run(tree)
    assert count > 25
    assert str(tree) in what
    assert run(tree)[1] == "SourceFileLoader", "it was thrown away"


def test_a_source_that_has_become_nonsense_meanwhile_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyvmm import config, errors

    class Loader:
        def get_code(self, name: str) -> None:
            raise SyntaxError(name)

    assert config.__spec__ is not None
    assert errors.__spec__ is not None
    monkeypatch.setattr(config.__spec__, "loader", Loader())
    # pytest loads the package of a plugin by a loader of its own.
    plain = SourceFileLoader("pyvmm.errors", errors.__file__)
    monkeypatch.setattr(errors.__spec__, "loader", plain)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = tmp_path / "run.bundle"
    names = [name for name in sys.modules if name.startswith("pyvmm.")]
    bundle.Bundle(str(path)).update(names)
    assert "pyvmm.errors" in bundle._read(str(path))
    assert "pyvmm.config" not in bundle._read(str(path))


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 5000, -1])
def test_a_damaged_bundle_is_none(tree: Path, keep: int) -> None:
    run(tree)
    (file,) = files(tree)
    file.write_bytes(file.read_bytes()[:keep])
    assert run(tree)[0] == 0


def test_bytes_that_are_no_bundle_are_none(tree: Path) -> None:
    run(tree)
    (file,) = files(tree)
    for content in (b"\xff" * 100, b"\0" * 8 + b"N", b"\1" + b"\0" * 7 + b"N", b"x" * 5000):
        file.write_bytes(content)
        assert run(tree)[0] == 0


def test_it_is_not_written_where_compiled_code_is_not_wanted(tree: Path) -> None:
    run(tree, "-B")
    assert files(tree) == []


def test_each_optimisation_has_its_own(tree: Path) -> None:
    run(tree)
    assert run(tree, "-O")[0] == 0
    assert len(files(tree)) == 2


def test_one_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    made = bundle.Bundle(str(tmp_path / "nowhere" / "run.bundle"))
    made.update(name for name in sys.modules if name.startswith("pyvmm."))
    assert list(tmp_path.iterdir()) == []


def test_few_new_modules_are_not_worth_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = tmp_path / "run.bundle"
    bundle.Bundle(str(path)).update(["pyvmm.errors", "pyvmm.startup.types"])
    assert not path.exists()


def test_nothing_of_others_is_kept(tmp_path: Path) -> None:
    made = bundle.Bundle(str(tmp_path / "run.bundle"))
    with made:
        assert "pytest" not in made.left_out()
    assert made not in sys.meta_path


@pytest.mark.parametrize("how", ["another's", "others may write", "symlink", "fifo"])
def test_fault_9_a_bundle_that_was_planted_is_not_run(how: str, tree: Path) -> None:
    run(tree)
    (file,) = files(tree)
    if how == "another's":
        if os.geteuid() != 0:
            pytest.skip("only root gives files away")
        os.chown(file, ANOTHER, ANOTHER)
    elif how == "others may write":
        file.chmod(0o666)
    elif how == "symlink":
        file.symlink_to(file.rename(file.with_name("elsewhere")))
    else:
        file.unlink()
        os.mkfifo(file)
    assert run(tree)[0] == 0
    assert run(tree)[0] > 25, "it was written anew"
    assert len(files(tree)) == 1
