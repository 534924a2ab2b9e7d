"""The write cache: writeback, writethrough, and who decides (5.2.5.2, 5.2.6.2)."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import pytest

from pyvmm.storage.backend import BlockBackend
from pyvmm.virtio.block import BlockConfig
from pyvmm.virtio.spec import BlockFeature, Feature, Register
from tests.support.rig import Hooked, Rig
from tests.virtio.conftest import MakeRig

OUT, FLUSH, DISCARD, WRITE_ZEROES = 1, 4, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
WRITEBACK = Register.CONFIG + 32
V1 = int(Feature.VERSION_1)
F_FLUSH, F_WCE = int(BlockFeature.FLUSH), int(BlockFeature.CONFIG_WCE)
F_ZEROES = int(BlockFeature.WRITE_ZEROES | BlockFeature.DISCARD)
SEGMENT = (8).to_bytes(8, "little") + (8).to_bytes(4, "little") + bytes(4)


class Recorder(Hooked):
    """Writes down what the device asks for; flushes can be made to fail."""

    def __init__(self, backend: BlockBackend) -> None:
        super().__init__(backend)
        self.calls: list[str] = []
        self.flush_fails = False

    def taken(self) -> list[str]:
        """The calls since the last time."""
        calls, self.calls = self.calls, []
        return calls

    def writev(
        self, buffers: Sequence[memoryview], offset: int, *, durable: bool = False
    ) -> None:
        self.calls.append("durable write" if durable else "write")
        super().writev(buffers, offset, durable=durable)

    def flush(self) -> None:
        self.calls.append("flush")
        if self.flush_fails:
            raise OSError(errno.EIO, "no more")

    def discard(self, offset: int, length: int) -> None:
        self.calls.append("discard")

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self.calls.append("unmap zeroes" if unmap else "zeroes")


def recording(new_rig: MakeRig, **config: object) -> tuple[Rig, Recorder]:
    backend = Recorder(new_rig().backend)
    rig = new_rig(
        config=BlockConfig(queue_size=16, **config),  # type: ignore[arg-type]
        backend=backend,
    )
    return rig, backend


def write(rig: Rig) -> int:
    return rig.driver.request(OUT, 3, data=b"w" * 512).status


@pytest.mark.parametrize(
    ("configured", "features", "durable"),
    [
        (True, F_FLUSH, False),  # "the driver SHOULD assume presence of a writeback cache"
        (True, F_FLUSH | F_WCE, False),
        (True, 0, True),  # FLUSH was offered and declined
        (True, F_WCE, True),  # "the device MUST initialize writeback to 0"
        (False, F_FLUSH, True),
        (False, F_FLUSH | F_WCE, True),
        (False, 0, True),
    ],
)
def test_cache_mode_after_negotiation(
    new_rig: MakeRig, configured: bool, features: int, durable: bool
) -> None:
    rig, backend = recording(new_rig, writeback=configured)
    rig.driver.start(V1 | features)
    assert write(rig) == OK
    assert backend.taken() == ["durable write" if durable else "write"]
    assert rig.device.read_config(32, 1)[0] == (not durable)
    assert rig.transport.read(WRITEBACK, 1) == (not durable)


def test_flush_that_was_declined_is_unsupported(new_rig: MakeRig) -> None:
    rig, backend = recording(new_rig)
    rig.driver.start(V1)
    assert rig.driver.request(FLUSH).status == UNSUPP
    assert backend.taken() == []


def test_write_is_durable_when_flush_is_not_even_offered(new_rig: MakeRig) -> None:
    rig, backend = recording(new_rig, disabled_features=int(BlockFeature.FLUSH))
    assert not rig.driver.offered & (F_FLUSH | F_WCE)
    rig.driver.start()
    assert write(rig) == OK
    assert backend.taken() == ["durable write"]


def test_writeback_byte_works_while_running(new_rig: MakeRig) -> None:
    rig, backend = recording(new_rig)
    rig.driver.start(V1 | F_FLUSH | F_WCE)
    write(rig)
    assert backend.taken() == ["write"]

    rig.transport.write(WRITEBACK, 1, 0)
    # No flush will come for the earlier write any more.
    assert backend.taken() == ["flush"]
    assert rig.transport.read(WRITEBACK, 1) == 0
    write(rig)
    assert backend.taken() == ["durable write"]
    rig.transport.write(WRITEBACK, 1, 0)
    assert backend.taken() == []

    rig.transport.write(WRITEBACK, 1, 1)
    assert rig.transport.read(WRITEBACK, 1) == 1
    write(rig)
    assert backend.taken() == ["write"]
    assert rig.driver.request(FLUSH).status == OK


def test_driver_may_ask_for_a_cache_although_it_declined_flush(new_rig: MakeRig) -> None:
    rig, backend = recording(new_rig)
    rig.driver.start(V1 | F_WCE)
    rig.transport.write(WRITEBACK, 1, 1)
    write(rig)
    assert backend.taken() == ["write"]


@pytest.mark.parametrize("value", [2, 3, 0x80, 0xFF])
def test_other_values_of_writeback_are_ignored(new_rig: MakeRig, value: int) -> None:
    rig, _ = recording(new_rig)
    rig.driver.start(V1 | F_FLUSH | F_WCE)
    for mode in (0, 1):
        rig.transport.write(WRITEBACK, 1, mode)
        rig.transport.write(WRITEBACK, 1, value)
        assert rig.transport.read(WRITEBACK, 1) == mode


def test_bad_input_77_config_writes_but_to_writeback_are_ignored(new_rig: MakeRig) -> None:
    rig, _ = recording(new_rig)
    rig.driver.start()
    before = rig.device.read_config(0, 64)
    for size in (1, 2, 4, 8):
        for offset in (*range(0, 33 - size, size), *range(33, 128)):
            rig.transport.write(Register.CONFIG + offset, size, (1 << 8 * size) - 1)
    assert rig.device.read_config(0, 64) == before
    # A wider write counts for the byte it covers.
    rig.transport.write(WRITEBACK, 4, 0xFFFF_FF00)
    assert rig.device.read_config(0, 64) == before[:32] + b"\0" + before[33:]
    assert rig.transport.read(WRITEBACK, 4) == 0x1_0000
    rig.transport.write(WRITEBACK - 1, 2, 0x0100)
    assert rig.device.read_config(0, 64) == before


@pytest.mark.parametrize("features", [0, F_FLUSH])
def test_writeback_is_read_only_without_config_wce(new_rig: MakeRig, features: int) -> None:
    rig, backend = recording(new_rig)
    rig.driver.start(V1 | features)
    mode = rig.transport.read(WRITEBACK, 1)
    rig.transport.write(WRITEBACK, 1, 1 - mode)
    assert rig.transport.read(WRITEBACK, 1) == mode
    assert backend.taken() == []


def test_reset_brings_the_configured_mode_back(new_rig: MakeRig) -> None:
    rig, backend = recording(new_rig)
    rig.driver.start(V1 | F_FLUSH | F_WCE)
    rig.transport.write(WRITEBACK, 1, 0)
    backend.taken()
    rig.driver.set(Register.STATUS, 0)
    assert rig.device.read_config(32, 1) == b"\1"
    assert rig.transport.read(WRITEBACK, 1) == 1
    rig.driver.start(V1 | F_FLUSH)
    write(rig)
    assert backend.taken() == ["write"]


def test_write_zeroes_is_stable_in_writethrough_mode(new_rig: MakeRig) -> None:
    rig, backend = recording(new_rig)
    rig.driver.start(V1 | F_ZEROES | F_FLUSH)
    assert rig.driver.request(WRITE_ZEROES, data=SEGMENT).status == OK
    assert backend.taken() == ["zeroes"]
    rig.driver.start(V1 | F_ZEROES)
    assert rig.driver.request(WRITE_ZEROES, data=SEGMENT).status == OK
    assert backend.taken() == ["zeroes", "flush"]
    # What is discarded reads as anything, so nothing has to become stable.
    assert rig.driver.request(DISCARD, data=SEGMENT).status == OK
    assert backend.taken() == ["discard"]


def test_failed_flush_is_ioerr_in_every_mode(new_rig: MakeRig) -> None:
    rig, backend = recording(new_rig)
    backend.flush_fails = True
    rig.driver.start(V1 | F_ZEROES | F_FLUSH | F_WCE)
    assert rig.driver.request(FLUSH) == (IOERR, 1, b"")
    rig.transport.write(WRITEBACK, 1, 0)
    assert rig.driver.request(WRITE_ZEROES, data=SEGMENT) == (IOERR, 1, b"")
    assert not rig.driver.needs_reset
