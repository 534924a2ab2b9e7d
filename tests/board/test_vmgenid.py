"""The VM generation ID, without a guest: where the bytes are, and when the line moves."""

from __future__ import annotations

import uuid

import pytest

from pyvmm.board.vmgenid import VmGenId
from pyvmm.errors import StateError
from pyvmm.kvm.handles import Vm
from pyvmm.memory import GuestMemory
from pyvmm.x86 import layout
from tests.support.virtio_states import assert_plain

RAM_BYTES = 2 << 20
PULSE = [(layout.GED_GSI, True), (layout.GED_GSI, False)]


class Rig:
    """A generation ID, its RAM, and the line of a VM that is none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.memory = GuestMemory.over(bytearray(RAM_BYTES))
        self.vmgenid = VmGenId(self.memory)
        self.line: list[tuple[int, bool]] = []
        monkeypatch.setattr(Vm, "irq_line", lambda _vm, gsi, level: self.line.append((gsi, level)))
        self.vmgenid.connect(Vm(-1, 0))  # closed

    @property
    def in_ram(self) -> bytes:
        return self.memory.read(layout.VMGENID_GPA, 16)


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(monkeypatch)


def test_first_ids_are_random_and_seen_once_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Rig(monkeypatch), Rig(monkeypatch)
    assert first.vmgenid.value != second.vmgenid.value
    assert first.in_ram == bytes(16)
    first.vmgenid.show()
    assert first.in_ram == first.vmgenid.value.bytes_le
    assert not any(first.memory.read(0, layout.VMGENID_GPA))
    assert not any(first.memory.read(layout.VMGENID_GPA + 16, 0x1000))


def test_a_new_id_is_told_once(rig: Rig) -> None:
    rig.vmgenid.show()
    rig.vmgenid.notify()
    assert rig.line == [], "a first boot is no clone"
    fresh = uuid.uuid4()
    rig.vmgenid.set(fresh)
    assert (rig.vmgenid.value, rig.in_ram, rig.line) == (fresh, fresh.bytes_le, [])
    rig.vmgenid.notify()
    assert rig.line == PULSE
    rig.vmgenid.notify()
    rig.vmgenid.set(fresh)
    rig.vmgenid.notify()
    assert rig.line == PULSE


def test_a_guest_without_acpi_is_not_told(rig: Rig) -> None:
    rig.vmgenid.set(uuid.uuid4())
    rig.vmgenid.notify()
    assert (rig.in_ram, rig.line) == (bytes(16), [])


def test_a_restore_says_nothing_and_leaves_ram_alone(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.vmgenid.show()
    state = rig.vmgenid.save()
    assert_plain(state)
    clone = Rig(monkeypatch)
    clone.vmgenid.set(uuid.uuid4())
    clone.vmgenid.restore(state)
    clone.vmgenid.notify()
    assert clone.vmgenid.save() == state
    assert (clone.in_ram, clone.line) == (bytes(16), [])
    clone.vmgenid.set(uuid.uuid4())
    clone.vmgenid.notify()
    assert clone.line == PULSE, "the state said that the guest is told"


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"id": bytes(15), "is_shown": True}, "id is not 16 bytes"),
        ({"id": bytes(16), "is_shown": 1}, "is_shown is not a boolean"),
        ({"id": bytes(16)}, "is_shown is missing"),
    ],
)
def test_a_bad_state_changes_nothing(rig: Rig, data: object, problem: str) -> None:
    before = rig.vmgenid.save()
    with pytest.raises(StateError, match=f"^VM generation ID: {problem}"):
        rig.vmgenid.restore(data)
    assert rig.vmgenid.save() == before


def test_a_renewed_id_is_a_random_uuid_and_news(rig: Rig) -> None:
    rig.vmgenid.show()
    seen = {rig.vmgenid.value}
    for _ in range(20):
        rig.vmgenid.renew()
        seen.add(rig.vmgenid.value)
        assert rig.vmgenid.value.version == 4
        assert rig.vmgenid.value.variant == uuid.RFC_4122
        assert rig.in_ram == rig.vmgenid.value.bytes_le
    assert len(seen) == 21
    rig.vmgenid.notify()
    assert rig.line == PULSE
