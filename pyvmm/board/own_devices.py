"""Virtio devices that a script gives to its machine."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from pyvmm.virtio.device import VirtioDevice


def own(devices: Mapping[str, VirtioDevice], stack: contextlib.ExitStack) -> None:
    """Have ``stack`` close ``devices``; ValueError if one has a slot already."""
    for name, device in devices.items():
        if device.is_plugged or sum(other is device for other in devices.values()) > 1:
            raise ValueError(f"device {name!r} is plugged in already: make another one")
    for device in devices.values():
        stack.callback(device.close)
