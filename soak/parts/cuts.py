"""Power cuts under Linux guests: images of their disks with any of the unflushed writes missing.

A guest is recorded for every thousand images, each time of another kind: one writer or several on
several vCPUs and queues, without a volatile cache, and with a journal for data too.  An image has
any subset of the writes since the last flush, torn at 512 bytes.  ``e2fsck`` must find it clean
once the journal is replayed, and every record that the guest had acknowledged must be whole.
"""

from __future__ import annotations

import subprocess
import threading
from collections import Counter
from collections.abc import Sequence

from soak.errors import PartError, TrialError
from soak.part import Figures, Part, Trial, Work
from tests.support.power_cut import Flush, NumberedCuts
from tests.support.record_guest import VARIANTS
from tests.support.recorded_guest import Recording, acknowledged, check_cut, recording

IMAGES_OF_A_GUEST = 1000
RECORDS = 200


class Cutter:
    """Makes and checks images; ``work`` has the folder of the recordings."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._lock = threading.Lock()
        self._recordings: dict[int, Recording] = {}
        self._own = threading.local()

    def cut(self, trial: Trial) -> Figures:
        """Do one trial."""
        guest, number = divmod(trial.number, IMAGES_OF_A_GUEST)
        cut = self._cuts_of(guest).make(number)
        try:
            check_cut(cut, trial.folder)
        except (AssertionError, FileNotFoundError) as error:
            raise TrialError(str(error)) from error
        return {"guest": guest, "acked": len(cut.notes)}

    def _cuts_of(self, guest: int) -> NumberedCuts:
        """Return this thread's maker of the images of ``guest``: it goes forwards cheaply."""
        if getattr(self._own, "guest", None) != guest:
            self._own.cuts = NumberedCuts(*self._recording_of(guest))
            self._own.guest = guest
        cuts = self._own.cuts
        assert isinstance(cuts, NumberedCuts)
        return cuts

    def _recording_of(self, guest: int) -> Recording:
        with self._lock:
            if guest not in self._recordings:
                self._recordings.clear()
                variant = guest % len(VARIANTS)
                try:
                    found = recording(self._work.folder / f"guest-{guest}", variant, RECORDS)
                except subprocess.SubprocessError as error:
                    raise PartError(f"guest {guest} was not recorded: {error}") from error
                acked = len(acknowledged(found[1]))
                flushes = sum(isinstance(event, Flush) for event in found[1])
                self._work.say(
                    f"cuts: guest {guest}, {VARIANTS[variant]}: {acked} records, {flushes} flushes"
                )
                self._recordings[guest] = found
            return self._recordings[guest]


def run(work: Work) -> None:
    """Do what is left."""
    work.each(Cutter(work).cut)


def summary(trials: Sequence[Figures]) -> Figures:
    """Return the figures for the report."""
    return {
        "images, all clean": dict(Counter(
            VARIANTS[line["guest"] % len(VARIANTS)].name for line in trials)),
        "acknowledged records looked for, all found": sum(line["acked"] for line in trials),
    }


PART = Part(
    name="cuts", about="power cuts under Linux guests",
    things="images", size=10_000, run=run, summary=summary,
)
