"""Disks: the BlockBackend protocol and its kinds."""
