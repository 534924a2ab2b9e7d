"""``pyvmm matrix``: many boot tests from one file, several at a time."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Sequence

from pyvmm.cli.descriptors import allow_many_descriptors
from pyvmm.cli.parse import parse_disk
from pyvmm.errors import ConfigError, HostError
from pyvmm.lab import INSIDE
from pyvmm.matrix.display import progress_for
from pyvmm.matrix.executor import Executor, Runner
from pyvmm.matrix.expand import chosen, runs_of
from pyvmm.matrix.jobs import MAX_JOBS, default_jobs, largest_memory
from pyvmm.matrix.local import LocalExecutor
from pyvmm.matrix.needs import Need, kvm_problems, needs_of, refuse_missing
from pyvmm.matrix.one_run import run_one
from pyvmm.matrix.output import Output, check_place
from pyvmm.matrix.plan import read_plan
from pyvmm.matrix.reports import Report, last_lines, write_reports
from pyvmm.matrix.results import RunResult, worst_status
from pyvmm.matrix.runs import Run
from pyvmm.matrix.session import Session
from pyvmm.numerals import shown, whole_number
from pyvmm.report import say, show
from pyvmm.startup.commands import Command, Option, Word
from pyvmm.startup.options import parse_options
from pyvmm.testing.annotations import annotation, defused, is_wanted
from pyvmm.testing.verdicts import HOST_STATUS

DEFAULT_OUT = "pyvmm-matrix"
_DASK = "dask="
LAB_BYTES = 1 << 30
"""The memory that the lab itself, our processes and the logs need."""

COMMAND = Command(
    name="matrix",
    usage="pyvmm matrix [OPTIONS] FILE",
    description="""\
Boot every combination of the kernels, disks, memory sizes, processors and commands in FILE, a
TOML file (docs/matrix.md), several at a time, and report how each ended.  Every run has its own
guest, and its own snapshot of each disk.
""",
    epilog="""\
exit status:
  0 if every run is ok, else that of the worst run.  From the worst on: 125 a run that could not
  be run, 123 internal error, 122 triple fault, 121 panic, oops, warning or lockup, 120 the guest
  ended without a report, 124 timeout, then the commands' own, the highest first.
  128+n if signal n ended the matrix (Ctrl-C: 130): all guests end, and the reports tell of the
  runs that were done.  A second Ctrl-C does not wait for guests.

examples:
  pyvmm matrix boot.toml
  pyvmm matrix --list boot.toml
  pyvmm matrix --jobs 4 --only 'debian+*' --out logs boot.toml
  pyvmm matrix --executor dask=tcp://10.0.0.1:8786 boot.toml
""",
    options=(
        Option(name="--jobs", metavar="N",
               help="so many guests at a time (default: as many as processors and memory allow)"),
        Option(name="--executor", metavar="WHERE", default="local",
               help="local: on this host; dask=ADDRESS: on the workers of a Dask cluster, which "
               "needs pyvmm[dask] (default local)"),
        Option(name="--out", metavar="DIR", default=DEFAULT_OUT,
               help=f"the directory for the logs of each run, index.html, junit.xml and "
               f"matrix.json (default {DEFAULT_OUT}); an earlier matrix in it is replaced"),
        Option(name="--junit", metavar="FILE", help="write the JUnit XML to FILE instead"),
        Option(name="--html", metavar="FILE", help="write the page to FILE instead"),
        Option(name="--only", metavar="PATTERN", many=True,
               help="only the runs whose names match PATTERN, as 'debian+*'; repeat for several"),
        Option(name="--list", help="print the names of the runs and do nothing else"),
        Option(name="--verbose", short="-v", help="-vv: tracebacks of errors"),
    ),
    words=(Word(name="file", metavar="FILE", help="the matrix"),),
)


def matrix_main(argv: list[str], runner: Runner = run_one) -> int:
    """Run one matrix; return the exit status.  ConfigError, HostError before the first boot.

    ``runner`` does each run.
    """
    args = parse_options(COMMAND, argv)
    plan = read_plan(args.file, parse_disk)
    runs = chosen(runs_of(plan), args.only)
    if args.list:
        for run in runs:
            show(run.name)
        return 0
    check_place("--junit", args.junit)
    check_place("--html", args.html)
    needs = needs_of(plan, runs)
    output = Output(args.out)
    executor, where = _executor(args.executor, _jobs(args.jobs), runs, needs, output, runner, argv)
    output.prepare()
    allow_many_descriptors()
    began_s, start_s = time.time(), time.monotonic()
    progress = progress_for(len(runs))
    session = Session(runs, executor, progress, output.save_result)
    try:
        results = session.run()
    finally:
        progress.close()
    report = Report(
        file=args.file, runs=runs, results=results, began_s=began_s,
        seconds=time.monotonic() - start_s, where=where,
        exit_status=_exit_status(session, results, output), note=_note(session),
    )
    write_reports(report, output, junit=args.junit or "", html=args.html or "")
    return _tell(report, session, output, args.html or "")


def _tell(report: Report, session: Session, output: Output, html: str) -> int:
    """Print how the matrix ended; return the exit status."""
    on_github = is_wanted(os.environ)
    for result in report.results:
        if on_github and not result.is_ok:
            show(annotation(
                "error", result.message or result.line or result.verdict,
                title=f"{result.name}: {result.verdict}",
            ))
    for line in last_lines(report, output, html):
        show(defused(line) if on_github else line)
    problems = [*output.problems, *(one for result in report.results for one in result.problems)]
    for problem in problems[:10]:
        say(problem)
    if len(problems) > 10:
        say(f"{len(problems) - 10} more files could not be written")
    return report.exit_status or _exit_status(session, report.results, output)


def _exit_status(session: Session, results: Sequence[RunResult], output: Output) -> int:
    if session.signal:
        return 128 + session.signal
    if session.problem:
        return HOST_STATUS
    is_complete = not (output.problems or any(result.problems for result in results))
    return worst_status(results) or (0 if is_complete else HOST_STATUS)


def _note(session: Session) -> str:
    if session.signal:
        return f"ended by signal {session.signal} before all runs were done"
    return session.problem


def _remedy(argv: Sequence[str], runs: Sequence[Run], jobs: int, out: str) -> str:
    """Return the command line that does the same in the lab, unless this is the lab."""
    if os.environ.get(INSIDE):
        return ""
    memory = -(-(jobs * largest_memory(runs) + LAB_BYTES) // (1 << 30))
    writable = os.path.dirname(os.path.abspath(out))
    return "; run it as: " + shlex.join(
        ["pyvmm", "lab", "--memory", f"{memory}G", "--rw", writable, "--", "pyvmm", "matrix", *argv]
    )


def _jobs(text: str | None) -> int | None:
    if text is None:
        return None
    jobs = whole_number(text, 1, MAX_JOBS)
    if jobs is None:
        raise ConfigError(f"--jobs {shown(text)}", f"must be a number from 1 to {MAX_JOBS}")
    return jobs


def _executor(
    where: str, jobs: int | None, runs: Sequence[Run], needs: Sequence[Need], output: Output,
    runner: Runner, argv: Sequence[str],
) -> tuple[Executor, str]:
    """Return the executor, and where it does the runs in words; all files are there."""
    if where == "local":
        refuse_missing(needs)
        count = min(jobs or default_jobs(runs), len(runs))
        for kernel, problem in kvm_problems(needs):
            raise HostError(f"{kernel}: {problem}{_remedy(argv, runs, count, output.path)}")
        return LocalExecutor(runner, count, output.folder_of), f"{count} at a time"
    address = where.removeprefix(_DASK)
    if address == where or not address:
        raise ConfigError(
            f"--executor {shown(where)}", "must be local or dask=ADDRESS, as dask=tcp://HOST:8786"
        )
    if jobs is not None:
        raise ConfigError("--jobs", "is for --executor local; each worker of a Dask cluster has "
                          "its own number (dask worker --nthreads N)")
    try:
        from pyvmm.matrix.cluster import ClusterExecutor
    except ImportError as error:
        raise ConfigError(
            f"--executor {shown(where)}", f"needs Dask: pip install 'pyvmm[dask]' ({error})"
        ) from error
    executor = ClusterExecutor(address, runner, output.save_files)
    executor.check(needs)
    return executor, f"on {address}"
