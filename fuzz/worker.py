"""One process that fuzzes one target for some seconds: ``python -m fuzz.worker`` of ``campaign``.

With atheris its libFuzzer makes the cases, guided by the branches of pyvmm that they reach; without
it, and for targets that coverage does not guide, they are mutations of the corpus and noise.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import importlib.util
import json
import mmap
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from fuzz.mutate import Mutator
from fuzz.target import Target, committed_cases, load_target
from fuzz.watch import Finding, Watch

MOST_FINDINGS = 20
"""Different ones; then it is no use to go on."""
CASE_FILE = "case"
"""The case under way, behind its length in 4 bytes: what is left of a process that was killed."""
SUMMARY_FILE = "summary.json"
MOST_GROWN = 500
"""Cases of an earlier guided run that are mutated without atheris."""
NOISE_SHARE = 0.5
"""Of the cases of a structured target that are made without atheris."""


class Worker:
    """Runs cases of ``target`` until the time is over; ``folder`` takes what it leaves."""

    def __init__(
        self, name: str, target: Target, folder: Path, *, deadline_s: float, runs: int | None
    ) -> None:
        self._name = name
        self._target = target
        self._folder = folder
        self._watch = Watch(target)
        self._begun_s = time.monotonic()
        self._deadline_s = deadline_s
        self._most_runs = runs
        self._runs = 0
        self._found: dict[str, Path] = {}
        self._is_guided = False
        with (folder / CASE_FILE).open("w+b") as file:
            file.truncate(4 + target.max_bytes)
            self._case = mmap.mmap(file.fileno(), 4 + target.max_bytes)

    def one(self, case: bytes) -> None:
        """Run ``case`` and keep it if it finds something."""
        case = case[: self._target.max_bytes]
        self._case[: 4 + len(case)] = len(case).to_bytes(4, "little") + case
        finding = self._watch.run(case)
        self._runs += 1
        if finding is not None and finding.digest not in self._found:
            self._found[finding.digest] = save(self._folder, self._name, finding, case)

    @property
    def is_over(self) -> bool:
        """True once the time is over, the runs are done, or enough was found."""
        return (
            time.monotonic() >= self._deadline_s
            or (self._most_runs is not None and self._runs >= self._most_runs)
            or len(self._found) >= MOST_FINDINGS
        )

    def finish(self) -> NoReturn:
        """Leave the summary and end the process, whatever threads or libraries are still there."""
        with contextlib.suppress(Exception):  # after a finding it may be in any state
            self._target.close()
        summary = {
            "runs": self._runs,
            "seconds": time.monotonic() - self._begun_s,
            "slowest_s": self._watch.slowest_s,
            "guided": self._is_guided,
            "found": sorted(map(str, self._found.values())),
        }
        (self._folder / SUMMARY_FILE).write_text(json.dumps(summary))
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(1 if self._found else 0)

    def fuzz_plainly(self, seed: int) -> NoReturn:
        """Fuzz without coverage: the corpus as it is, then mutations of it, and noise."""
        target, rng = self._target, random.Random(seed)
        mutator = Mutator(rng, target.words, target.max_bytes)
        corpus = list(initial_cases(self._name, target))
        for case in corpus:
            self.one(case)
        grown = sorted((self._folder / "corpus").glob("*"))
        corpus += [path.read_bytes() for path in rng.sample(grown, min(MOST_GROWN, len(grown)))]
        while not self.is_over:
            if not corpus or (target.is_structured and rng.random() < NOISE_SHARE):
                self.one(mutator.noise())
            else:
                self.one(mutator.mutate(rng.choice(corpus), rng.choice(corpus)))
        self.finish()

    def fuzz_guided(
        self, atheris: Any, instrumented: contextlib.ExitStack, seed: int
    ) -> NoReturn:
        """Fuzz by libFuzzer; what it thinks worth keeping stays in ``corpus`` for the next time.

        ``instrumented`` is closed once the first cases have imported what is imported late.
        """
        self._is_guided = True
        target = self._target
        grown, seeds = self._folder / "corpus", self._folder / "seeds"
        for folder in (grown, seeds):
            folder.mkdir(exist_ok=True)
        for number, case in enumerate(initial_cases(self._name, target)):
            (seeds / f"{number:03}").write_bytes(case[: target.max_bytes])
            self.one(case)
        instrumented.close()
        words = []
        if target.words:
            path = self._folder / "words"
            path.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words))
            words.append(f"-dict={path}")

        def one(case: bytes) -> None:
            if self.is_over:
                self.finish()
            self.one(case)

        # Limits and ends are ours, so that both ways of fuzzing have the same.
        atheris.Setup(
            ["fuzz", str(grown), str(seeds), f"-seed={seed & 0x7FFF_FFFF}", *words,
             f"-max_len={target.max_bytes}", f"-len_control={0 if target.is_structured else 100}",
             "-timeout=0", "-rss_limit_mb=0", "-handle_abrt=0", "-handle_segv=0", "-verbosity=1",
             f"-artifact_prefix={self._folder}/"],
            one,
        )
        atheris.Fuzz()
        self.finish()


def initial_cases(name: str, target: Target) -> Iterator[bytes]:
    """Yield the target's own seeds, then the cases in the repository."""
    yield from target.seeds()
    for path in committed_cases(name):
        yield path.read_bytes()


def save(folder: Path, name: str, finding: Finding, case: bytes) -> Path:
    """Keep ``case`` and what it found; print both."""
    path = folder / f"crash-{finding.digest}"
    path.write_bytes(case)
    text = f"{finding.text}\nrepeat: python -m fuzz {name} {path}\n"
    path.with_suffix(".txt").write_text(text)
    print(f"--- {name}: found\n{text}", file=sys.stderr, flush=True)
    return path


def coverage_guide() -> Any:
    """Return the module atheris, None where it is not installed."""
    if importlib.util.find_spec("atheris") is None:
        return None
    return importlib.import_module("atheris")


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


def main() -> NoReturn:
    """Do what the arguments say; see ``campaign``."""
    begun_s = time.monotonic()
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--runs", type=int)
    parser.add_argument("--plain", action="store_true")
    arguments = parser.parse_args()
    faulthandler.enable()
    atheris = None if arguments.plain else coverage_guide()
    instrumented = contextlib.ExitStack()
    if atheris is not None:
        instrumented.enter_context(atheris.instrument_imports(include=["pyvmm"]))
    target = load_target(arguments.name)
    worker = Worker(
        arguments.name, target, arguments.folder,
        deadline_s=begun_s + arguments.seconds, runs=arguments.runs,
    )
    if atheris is not None and target.is_guided:
        worker.fuzz_guided(atheris, instrumented, arguments.seed)
    worker.fuzz_plainly(arguments.seed)


if __name__ == "__main__":
    main()
