"""States of KVM's parts without what goes on counting, so that two saves compare equal."""

from __future__ import annotations

import copy
import struct

TSC = 0x10
_PPR = 0xA0
MAY_DIFFER = {TSC, 0x4000_0010, 0x4000_0020}
"""MSRs that go on counting: the TSC, and Hyper-V's VP run time and reference time."""


def comparable_vcpu(state: dict[str, object]) -> dict[str, object]:
    """``state`` of a vCPU without what goes on counting."""
    state = copy.deepcopy(state)
    msrs, lapic = state["msrs"], state["lapic"]
    assert isinstance(msrs, list)
    if isinstance(lapic, bytes):  # KVM computes the processor priority anew when it is needed
        state["lapic"] = lapic[:_PPR] + bytes(4) + lapic[_PPR + 4 :]
    del state["msrs"], state["tsc_offset"]
    return state | {
        f"MSR {index:#x}": hex(value) for index, value in msrs if index not in MAY_DIFFER
    }


def comparable_chips(state: dict[str, object]) -> dict[str, object]:
    """``state`` of the chips without the PIT's load times and the clock's time."""
    state = dict(state)
    pit2 = state["pit2"]
    if isinstance(pit2, bytes):
        pit = bytearray(pit2)
        for channel in range(3):
            struct.pack_into("<q", pit, 24 * channel + 16, 0)
        state["pit2"] = bytes(pit)
    del state["clock"]
    return state
