"""``python -m soak``: do what is left of the parts, and report.  docs/reliability.md says more."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import FrameType

from pyvmm.numerals import whole_number
from soak import report, results
from soak.errors import PartError, TrialError
from soak.journal import BusyError, Journal
from soak.part import Part, Work
from soak.parts import NAMES, load
from soak.processes import (
    ROOT,
    adopt_orphans,
    end_children,
    left_in,
    pyvmm,
    wait_until_alone,
)

OUT = ROOT / "build" / "soak"
PAGE = ROOT / "docs" / "reliability.md"
SCRATCH = Path("/dev/shm")
FOUND, MISTAKE, INTERRUPTED = 1, 2, 130
_MOST = 1_000_000_000
_PREFIX = "pyvmm-soak-"


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 if all is well, 1 if a trial failed, 130 if it was interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m soak",
        description="Do what is left of the parts, in order, and write a report. Ctrl-C stops it; "
                    "the same command goes on.",
    )
    parser.add_argument("words", nargs="*", metavar="PART[=SIZE]",
                        help="parts, with another size than the usual one (default: all)")
    parser.add_argument("--jobs", type=_count, default=2, help="trials at a time (default: 2)")
    parser.add_argument("--out", type=Path, default=OUT, help="state and report")
    parser.add_argument("--trial", type=_count, help="only that trial of PART, done or not")
    parser.add_argument("--results", type=Path, default=results.RESULTS,
                        help="what was published: those trials are done "
                             f"(default: {results.RESULTS.relative_to(ROOT)})")
    parser.add_argument("--fresh", action="store_true",
                        help="begin the parts anew, whatever was done and published")
    parser.add_argument("--list", action="store_true", help="say what parts there are")
    parser.add_argument("--publish", action="store_true",
                        help=f"add what was done to --results, and put the totals into "
                             f"{PAGE.relative_to(ROOT)}")
    parser.add_argument("--here", action="store_true",
                        help="never in the lab (used by the soak itself)")
    options = parser.parse_args(argv)
    if options.list:
        for part in map(load, NAMES):
            print(f"{part.name:12} {part.size:6} {part.things:22} {part.about}")
        return 0
    if options.publish:
        _publish(options.out, options.results)
        return 0
    try:
        chosen = _chosen(options.words)
    except ValueError as error:
        parser.error(str(error))
    if options.trial is not None and len(chosen) != 1:
        parser.error("--trial: name its part")
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    adopt_orphans()
    failures = 0
    try:
        for part, size in chosen:
            failures += _soak(part, size, options)
    except KeyboardInterrupt:
        say("interrupted; the same command goes on")
        return INTERRUPTED
    except BusyError as error:
        say(str(error))
        return MISTAKE
    finally:
        if not options.here:
            ours = [part for part, _ in chosen if part.name not in NAMES]
            report.write(_reports([*map(load, NAMES), *ours], options.out), options.out)
    if not options.here:
        print(report.page(_reports([part for part, _ in chosen], options.out)))
    return FOUND if failures else 0


def say(line: str) -> None:
    """Print a line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _chosen(words: Sequence[str]) -> list[tuple[Part, int]]:
    """Return the parts that ``words`` name, with their sizes; ValueError."""
    found = []
    for word in words or NAMES:
        name, has_size, text = word.partition("=")
        if name not in NAMES and not name.startswith("tests."):
            raise ValueError(f"{name}: none of {', '.join(NAMES)}")
        part = load(name)
        size = whole_number(text, 1, _MOST) if has_size else part.size
        if size is None:
            raise ValueError(f"{word}: the size must be a whole number from 1 on")
        found.append((part, size))
    return found


def _count(text: str) -> int:
    number = whole_number(text, 0, _MOST)
    if number is None:
        raise argparse.ArgumentTypeError(f"{text} is no whole number")
    return number


def _reports(parts: Iterable[Part], out: Path) -> list[results.Report]:
    """Return those of the ``parts`` that have run here."""
    found = (results.report_of(part, results.runs_of(part, _journal(out, part))) for part in parts)
    return [one for one in found if one is not None]


def _publish(out: Path, kept: Path) -> None:
    """Add the runs in ``out`` to the file ``kept``, and put the totals of that into the page."""
    parts = [load(name) for name in NAMES]
    runs = results.add(
        [run for part in parts for run in results.runs_of(part, _journal(out, part))], kept
    )
    found = (results.report_of(part, runs) for part in parts)
    report.publish([one for one in found if one is not None], PAGE)


def _journal(out: Path, part: Part) -> Path:
    return out / f"{part.name}.jsonl"


def _soak(part: Part, size: int, options: argparse.Namespace) -> int:
    """Do what is left of ``part``, here or in the lab; return how many trials have failed."""
    path = _journal(options.out, part)
    if options.fresh:
        path.unlink(missing_ok=True)
        shutil.rmtree(options.out / part.name, ignore_errors=True)
    # In the lab a lock would not be seen from outside: the soak outside has it.
    with Journal(path, is_locked=not options.here) as journal:
        if options.fresh:
            journal.add({"fresh": True})
        work = Work(
            part=part, journal=journal, size=size, folder=options.out / part.name,
            scratch=Path(), say=say, jobs=max(1, options.jobs), only=options.trial,
            published=frozenset() if journal.is_fresh
            else results.trials_of(results.read(options.results), part.name),
        )
        if work.left():
            work.folder.mkdir(parents=True, exist_ok=True)
            if part.linux and not options.here and not _runs_linux():
                return _in_lab(part, size, options)
            if options.trial is None:
                journal.add(report.this_leg(size))
            place = SCRATCH if SCRATCH.is_dir() else Path(tempfile.gettempdir())
            _remove_leftovers(place)
            prefix = f"{_PREFIX}{os.getpid()}-"
            with tempfile.TemporaryDirectory(prefix=prefix, dir=place) as scratch:
                work.scratch = Path(scratch)
                try:
                    part.run(work)
                except (PartError, subprocess.SubprocessError) as error:
                    say(f"{part.name}: {error}")
                    return 1
                _leave_nothing(work, scratch)
        say(work.progress(time.monotonic()))
        return work.failures if options.trial is not None else journal.failures


def _remove_leftovers(place: Path) -> None:
    """Remove the scratch folders of soaks that were killed."""
    for folder in place.glob(f"{_PREFIX}*-*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if not Path(f"/proc/{pid}").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _leave_nothing(work: Work, scratch: str) -> None:
    """Note what the part has left behind: processes, files, sockets."""
    try:
        wait_until_alone()
        left = left_in(scratch)
    except TrialError as error:
        left = str(error)
        end_children()
    if left:
        work.leave(left)


def _runs_linux() -> bool:
    return subprocess.run(pyvmm("doctor", "--quiet"), check=False).returncode == 0


def _in_lab(part: Part, size: int, options: argparse.Namespace) -> int:
    """Do the same in the lab, which writes the journal here as it goes."""
    options.out.mkdir(parents=True, exist_ok=True)
    words = ["--here", f"{part.name}={size}", "--jobs", "1", "--out", str(options.out.resolve()),
             "--results", str(options.results.resolve())]
    if options.trial is not None:
        words += ["--trial", str(options.trial)]
    lab = pyvmm("lab", "--memory", "4G", "--rw", options.out.resolve(), "--")
    done = subprocess.run(
        [*lab, sys.executable, "-m", "soak", *words], cwd=ROOT, check=False,
        env={**os.environ, report.COMMIT: report.commit()},
    )
    if done.returncode in (INTERRUPTED, 128 + signal.SIGINT, 128 + signal.SIGTERM):
        raise KeyboardInterrupt
    if done.returncode not in (0, FOUND):
        say(f"{part.name}: the lab ended with status {done.returncode}")
        return 1
    return int(done.returncode == FOUND)


if __name__ == "__main__":
    sys.exit(main())
