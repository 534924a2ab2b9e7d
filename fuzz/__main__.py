"""``python -m fuzz``: fuzz, or run single cases again.  README.md beside this file says more."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from fuzz.campaign import Campaign, table
from fuzz.target import about, is_target, load_target, target_names
from fuzz.watch import Watch, minimise
from fuzz.worker import coverage_guide
from pyvmm.numerals import decimal_number, whole_number

FOUND = 1
OUT = Path("build/fuzz")
_MINIMISE_S = 60.0
_MAX_S = 366 * 86400.0
_MAX_COUNT = 1_000_000_000


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 if nothing was found, 1 if something was, 2 for a mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m fuzz",
        description="Fuzz what reads untrusted bytes. A word that names no target is a file: a "
                    "case of the one target named before it, which is run once.",
    )
    parser.add_argument("words", nargs="*", metavar="TARGET|FILE",
                        help="all targets if there is none")
    parser.add_argument("--seconds", type=_seconds, default=60.0,
                        help="for all targets together (default: 60)")
    parser.add_argument("--runs", type=_count, help="stop a target after so many cases")
    parser.add_argument("--seed", type=int, help="of the random numbers (default: another one)")
    parser.add_argument("--jobs", type=_count, default=2, help="processes at a time (default: 2)")
    parser.add_argument("--plain", action="store_true", help="do not use atheris")
    parser.add_argument("--out", type=Path, default=OUT, help=f"default: {OUT}")
    parser.add_argument("--minimise", action="store_true",
                        help="make FILE as short as it can be, still finding the same")
    parser.add_argument("--list", action="store_true", help="say what targets there are")
    options = parser.parse_args(argv)
    if options.list:
        print("\n".join(f"{name:16} {about(name)}" for name in target_names()))
        return 0
    names = [word for word in options.words if is_target(word)]
    files = [Path(word) for word in options.words if not is_target(word)]
    if unknown := [str(file) for file in files if not file.is_file()]:
        parser.error(f"{', '.join(unknown)}: neither a target (--list) nor a file")
    if files:
        if len(names) != 1:
            parser.error("a file is a case of one target: name it before the file")
        return _repeat(names[0], files, minimised=options.minimise)
    seed = options.seed if options.seed is not None else random.SystemRandom().getrandbits(31)
    guide = "without atheris" if options.plain or coverage_guide() is None else "with atheris"
    print(f"fuzzing {guide}, --seed {seed}", flush=True)
    results = Campaign(
        names or target_names(), options.out, seconds=options.seconds, seed=seed,
        jobs=options.jobs, runs=options.runs, plain=options.plain,
    ).run()
    print(table(results))
    found = [path for result in results for path in result.found]
    for path in found:
        print(f"found: {path} ({path}.txt)")
    return FOUND if found else 0


def _seconds(text: str) -> float:
    """Return ``text`` as a time, for argparse: above 0, at most a year."""
    seconds = decimal_number(text, 0, _MAX_S)
    if not seconds:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return seconds


def _count(text: str) -> int:
    """Return ``text`` as a number of things, for argparse: 1 at least."""
    count = whole_number(text, 1, _MAX_COUNT)
    if count is None:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 to {_MAX_COUNT}")
    return count


def _repeat(name: str, files: Sequence[Path], *, minimised: bool) -> int:
    """Run ``files`` as cases of target ``name`` in this process."""
    target = load_target(name)
    watch = Watch(target)
    status = 0
    for file in files:
        case = file.read_bytes()
        finding = watch.run(case)
        print(f"{file}: {'nothing' if finding is None else finding.text}")
        if finding is None:
            continue
        status = FOUND
        if minimised:
            smaller = minimise(watch.run, case, seconds=_MINIMISE_S)
            path = file.with_name(f"{file.name}.min")
            path.write_bytes(smaller)
            print(f"{path}: {len(smaller)} bytes instead of {len(case)}")
    target.close()
    return status


if __name__ == "__main__":
    sys.exit(main())
