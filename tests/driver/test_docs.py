"""docs/driver.md: its worked example runs, and every test it names is there."""

from __future__ import annotations

import ast
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm.driver import Transport, VirtioBlkQueue
from tests.support.export_process import Export
from tests.support.guest import environment
from tests.support.patience import patient
from tests.support.storage_daemon import StorageDaemon

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "driver.md").read_text()


def example() -> str:
    """The one Python program of the page."""
    (source,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    return str(source)


@pytest.mark.parametrize("back_end", [Export, StorageDaemon])
def test_the_worked_example(
    tmp_path: Path, back_end: type[Export] | type[StorageDaemon]
) -> None:
    """As a user would run it: by itself, in a folder with the socket."""
    image = tmp_path / "disk.img"
    image.write_bytes(random.Random(1).randbytes(1 << 20))
    with back_end(image, tmp_path / "disk.sock"):
        run = subprocess.run(
            [sys.executable, "-W", "error", "-c", example()],
            cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=patient(60),
            check=False,
        )  # fmt: skip
    assert run.stderr == ""
    assert run.stdout == f"completed 'my-request-context': 0, {image.read_bytes()[:8]!r}\n"


def named_tests() -> list[str]:
    return sorted(set(re.findall(r"`([\w/]+/test_\w+\.py(?:::\w+)?)`", PAGE)))


def test_the_page_names_tests() -> None:
    assert len(named_tests()) > 30


@pytest.mark.parametrize("name", named_tests())
def test_every_test_it_names_is_there(name: str) -> None:
    path, _, function = name.removeprefix("tests/").partition("::")
    tree = ast.parse((REPOSITORY / "tests" / path).read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert not function or function in functions


def test_every_method_of_the_queue_and_the_transport_is_on_the_page() -> None:
    for kind in (VirtioBlkQueue, Transport):
        for method in vars(kind):
            assert method.startswith("_") or re.search(rf"`[^`]*\b{method}\b", PAGE), method


@pytest.mark.parametrize("module", ["frontend", "session"])
def test_every_message_that_is_sent_or_served_is_in_the_table(module: str) -> None:
    tree = ast.parse((REPOSITORY / "pyvmm" / "vhost_user" / f"{module}.py").read_text())
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name) and node.value.id in ("Request", "BackendRequest")
    }
    table = PAGE.partition("## vhost-user, message by message")[2].partition("\n## ")[0]
    assert len(used) > 15
    assert used <= set(re.findall(r"[A-Z_]{3,}", table))
