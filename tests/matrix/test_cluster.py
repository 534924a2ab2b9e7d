"""Runs on a Dask cluster: a real scheduler and two workers, processes of this host."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.cli.matrix import matrix_main
from pyvmm.errors import ConfigError
from pyvmm.matrix import cluster as cluster_executor
from pyvmm.matrix.output import Output
from pyvmm.matrix.worker import MAX_FILE_BYTES, MAX_RUN_BYTES, brought_back
from tests.support.dask_cluster import Cluster, cluster
from tests.support.matrix_program import ended, matrix, start, until
from tests.support.stand_in_runs import stand_in


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster whose workers nobody kills."""
    with cluster(tmp_path_factory.mktemp("dask") / "cluster") as found:
        yield found


@pytest.fixture
def own_workers(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster of the test's own."""
    with cluster(tmp_path / "cluster") as found:
        yield found


def summary(folder: Path) -> list[dict[str, str]]:
    """Return the runs that ``matrix.json`` has."""
    runs: list[dict[str, str]] = json.loads((folder / "out" / "matrix.json").read_text())["runs"]
    return runs


@pytest.mark.filterwarnings("ignore")
def test_results_and_logs_come_back(workers: Cluster, tmp_path: Path) -> None:
    path = matrix(tmp_path, f"""
        good = ["status", "0"]
        bad = ["status", "3"]
        panic = ["panic"]
        long = ["log", "{MAX_FILE_BYTES + 1000}"]
        host = ["host", "kvm"]
        defect = ["defect", "x"]
    """)
    out = tmp_path / "out"
    words = [str(path), "--out", str(out), "--executor", f"dask={workers.address}"]
    assert matrix_main(words, stand_in) == 125
    runs = {run["name"].split("+")[-1]: run for run in summary(tmp_path)}
    assert {name: run["verdict"] for name, run in runs.items()} == {
        "good": "passed", "bad": "failed", "panic": "panic", "long": "passed",
        "host": "host-error", "defect": "host-error",
    }
    assert len({run["where"] for run in runs.values()}) == 2
    for name in runs:
        folder = out / "runs" / f"k+256M+1cpu+{name}"
        assert folder.joinpath("console.log").read_text().startswith("the console of ")
        assert folder.joinpath("result.json").exists()
    log = (out / "runs" / "k+256M+1cpu+long" / "stdout.log").read_bytes()
    assert b"[pyvmm: 1000 bytes are left out here]" in log
    assert len(log) < MAX_FILE_BYTES + 100
    assert workers.address in (out / "index.html").read_text()


@pytest.mark.filterwarnings("ignore")
def test_a_file_that_a_worker_has_not_is_named_with_the_worker(
    workers: Cluster, tmp_path: Path
) -> None:
    path = matrix(tmp_path, '[commands.c]\nrun = ["x"]\nput = ["a.ko:/tmp/"]')
    words = [str(path), "--executor", f"dask={workers.address}"]
    with pytest.raises(ConfigError, match=r"c.put: .*/a.ko: No such file .* on worker tcp"):
        matrix_main(words, stand_in)


def test_a_worker_killed_in_the_middle_costs_a_retry_not_a_result(
    own_workers: Cluster, tmp_path: Path
) -> None:
    path = matrix(tmp_path, f"""
        a = ["wait", "{tmp_path}/go"]
        b = ["status", "0"]
        c = ["status", "3"]
    """)
    process = start(
        str(path), "--out", str(tmp_path / "out"), "--executor", f"dask={own_workers.address}"
    )
    begun = tmp_path / "go.k+256M+1cpu+a"
    until(lambda: begun.exists() and begun.read_text() != "")
    # Only who has heard of the first try can say that there is a second one.
    until(lambda: len(list(tmp_path.glob("out/runs/*/result.json"))) == 2)
    victim = int(begun.read_text())
    begun.unlink()
    os.kill(victim, signal.SIGKILL)
    until(lambda: begun.exists() and begun.read_text() != "")
    assert int(begun.read_text()) != victim
    (tmp_path / "go").touch()
    status, out, error = ended(process)
    assert status == 3, out + error
    assert [run["verdict"] for run in summary(tmp_path)] == ["passed", "passed", "failed"]
    assert (tmp_path / "out" / "runs" / "k+256M+1cpu+a" / "console.log").exists()
    assert "pyvmm: k+256M+1cpu+a begins again, on tcp://" in error


def test_an_interrupt_ends_the_runs_on_the_workers_and_brings_their_logs(
    own_workers: Cluster, tmp_path: Path
) -> None:
    commands = "\n".join(f'{name} = ["wait", "{tmp_path}/go"]' for name in "abc")
    process = start(
        str(matrix(tmp_path, commands)), "--out", str(tmp_path / "out"),
        "--executor", f"dask={own_workers.address}",
    )
    until(lambda: len(list(tmp_path.glob("go.k+*"))) == 2)
    process.send_signal(signal.SIGINT)
    status, out, error = ended(process)
    assert status == 130, out + error
    assert len(list(tmp_path.glob("go.*.ended"))) == 2
    verdicts = sorted(run["verdict"] for run in summary(tmp_path))
    assert verdicts == ["interrupted", "interrupted", "not-started"]
    assert len(list(tmp_path.glob("out/runs/*/console.log"))) == 2


def test_runs_end_when_whoever_wants_them_is_killed(own_workers: Cluster, tmp_path: Path) -> None:
    process = start(
        str(matrix(tmp_path, f'a = ["wait", "{tmp_path}/go"]')), "--out", str(tmp_path / "out"),
        "--executor", f"dask={own_workers.address}",
    )
    until(lambda: bool(list(tmp_path.glob("go.k+*"))))
    process.kill()
    ended(process)
    until(lambda: bool(list(tmp_path.glob("go.*.ended"))))


def test_a_scheduler_that_goes_away_is_said_and_the_report_is_written(
    own_workers: Cluster, tmp_path: Path
) -> None:
    process = start(
        str(matrix(tmp_path, f'a = ["wait", "{tmp_path}/go"]')), "--out", str(tmp_path / "out"),
        "--executor", f"dask={own_workers.address}",
    )
    until(lambda: bool(list(tmp_path.glob("go.k+*"))))
    own_workers.scheduler.kill()
    status, out, error = ended(process)
    assert status == 125, out + error
    assert "the scheduler has gone" in out
    assert "Traceback" not in error
    (run,) = summary(tmp_path)
    assert "the scheduler has gone" in run["message"]


def test_without_dask_the_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "pyvmm.matrix.cluster")
    monkeypatch.setitem(sys.modules, "distributed", None)
    path = matrix(tmp_path, 'a = ["status", "0"]')
    with pytest.raises(ConfigError, match=r"needs Dask: pip install 'pyvmm\[dask\]'"):
        matrix_main([str(path), "--executor", "dask=tcp://x:1"], stand_in)


@pytest.mark.filterwarnings("ignore")
def test_nobody_at_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_executor, "CONNECT_S", 0.5)
    words = [str(matrix(tmp_path, 'a = ["status", "0"]')), "--out", str(tmp_path / "out")]
    for address in ("tcp://127.0.0.1:1", "nonsense://x", "127.0.0.1:port"):
        with pytest.raises(ConfigError, match=f"--executor dask={address}: no Dask scheduler ans"):
            matrix_main([*words, "--executor", f"dask={address}"], stand_in)
    assert not (tmp_path / "out").exists()


def test_a_worker_writes_nowhere_but_in_its_run(tmp_path: Path) -> None:
    output = Output(str(tmp_path / "out"))
    output.prepare()
    output.save_files("r", {"a": b"1", "files/b": b"2", "../x": b"3", str(tmp_path / "y"): b"4",
                            "files/../../z": b"5"})
    found = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert found == [tmp_path / "out" / name
                     for name in ("matrix.json", "runs/r/a", "runs/r/files/b")]
    assert len(output.problems) == 3


def test_what_comes_back_is_bounded_and_only_files(tmp_path: Path) -> None:
    (tmp_path / "files" / "sub").mkdir(parents=True)
    (tmp_path / "files" / "sub" / "a").write_text("x")
    (tmp_path / "files" / "link").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "files" / "fifo")
    with (tmp_path / "files" / "huge").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    files, problems = brought_back(str(tmp_path))
    assert files == {"files/sub/a": b"x"}
    assert problems == [
        "files/huge: is not brought back from the worker: the limit is 16M a file, 64M a run"
    ]
    for number in range(5):
        with (tmp_path / "files" / f"n{number}").open("wb") as file:
            file.truncate(MAX_FILE_BYTES)
    files, problems = brought_back(str(tmp_path))
    assert sum(map(len, files.values())) <= MAX_RUN_BYTES
    assert len(problems) == 3  # huge, n4, sub/a
