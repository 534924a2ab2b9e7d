"""The public face: what ``import pyvmm`` gives to scripts and tests (docs/api.md)."""
