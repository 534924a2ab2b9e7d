"""A host that refuses a disk's writes, with a Linux guest above it."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from tests.support.guest import MIB, ROOT_DISK, boot, run_in_guest, sparse

pytestmark = pytest.mark.kvm


def test_fault_11_a_sparse_image_without_room_is_said_to_both(tmp_path: Path) -> None:
    """The guest has I/O errors, and the person a line, without -v; the room is a limit of sizes."""
    disk = sparse(tmp_path / "data.img", 64)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    script = "dd if=/dev/zero of=/dev/vdb bs=1M count=32 oflag=direct; echo dd gave $?"
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 * MIB, hard))
    try:
        run = boot(*ROOT_DISK, "--disk", str(disk), append=run_in_guest(script))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert run.status == 0, run
    assert run.lines("dd gave ") == ["1"]
    assert run.messages.count("failed") == 1
    assert f"{disk}: a write failed: File too large; the guest gets I/O errors" in run.messages
