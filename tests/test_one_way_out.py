"""Every line that pyvmm prints goes through ``pyvmm.report``, which escapes: no other way out."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "pyvmm"
REPORT = "report.py"
ALLOWED = {
    # What is None because it was closed gets a /dev/null.
    ("cli/descriptors.py", "sys.stdout"), ("cli/descriptors.py", "sys.stderr"),
    # A script's own way out, for lines that are escaped before.
    ("api/running.py", "logging.getLogger"), ("api/lifetime.py", "warnings.warn"),
    ("api/machine.py", "warnings.warn"),
    ("launcher/stderr.py", "logging.getLogger"), ("launcher/session.py", "warnings.warn"),
    # Silenced: a library tells in tracebacks what we say in a line.
    ("matrix/cluster.py", "logging.getLogger"),
    # Parameters of the names that subprocess has for them: a command's output, not ours.
    ("launcher/vm.py", "sys.stdout"), ("launcher/vm.py", "sys.stderr"),
    ("launcher/command.py", "sys.stdout"), ("launcher/command.py", "sys.stderr"),
    # Given to a Reporter.
    ("cli/running.py", "sys.stderr"), ("cli/export.py", "sys.stderr"),
    # Flushed, not written.
    ("__main__.py", "sys.stdout"), ("console/place.py", "sys.stdout"),
    ("cli/fork_server.py", "sys.stdout"),
    ("pytest_plugin/lab.py", "sys.stdout"), ("pytest_plugin/lab.py", "sys.stderr"),
    # The guest's console, and what we write to its terminal: our own control sequences.
    ("console/output.py", "write_now"), ("console/place.py", "Outlet"),
    ("console/terminal.py", "Outlet"),
    # A command's output, made harmless for a terminal, and lines that must not be lost: escaped.
    ("cli/test_output.py", "PassedOn"), ("cli/ctl_agent.py", "PassedOn"),
    # A guest's console, and its memory, as asked for.
    ("cli/ctl.py", "PassedOn"),
}
"""(file, way out), each for a reason."""
WAYS = {
    "sys.stdout", "sys.stderr", "sys.__stdout__", "sys.__stderr__", "write_text_now", "write_now",
    "Outlet", "PassedOn", "print", "warnings.warn", "logging.getLogger", "os.system",
    "traceback.print_exc", "traceback.print_exception", "traceback.print_stack",
    "faulthandler.enable", "pprint.pprint",
}
FILES = sorted(PACKAGE.rglob("*.py"))


def dotted(node: ast.expr) -> str:
    """``a.b`` or ``a`` as written; nothing for all else."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def ways_out(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The ways out in a module's code: line and name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and dotted(node) in WAYS:
            yield node.lineno, dotted(node)
        if isinstance(node, ast.Name) and node.id in ("stdout", "stderr"):
            yield node.lineno, f"sys.{node.id}"
        if not isinstance(node, ast.Call):
            continue
        name, first = dotted(node.func), node.args[0] if node.args else None
        if name in ("os.write", "os.writev", "os.fdopen", "open", "write_now") and (
            isinstance(first, ast.Constant) and first.value in (1, 2, "/dev/tty", "/dev/stderr")
        ):
            yield node.lineno, f"{name}({first.value!r})"
        if name in ("subprocess.run", "subprocess.Popen", "subprocess.check_call"):
            given = {keyword.arg for keyword in node.keywords}
            if not (given >= {"stdout", "stderr"} or "capture_output" in given):
                yield node.lineno, f"{name} with our own output"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_fault_2_no_module_prints_past_report(path: Path) -> None:
    name = str(path.relative_to(PACKAGE))
    if name == REPORT:
        return
    found = [
        f"{name}:{line}: {way}" for line, way in ways_out(ast.parse(path.read_text()))
        if (name, way) not in ALLOWED
    ]
    assert found == []


def test_what_is_allowed_is_needed() -> None:
    found = {
        (str(path.relative_to(PACKAGE)), way)
        for path in FILES for _, way in ways_out(ast.parse(path.read_text()))
    }
    assert found >= ALLOWED


@pytest.mark.parametrize("code", [
    "print(1)", "import sys\nsys.stderr.write(x)", "os.write(2, x)", "write_now(1, x)",
    "from sys import stderr\nstderr.write(x)", "traceback.print_exc()", "subprocess.run(['ls'])",
    "p = print", "open('/dev/tty', 'w')", "open(1, 'w')",
])
def test_a_way_out_is_found(code: str) -> None:
    assert list(ways_out(ast.parse(code)))
