"""The steps of the device status (virtio 1.2, 2.1 and 3.1.1)."""

from __future__ import annotations

import itertools

from pyvmm.virtio.spec import Status

# Plain integers: the driver may write anything, and the complement of an IntFlag drops the bits
# that have no name.
ACKNOWLEDGED = int(Status.ACKNOWLEDGE)
DRIVEN = ACKNOWLEDGED | int(Status.DRIVER)
NEGOTIATED = DRIVEN | int(Status.FEATURES_OK)
RUNNING = NEGOTIATED | int(Status.DRIVER_OK)
NEEDS_RESET = int(Status.DEVICE_NEEDS_RESET)
FAILED = int(Status.FAILED)
STOPPED = NEEDS_RESET | FAILED

STEPS = (0, ACKNOWLEDGED, DRIVEN, NEGOTIATED, RUNNING)
TRANSITIONS = frozenset(itertools.pairwise(STEPS))
"""3.1.1 "Driver Requirements: Device Initialization": the one way up, as (status, written).

Besides these: 0 resets from anywhere, FAILED may be added anywhere, and after FAILED or
DEVICE_NEEDS_RESET only a reset helps.  Every other write is ignored: "The driver MUST NOT clear a
device status bit" (2.1.1), nor skip a step.
"""
