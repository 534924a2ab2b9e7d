"""fio with verification on every kind of disk, for as long as asked, and the VM's resources.

The VM is sampled every ten seconds of its work.  Its resident memory, with and without the guest's
RAM, its threads, descriptors and mappings must not grow by 1 %: the medians of the first and the
last quarter of the longest stretch are compared, without its first tenth.  A soak that is
interrupted goes on with another VM, so its stretches are shorter.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from soak.errors import TrialError
from soak.fio_guest import CHECKED, FioGuest, running
from soak.part import Figures, Part, Work, remove
from soak.usage import drift_figures, growth, longest

SLICE_S = 10
LEAST_SAMPLES = 60
"""Ten minutes: below that a drift says nothing."""


def run(work: Work) -> None:
    """Do what is left, in one VM."""
    left = work.left()
    folder = work.scratch / "vm"
    folder.mkdir()
    try:
        with running(folder, seconds=len(left) * SLICE_S) as guest:
            guest.wait_until_works()
            guest.server.kill()
            _watch(work, guest, left)
            said = guest.finish()
        work.say(f"fio: {dict(guest.counts)}; pyvmm said: {said.strip() or 'nothing'}")
        if found := growth(longest(work.journal.trials, LEAST_SAMPLES)):
            work.leave(found)
    except (TrialError, OSError) as error:  # OSError: of a process that has just ended
        kept = work.keep(f"stretch-{work.journal.legs}", folder, error)
        work.leave(f"{error} ({kept})")
    remove(folder)


def _watch(work: Work, guest: FioGuest, left: Sequence[int]) -> None:
    """Sample the VM once a slice."""
    before: Counter[str] = Counter()
    for number in left:
        began_s = time.monotonic()
        time.sleep(SLICE_S)
        guest.listen()
        guest.ask_status()
        passes = {name: guest.counts[f"passed {name}"] for name in CHECKED}
        work.ended(number, began_s, {
            "stretch": work.journal.legs, **guest.usage().figures(),
            "passes": {name: count - before[name] for name, count in passes.items()},
            "faults": guest.counts["failed vdf"] - before["faults"],
        })
        before = Counter({**passes, "faults": guest.counts["failed vdf"]})


def summary(trials: Sequence[Figures]) -> Figures:
    """Return the figures for the report."""
    passes: Counter[str] = Counter()
    for line in trials:
        passes.update(line["passes"])
    samples = longest(trials, LEAST_SAMPLES)
    return {
        "passes without a wrong byte": dict(passes),
        "requests that had to fail, and did": 2 * sum(line["faults"] for line in trials),
        "longest stretch": f"{len(samples) * SLICE_S} s", **drift_figures(samples),
    }


PART = Part(
    name="fio", about="fio with verification on 4 vCPUs and every kind of disk",
    things="s", size=7200, unit=SLICE_S, run=run, linux=True, summary=summary,
)
