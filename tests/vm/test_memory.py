"""Guest RAM as KVM maps it: in huge pages, which the exits of a boot show."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.export_process import Export
from tests.support.guest import TOOLS, boot, run_in_guest, sparse
from tests.support.kvm_exits import counted_exits

pytestmark = pytest.mark.kvm

MOST_EXITS = 5_000
"""2 MiB pages make some 3,000 exits of a boot, 4 KiB pages 7,800: each page's first use is one."""
SHARED_PAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


@pytest.fixture
def huge_shared_pages() -> Iterator[None]:
    """Let memfds have huge pages where they are asked for; most hosts forbid that."""
    before = SHARED_PAGES.read_text("ascii").partition("[")[2].partition("]")[0]
    SHARED_PAGES.write_text("advise", "ascii")
    yield
    SHARED_PAGES.write_text(before, "ascii")


def exits_of_a_boot(*options: str) -> int:
    """Boot to user space and to the end at once: all exits of KVM, also those it serves itself."""
    with counted_exits() as counts:
        run = boot("--disk", f"{TOOLS},ro", *options, append=run_in_guest("exit 0"))
    assert run.status == 0, run.console + run.messages
    return counts[0]


@pytest.mark.parametrize("size", ["250M", "5G"])
def test_fault_44_kvm_maps_ram_in_huge_pages_above_4_gib_too(size: str) -> None:
    assert exits_of_a_boot("--memory", size) < MOST_EXITS


@pytest.mark.usefixtures("huge_shared_pages")
def test_fault_44_kvm_maps_ram_that_a_back_end_shares_in_huge_pages(tmp_path: Path) -> None:
    socket = tmp_path / "disk.sock"
    with Export(sparse(tmp_path / "disk.img", 16), socket):
        assert exits_of_a_boot("--disk", f"vhost-user={socket}") < MOST_EXITS
