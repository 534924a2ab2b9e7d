"""pyvmm beside its peers: every figure, one table, build/bench/results.json and a plot.

    python -m bench.run [--only KEYS] [--runs N] [--quick]

Runs of the contenders are taken in turn, the first of each does not count, and what is compared
are medians.  Figures that boot Linux are taken where KVM can: on this host, or else all together
in one lab, where only their ratios mean anything.
"""

from __future__ import annotations

import argparse
import compileall
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from bench import figures, peers, plot
from bench.figures import BenchError, Result, Sample
from bench.host import Host, scratch_parent
from bench.peers import PYVMM, Contender
from bench.process import ROOT, environment
from bench.rows import bare, boot, device, exits, guest_disk, ram, snapshot
from bench.suite import Suite

OUT = ROOT / "build" / "bench"
LAB_TIMEOUT_S = 5400
SECONDS, QUICK_SECONDS = 2.0, 0.3
Emit = Callable[[Sample], None]


def suites(contenders: dict[str, tuple[Contender, ...]]) -> tuple[Suite, ...]:
    """Every suite, in the order of the table."""
    ours = contenders["vmm"][0]
    daemons = [one for one in contenders["daemon"] if one.name == guest_disk.DAEMON]
    return (
        exits.suite("io_thread", "by the I/O thread", "<= 0.05"),
        exits.suite("at_exit", "at the exit", "<= 1.05"),
        guest_disk.SUITE,
        *(guest_disk.vhost_user_suite(daemon) for daemon in daemons),
        device.SUITE,
        bare.START_SUITE,
        boot.USER_SPACE_SUITE,
        boot.MEMORY_SUITE,
        bare.exits_suite(ours),
        ram.suite(ours),
        *snapshot.suites(ours),
    )


class Plan:
    """What to measure: the suites, their contenders, and which figures are wanted."""

    def __init__(
        self, contenders: dict[str, tuple[Contender, ...]], only: Sequence[str] = ()
    ) -> None:
        self._contenders = contenders
        self._all = suites(contenders)
        self._only = tuple(only)
        keys = [figure.key for suite in self._all for figure in suite.figures]
        for prefix in self._only:
            if not any(_selects(prefix, key) for key in keys):
                raise BenchError(f"--only {prefix}: the figures are {', '.join(keys)}")

    def suites(self, *, boots_linux: bool) -> list[Suite]:
        """Those with a figure wanted."""
        return [
            suite for suite in self._all
            if suite.boots_linux == boots_linux and self.wanted(suite)
        ]

    def wanted(self, suite: Suite) -> list[str]:
        """Keys of the suite's figures that were asked for."""
        return [
            figure.key for figure in suite.figures
            if not self._only or any(_selects(prefix, figure.key) for prefix in self._only)
        ]

    def contenders(self, suite: Suite) -> tuple[Contender, ...]:
        """Who takes part, ours first."""
        return suite.contenders or self._contenders[suite.kind]

    def results(self, samples: Iterable[Sample]) -> list[Result]:
        """A row for each figure wanted and each peer of it."""
        taken = list(samples)
        rows = []
        for suite in self._all:
            ours, *others = self.contenders(suite)
            wanted = self.wanted(suite)
            for figure in suite.figures:
                if figure.key in wanted:
                    rows += [
                        figures.judge(figure, ours.name, peer.name, taken) for peer in others
                    ]
        return rows


def _selects(prefix: str, key: str) -> bool:
    return key == prefix or key.startswith(f"{prefix}.")


def measure(
    plan: Plan, chosen: Iterable[Suite], host: Host, emit: Emit, *, runs: int, quick: bool = False
) -> None:
    """Take every sample of the ``chosen`` suites here; who fails once is not asked again.

    ``quick``: one sample each, which counts although nothing is warm.
    """
    for suite in chosen:
        wanted = plan.wanted(suite)
        failed: set[str] = set()
        count = 1 if quick else min(runs * suite.repeats, suite.max_samples)
        for run in range(-1 if suite.warm_up and not quick else 0, count):
            for contender in plan.contenders(suite):
                if contender.name in failed:
                    continue
                try:
                    readings = suite.sample(host, contender, wanted)
                except BenchError as error:
                    failed.add(contender.name)
                    for key in wanted:
                        emit(Sample(figure=key, contender=contender.name, error=str(error)))
                    continue
                for key, reading in readings.items():
                    emit(Sample(
                        figure=key, contender=contender.name, value=reading.value,
                        note=reading.note, warm_up=run < 0,
                    ))


def measure_in_lab(arguments: Sequence[str], emit: Emit) -> None:
    """Have this program take what boots Linux, inside the lab; its samples come line by line."""
    inside = [sys.executable, "-m", "bench.run", "--samples", *arguments]
    command = [str(PYVMM), "lab", "--timeout", str(LAB_TIMEOUT_S), "--", *inside]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env=environment(),
    ) as lab:
        if lab.stdout is None:
            raise BenchError("the lab has no output")
        for line in lab.stdout:
            try:
                emit(Sample.from_json(line))
            except ValueError:
                print(f"bench: lab: {line.rstrip()}", file=sys.stderr)
    if lab.returncode:
        print(f"bench: the lab ended with status {lab.returncode}", file=sys.stderr)


def kvm_boots_linux() -> bool:
    """Whether a stock kernel runs here."""
    done = subprocess.run(
        [str(PYVMM), "doctor", "--quiet"], capture_output=True, check=False, env=environment()
    )
    return done.returncode == 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(
        prog="python -m bench.run", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    p.add_argument("--only", metavar="KEY,...", default="",
                   help="figures, or groups of them: device, guest.read.d32 (--list has them all)")
    p.add_argument("--runs", metavar="N", type=int, default=5,
                   help="runs of each contender that count (default 5)")
    p.add_argument("--quick", action="store_true",
                   help="one short run of each, to see that all of it works")
    p.add_argument("--peers", metavar="FILE", type=Path, default=peers.PEERS_FILE,
                   help="who is measured (default bench/peers.toml)")
    p.add_argument("--out", metavar="DIR", type=Path, default=OUT,
                   help="where results.json and results.png go (default build/bench)")
    p.add_argument("--list", action="store_true", help="say what there is to measure, and end")
    p.add_argument("--samples", action="store_true",
                   help="only take what boots Linux, here, and print samples (used in the lab)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; 0 if every figure could be, 1 if some could not, 2 for bad options."""
    p = parser()
    args = p.parse_args(argv)
    if args.runs < 1:
        p.error("--runs: at least 1")
    only = [key for key in args.only.split(",") if key]
    try:
        plan = Plan(peers.load(args.peers), only)
    except BenchError as error:
        p.error(str(error))
    if args.list:
        for suite in (*plan.suites(boots_linux=True), *plan.suites(boots_linux=False)):
            for figure in suite.figures:
                if figure.key in plan.wanted(suite):
                    print(f"{figure.key:22}{figure.name}; target: {figure.target or 'none'}")
        return 0
    # As pip does where pyvmm is installed; this checkout may never have been run.
    compileall.compile_dir(ROOT / "pyvmm", quiet=2)
    with tempfile.TemporaryDirectory(prefix="pyvmm-bench-", dir=scratch_parent()) as folder:
        host = Host(Path(folder), QUICK_SECONDS if args.quick else SECONDS)
        if args.samples:
            measure(plan, plan.suites(boots_linux=True), host,
                    lambda sample: print(sample.to_json(), flush=True),
                    runs=args.runs, quick=args.quick)
            return 0
        log = Log()
        linux = plan.suites(boots_linux=True)
        measure(plan, plan.suites(boots_linux=False), host, log, runs=args.runs,
                quick=args.quick)
        if linux and kvm_boots_linux():
            measure(plan, linux, host, log, runs=args.runs, quick=args.quick)
        elif linux:
            print("bench: this host's KVM cannot boot Linux; using the lab", file=sys.stderr)
            passed = ["--runs", str(args.runs), "--peers", str(args.peers.resolve())]
            passed += ["--quick"] if args.quick else []
            passed += ["--only", args.only] if args.only else []
            measure_in_lab(passed, log)
    return conclude(plan.results(log.samples), args.out)


class Log:
    """Keeps every sample, and says it as it comes."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self._started_s = time.monotonic()

    def __call__(self, sample: Sample) -> None:
        self.samples.append(sample)
        said = sample.error if sample.value is None else figures.number(sample.value)
        kind = " (warm-up)" if sample.warm_up else ""
        print(f"bench: {time.monotonic() - self._started_s:5.0f} s  {sample.figure}  "
              f"{sample.contender}: {said}{kind}", file=sys.stderr, flush=True)


def conclude(results: Sequence[Result], out: Path) -> int:
    """Write and print the results; the exit status."""
    out.mkdir(parents=True, exist_ok=True)
    written = out / "results.json"
    written.write_text(figures.to_json(results))
    print(figures.to_table(results))
    print(f"wrote {written}")
    picture = out / "results.png"
    missing = plot.draw(results, picture)
    print(f"no plot: {missing}" if missing else f"wrote {picture}")
    return 1 if any(one.error for one in results) else 0


if __name__ == "__main__":
    # So that being ended leaves no machine running and no disk in memory.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
