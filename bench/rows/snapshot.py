"""Going on from a snapshot beside booting the same bare guest: 128 MiB, one disk, this host's KVM.

Moments are the guest's first exit: KVM_RUN's return (bench/c/first_run.c) for whole processes, the
guest's mark at the boot timer within one.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from bench.figures import BenchError, Figure, Limit
from bench.host import Host
from bench.peers import PYVMM, Contender
from bench.process import Watched
from bench.rows.bare import until_first_run
from bench.suite import Reading, Suite
from pyvmm.config import DiskConfig, RunConfig
from pyvmm.machine import Machine, build
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.snapshot.capture import take
from pyvmm.snapshot.checkpoints import checkpoints_of
from pyvmm.snapshot.opening import open_snapshot
from pyvmm.snapshot.snapshot import Snapshot
from pyvmm.storage.open import DiskSource

MIB = 1 << 20
MEMORY_BYTES = 128 * MIB
LIVE_MEMORY_BYTES, TOUCHED_BYTES = 1024 * MIB, 256 * MIB
TIMEOUT_S = 60.0
POLL_S = 0.0002

RESTORE = Figure(
    key="snapshot.restore", name="process start to first exit: pyvmm restore", unit="ms",
    ratio=Limit("<= 0.8"),
)
REWIND = Figure(
    key="snapshot.rewind", name="first exit of a machine that is rewound", unit="ms",
    ours=Limit("<= 2"),
)
CLONE = Figure(
    key="snapshot.clone", name="first exit of a clone in a warm process", unit="ms",
    ours=Limit("<= 8"),
)
SHELL = Figure(
    key="snapshot.shell", name="first exit of a clone from a prepared shell", unit="ms",
    ours=Limit("<= 3"),
)
PAUSE = Figure(
    key="snapshot.pause", name="pause for a live snapshot, 1 GiB RAM, 256 MiB touched", unit="ms",
    ours=Limit("<= 10"),
)
RUN = Contender(name="pyvmm run")
BUILT = Contender(name="a boot in the same process")
AT_REST = Contender(name="one that is not live")


def _disk(host: Host) -> str:
    return f"{host.disk()},snapshot"


def _run_words(host: Host) -> list[str]:
    return [
        str(PYVMM), "run", "--kernel", str(host.guest("warm")), "--memory",
        f"{MEMORY_BYTES // MIB}M", "--console", "none", "--disk", _disk(host),
    ]


def warm_directory(host: Host) -> Path:
    """The snapshot of the bare guest, made once."""
    directory = host.scratch / "warm"
    if not directory.exists():
        words = [*_run_words(host), "--snapshot", str(directory), "--snapshot-exit"]
        with Watched(words, timeout_s=TIMEOUT_S) as process:
            process.finish()
            if process.wait():
                raise process.failure("made no snapshot")
    return directory


def sample_restore(
    host: Host, contender: Contender, wanted: Collection[str]
) -> Mapping[str, Reading]:
    """From before the process is there to the first exit: of a clone, of a boot."""
    words = _run_words(host)
    if contender is not RUN:
        words = [str(PYVMM), "restore", "--console", "none", str(warm_directory(host))]
    # The guest goes on for ever, and is ended.
    words += ["--timeout", "0.5"]
    return {RESTORE.key: Reading(until_first_run(host, words) * 1e3)}


def _config(host: Host, memory_bytes: int = MEMORY_BYTES) -> RunConfig:
    source = DiskSource(location=str(host.disk()), snapshot=True)
    return RunConfig(
        kernel=host.guest("warm"), memory_bytes=memory_bytes, console="none",
        disks=(DiskConfig(source=source),),
    )


def _report(line: str) -> None:
    raise BenchError(line)


def _ms_to_exit(began_s: float, machine: Machine) -> Reading:
    """Milliseconds from ``began_s`` to the guest's first mark since then."""
    until_s = began_s + TIMEOUT_S
    while not (machine.marks and machine.marks[-1].at_s > began_s):
        if now_s() > until_s:
            raise BenchError("the guest marks nothing")
        time.sleep(POLL_S)
    return Reading((machine.marks[-1].at_s - began_s) * 1e3)


def now_s() -> float:
    """The clock of the boot timer's marks."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@contextlib.contextmanager
def _started(make: Callable[[], Machine]) -> Iterator[tuple[Machine, float]]:
    """A machine that was made and started, and the time before that.  Its guest spins: it is ended.
    """
    began_s = now_s()
    with make() as machine:
        try:
            machine.start()
            yield machine, began_s
        finally:
            machine.stop(Outcome(Kind.STOPPED))


def sample_clones(
    host: Host, contender: Contender, wanted: Collection[str]
) -> Mapping[str, Reading]:
    """A rewind, a clone, and a clone of a shell; or as often a machine that is built and booted."""
    if contender is BUILT:
        with _started(lambda: build(_config(host), report=_report)) as (machine, began_s):
            reading = _ms_to_exit(began_s, machine)
        return dict.fromkeys((REWIND.key, CLONE.key, SHELL.key), reading)
    with contextlib.closing(open_snapshot(warm_directory(host), report=_report)) as snapshot:
        return _clone_figures(snapshot)


def _clone_figures(snapshot: Snapshot) -> Mapping[str, Reading]:
    readings = {}
    with _started(lambda: snapshot.clone(report=_report)) as (machine, began_s):
        readings[CLONE.key] = _ms_to_exit(began_s, machine)
        began_s = now_s()
        checkpoints_of(machine).rewind()
        readings[REWIND.key] = _ms_to_exit(began_s, machine)
    shell = snapshot.build_shell(report=_report)
    with _started(shell.become_clone) as (machine, began_s):
        readings[SHELL.key] = _ms_to_exit(began_s, machine)
    return readings


def sample_pause(
    host: Host, contender: Contender, wanted: Collection[str]
) -> Mapping[str, Reading]:
    """From the wish that the guest stands still until it is let go."""
    directory = host.scratch / "live"
    with _started(lambda: build(_config(host, LIVE_MEMORY_BYTES), report=_report)) as (machine, at):
        _ms_to_exit(at, machine)
        view = machine.board.memory.regions[0].view
        for offset in range(256 * MIB, 256 * MIB + TOUCHED_BYTES, 4096):
            view[offset] = 1
        held: list[float] = []
        runner = machine.runner
        hold, let_go = runner.hold, runner.let_go

        def timed_hold(call: str, timeout_s: float | None = None) -> bool:
            held.append(now_s())
            return hold(call, timeout_s)

        def timed_let_go() -> None:
            let_go()
            held.append(now_s())

        runner.hold, runner.let_go = timed_hold, timed_let_go  # type: ignore[method-assign]
        try:
            take(machine, directory, live=contender is not AT_REST).close()
        finally:
            _remove(directory)
    return {PAUSE.key: Reading((held[1] - held[0]) * 1e3)}


def _remove(directory: Path) -> None:
    if directory.exists():
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()


def suites(pyvmm: Contender) -> tuple[Suite, ...]:
    """All of them."""
    return (
        Suite(figures=(RESTORE,), sample=sample_restore, contenders=(pyvmm, RUN),
              boots_linux=False, repeats=10),
        Suite(figures=(REWIND, CLONE, SHELL), sample=sample_clones, contenders=(pyvmm, BUILT),
              boots_linux=False, repeats=10),
        Suite(figures=(PAUSE,), sample=sample_pause, contenders=(pyvmm, AT_REST),
              boots_linux=False, max_samples=5),
    )
