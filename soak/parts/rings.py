"""The model of the block device's rings, new episodes all the time."""

from soak.pytest_part import pytest_part

PART = pytest_part(
    "rings", ["tests/virtio/ring/test_ring_model.py"], "PYVMM_SOAK_S",
    about="random legal drivers on every kind of ring, against a model",
    things="s", size=3600, unit=300,
)
