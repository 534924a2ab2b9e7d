"""Virtqueues: split and packed rings (virtio 1.2, 2.6 to 2.8)."""
