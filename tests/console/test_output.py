"""OutputBuffer: the guest's bytes are observed once each, also ahead of being shown."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pyvmm.console.output import OutputBuffer


class Shown:
    """A buffer whose host takes ``room`` bytes more."""

    def __init__(self) -> None:
        self.observed, self.taken, self.room = bytearray(), bytearray(), 0
        self.output = OutputBuffer(
            1, lambda: None, self.observed.extend, write=self._write
        )

    def _write(self, data: bytes) -> int:
        count = min(self.room, len(data))
        if not count:
            raise BlockingIOError
        self.room -= count
        self.taken += data[:count]
        return count


STEPS = st.lists(
    st.binary(min_size=1, max_size=20) | st.integers(1, 15) | st.just("observe"), max_size=40
)


@given(STEPS)
def test_every_byte_is_observed_once_and_in_order(steps: list[bytes | int | str]) -> None:
    shown, written = Shown(), bytearray()
    for step in steps:
        if isinstance(step, bytes):
            shown.output.write(step)
            written += step
        elif isinstance(step, int):
            shown.room = step
            shown.output.drain()
        else:
            shown.output.observe_all()
            assert shown.observed == written
        assert written.startswith(shown.observed)
        assert shown.observed.startswith(shown.taken)
    shown.output.give_up()
    assert shown.observed == written


def test_a_buffer_that_was_shut_opens_again() -> None:
    shown = Shown()
    shown.output.write(b"lost")
    shown.output.shut()
    shown.output.give_up()
    assert shown.output.fd is None
    shown.output.reopen(1)
    shown.output.write(b"shown")
    shown.room = 10
    assert shown.output.drain() == b"shown"
    assert shown.observed == b"lostshown"
    assert shown.taken == b"shown"
