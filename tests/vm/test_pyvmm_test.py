"""``pyvmm test`` with Linux: each outcome once, at the command line.  One boot a test."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pyvmm.cli.main import main
from tests.support.guest import IMAGE, KERNEL
from tests.support.patience import patient

pytestmark = pytest.mark.kvm


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One initramfs with the agent for all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def report(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYVMM_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "report.json"


def run(report: Path, *argv: str, boot_timeout_s: float = 60.0) -> tuple[int, dict[str, object]]:
    """``pyvmm test`` with our kernel and image: the exit status and the JSON."""
    status = main([
        "test", "--kernel", str(KERNEL), "--disk", f"{IMAGE},snapshot", "--json", str(report),
        "--boot-timeout", str(patient(boot_timeout_s)), *argv,
    ])
    found = json.loads(report.read_text())
    assert found["exit_status"] == status
    return status, found


def test_a_commands_streams_files_and_status(
    report: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """Its output is not UTF-8, and it leaves a daemon behind that holds its pipes."""
    source = report.parent / "in"
    source.write_bytes(bytes(range(256)))
    script = (
        "cat /tmp/in; (sleep 1000 &); echo $PWD $NAME >&2; dmesg | wc -l >/tmp/out; exit 7"
    )
    status, found = run(
        report, "--put", "in:/tmp/in", "--get", "/tmp/out:.", "--env", "NAME=value", "--cwd",
        "/proc", "--expect", "user space reached", "--junit", "r.xml", "--console-log", "log",
        "--", "sh", "-c", script,
    )
    out, err = capfdbinary.readouterr()
    assert out == bytes(range(256))
    assert err.startswith(b"/proc value\n")
    assert (status, found["verdict"], found["status"]) == (7, "failed", 7)
    assert int((report.parent / "out").read_text()) > 50
    assert "user space reached" in (report.parent / "log").read_text()
    names = [phase["name"] for phase in found["phases"]]  # type: ignore[attr-defined]
    assert names == ["start", "kernel", "user space", "agent", "command"]
    assert ElementTree.parse("r.xml").getroot()[0].get("failures") == "1"


@pytest.mark.parametrize(("argv", "status", "verdict", "line"), [
    (["--", "sh", "-c", "echo c >/proc/sysrq-trigger"], 121, "panic", "Kernel panic - not syncing"),
    (["--", "sh", "-c", "echo '<4>WARNING: CPU: 0 PID: 1 at x' >/dev/kmsg; sleep 1000"], 121,
     "warning", "WARNING: CPU: 0 PID: 1 at x"),
    (["--", "reboot", "-f"], 120, "ended", ""),
    (["--timeout", "1", "--", "sleep", "1000"], 124, "command-timeout", ""),
    (["--", "/no/such/program"], 127, "not-run", ""),
    (["--append", "root=/dev/vdz", "--agent", "image", "--", "true"], 121, "root",
     "VFS: Cannot open root device"),
], ids=["panic", "warning", "reboot", "timeout", "not found", "no root"])
def test_an_outcome_has_its_status_and_verdict(
    argv: list[str], status: int, verdict: str, line: str, report: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    got, found = run(report, *argv)
    err = capfd.readouterr().err
    assert (got, found["verdict"]) == (status, verdict), err
    assert line in str(found["line"])
    assert f"pyvmm: {verdict}: " in err
    assert err.endswith(f"pyvmm: exit status {status}\n")
    if line:
        before = found["before"]
        assert isinstance(before, list)
        assert len(before) == 40
        assert f"  > {found['line']}\n" in err
