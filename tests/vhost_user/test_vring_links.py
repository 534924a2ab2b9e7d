"""``check_eventfd`` with the directory of links that root and others keep."""

from __future__ import annotations

import errno
import os

import pytest

from pyvmm.vhost_user.vring import RefusedError, check_eventfd, open_links
from tests.support.apart import apart, become_nobody, refuse_calls

OPEN_TREE = 428


def kinds_told() -> list[str]:
    """Return what is said of an eventfd, a pipe and a descriptor that is not open."""
    links = open_links()
    event, (out, into) = os.eventfd(0), os.pipe()
    told = []
    for fd in (event, out, 12345):
        try:
            check_eventfd(fd, links)
        except RefusedError as error:
            told.append(str(error).partition(": it is ")[2].partition(":")[0])
        else:
            told.append("eventfd")
    for fd in (links, event, out, into):
        os.close(fd)
    return told


EXPECTED = ["eventfd", "pipe", "unknown (No such file or directory)"]


def test_an_eventfd_is_told_from_all_else() -> None:
    assert kinds_told() == EXPECTED


def test_a_user_who_may_make_no_mount_tells_the_same() -> None:
    def body(_: int) -> list[str]:
        become_nobody()
        return kinds_told()

    assert apart(body) == EXPECTED


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EPERM])
def test_a_host_without_mounts_of_ones_own_tells_the_same(error: int) -> None:
    def body(_: int) -> list[str]:
        refuse_calls(error, OPEN_TREE)
        return kinds_told()

    assert apart(body) == EXPECTED


@pytest.mark.skipif(os.geteuid() != 0, reason="a user may make no mounts, and has no empty root")
def test_no_way_leads_up_from_roots_links() -> None:
    links = open_links()
    try:
        for way in ("..", "../..", "../../../.."):
            above = os.open(way, os.O_PATH, dir_fd=links)
            assert os.path.samestat(os.fstat(above), os.fstat(links))
            os.close(above)
        with pytest.raises(FileNotFoundError):
            os.stat("../root", dir_fd=links)
    finally:
        os.close(links)
