"""Outcomes and their exit statuses: the table of the README."""

from __future__ import annotations

import copy
import pickle

import pytest

from pyvmm.run.outcome import Kind, Outcome


@pytest.mark.parametrize(("kind", "status"), [
    (Kind.RESET, 0), (Kind.SHUTDOWN, 0), (Kind.QUIT, 0), (Kind.PANIC, 121),
    (Kind.TRIPLE_FAULT, 122), (Kind.INTERNAL_ERROR, 123), (Kind.TIMEOUT, 124),
    (Kind.HOST_ERROR, 125), (Kind.GAVE_UP, 121), (Kind.EARLY_HALT, 121), (Kind.EARLY_RESET, 121),
    (Kind.SILENT_HALT, 121), (Kind.POWER_OFF, 0),
])
def test_status_by_kind(kind: Kind, status: int) -> None:
    assert Outcome(kind).exit_status == status


@pytest.mark.parametrize(("byte", "status"), [(0, 0), (7, 7), (119, 119), (120, 119), (255, 119)])
def test_the_guests_status_never_looks_like_ours(byte: int, status: int) -> None:
    assert Outcome(Kind.GUEST_STATUS, byte).exit_status == status


def test_a_signal_is_128_and_its_number() -> None:
    assert Outcome(Kind.SIGNAL, 15).exit_status == 143


def test_every_kind_has_a_status_and_a_text() -> None:
    for kind in Kind:
        assert 0 <= Outcome(kind).exit_status <= 255
        assert str(Outcome(kind, detail="why")).endswith("why")


@pytest.mark.parametrize("kind", list(Kind))
def test_fault_41_an_outcome_that_was_copied_or_pickled_is_as_good(kind: Kind) -> None:
    """As by multiprocessing.  It could be neither, and its kind was no member afterwards."""
    outcome = Outcome(kind, 7, "because")
    for made in (
        pickle.loads(pickle.dumps(outcome)), copy.copy(outcome), copy.deepcopy(outcome),
        Outcome(Kind("".join(kind)), 7, "because"), outcome.replace(kind="".join(kind)),
    ):
        assert made == outcome
        assert hash(made) == hash(outcome)
        assert made.kind is kind
        assert (made.exit_status, str(made)) == (outcome.exit_status, str(outcome))
