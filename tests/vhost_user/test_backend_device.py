"""Our back end with a front end that means well: memory, features, configuration space."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.memory import GuestMemory
from pyvmm.vhost_user.protocol import (
    CONFIG,
    MAX_CONFIG_BYTES,
    MEM_REGION,
    MEM_TABLE,
    PROTOCOL_FEATURES,
    SINGLE_MEM_REGION,
    U64,
    VRING_STATE,
    BackendRequest,
    MemoryRegion,
    ProtocolFeature,
    Request,
)
from pyvmm.virtio.spec import BlockFeature
from tests.support.vhost_rig import (
    FEATURES,
    PACKED,
    RAM_BYTES,
    USER_BASE,
    ExportRig,
    ScriptedFrontend,
    held,
    memfd,
)
from tests.support.virtio_driver import RAM_BASE, readable, writable

IN, OUT, FLUSH = 0, 1, 4
WRITEBACK = 32
KINDS = pytest.mark.parametrize("features", [FEATURES, PACKED], ids=["split", "packed"])


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[ExportRig]:
    before = held()
    with ExportRig(tmp_path / "s") as rig:
        yield rig
    assert held() == before


@pytest.fixture
def frontend(rig: ExportRig) -> ScriptedFrontend:
    return rig.connect()


def test_memory_is_added_and_removed_while_a_ring_runs(frontend: ScriptedFrontend) -> None:
    driver = frontend.start()
    fd = memfd(8192)
    more = MemoryRegion(0, 8192, USER_BASE - 8192, 0)
    status = driver.status_byte()
    chain = [readable(driver.header(IN, 5), 16), writable(4096, 512), writable(status, 1)]
    assert driver.ask(chain, status).status == 1  # IOERR: no such memory
    assert frontend.ack(Request.ADD_MEM_REG, SINGLE_MEM_REGION.pack(*more), [fd]) == 0
    assert driver.ask(chain, status).status == 0
    assert os.pread(fd, 512, 4096) == b"\5" * 512
    gone = SINGLE_MEM_REGION.pack(*more._replace(mmap_offset=123))
    assert frontend.ack(Request.REM_MEM_REG, gone, [fd]) == 0
    assert driver.ask(chain, status).status == 1
    os.close(fd)


@KINDS
def test_a_new_table_while_a_ring_runs(frontend: ScriptedFrontend, features: int) -> None:
    """The same bytes in another file, and at other GPAs: the ring goes on there."""
    driver = frontend.start(features)
    assert driver.request(IN, 3, room=512).data == b"\3" * 512
    fd = memfd(RAM_BYTES)
    os.pwrite(fd, bytes(frontend.map), 0)
    moved = frontend.region._replace(gpa=RAM_BASE + RAM_BYTES)
    table = MEM_TABLE.pack(1, 0) + MEM_REGION.pack(*moved)
    assert frontend.ack(Request.SET_MEM_TABLE, table, [fd]) == 0
    with mmap.mmap(fd, RAM_BYTES) as new:
        driver.memory = GuestMemory.over(new, moved.gpa)
        for area in ("desc", "avail", "used", "_top"):
            setattr(driver, area, getattr(driver, area) + RAM_BYTES)
        assert driver.request(IN, 4, room=512).data == b"\4" * 512
        driver.memory.close()
    os.close(fd)


def test_a_table_that_is_no_good_leaves_the_old_one(
    rig: ExportRig, frontend: ScriptedFrontend
) -> None:
    driver = frontend.start()
    region = MEM_REGION.pack(*frontend.region)
    fds = [frontend.ram_fd] * 2
    assert frontend.ack(Request.SET_MEM_TABLE, MEM_TABLE.pack(2, 0) + 2 * region, fds) == 1
    assert len(rig.reports) == 1
    assert "SET_MEM_TABLE: the region of" in rig.reports[0]
    assert "overlaps" in rig.reports[0]
    assert driver.request(IN, 4, room=512).data == b"\4" * 512


def test_a_table_without_one_of_the_rings_changes_nothing(
    rig: ExportRig, frontend: ScriptedFrontend
) -> None:
    """The first ring is in the new table, the second is not: both go on in the old one."""
    driver = frontend.start()
    other = frontend.driver(1)
    other.desc, other.avail, other.used = (gpa + RAM_BYTES // 2 for gpa in (
        other.desc, other.avail, other.used
    ))  # fmt: skip
    frontend.set_up(other)
    frontend.run(1)
    half = frontend.region._replace(size=RAM_BYTES // 2)
    table = MEM_TABLE.pack(1, 0) + MEM_REGION.pack(*half)
    assert frontend.ack(Request.SET_MEM_TABLE, table, [frontend.ram_fd]) == 1
    assert len(rig.reports) == 1
    assert "SET_MEM_TABLE: ring 1 at 0x7f0000080000, which is in no memory" in rig.reports[0]
    assert driver.request(IN, 3, room=512).data == b"\3" * 512
    assert other.request(IN, 4, room=512).data == b"\4" * 512
    assert other.request(IN, 5, room=512, indirect=True).data == b"\5" * 512
    assert len(rig.reports) == 1
    assert frontend.ack(Request.SET_MEM_TABLE, MEM_TABLE.pack(0, 0)) == 1
    assert driver.request(IN, 6, room=512).data == b"\6" * 512


def test_a_ring_that_was_spoilt_meanwhile_says_so(
    rig: ExportRig, frontend: ScriptedFrontend
) -> None:
    """The table is refused, and the old one no longer holds what the ring needs."""
    driver = frontend.start()
    # Where a split ring goes on has to be near the index in its used ring.
    frontend.memory.write_int(driver.used + 2, 2, 100)
    region = MEM_REGION.pack(*frontend.region)
    fds = [frontend.ram_fd] * 2
    assert frontend.ack(Request.SET_MEM_TABLE, MEM_TABLE.pack(2, 0) + 2 * region, fds) == 1
    spoilt, refused = rig.reports
    assert "ring base 0 is not within 16 of the used index 100; it stopped until it is" in spoilt
    assert "overlaps" in refused
    frontend.kick()
    driver.restart()
    frontend.set_up(driver)
    frontend.run()
    assert driver.request(IN, 3, room=512).data == b"\3" * 512


def test_a_front_end_that_shares_no_memory(rig: ExportRig, frontend: ScriptedFrontend) -> None:
    """QEMU does not say so itself."""
    frontend.negotiate()
    assert frontend.ack(Request.SET_VRING_ADDR, frontend.addresses(frontend.driver())) == 1
    assert rig.reports[0].endswith(
        "in no memory region; none is shared (QEMU: -object memory-backend-memfd,share=on)"
    )


def test_the_region_of_a_running_ring_stays(rig: ExportRig, frontend: ScriptedFrontend) -> None:
    driver = frontend.start()
    gone = SINGLE_MEM_REGION.pack(*frontend.region)
    assert frontend.ack(Request.REM_MEM_REG, gone) == 1
    assert "REM_MEM_REG: ring 0, which runs, is in that region" in rig.reports[0]
    assert driver.request(IN, 4, room=512).data == b"\4" * 512
    frontend.stop()
    assert frontend.ack(Request.REM_MEM_REG, gone) == 0


def test_another_driver_with_other_features(frontend: ScriptedFrontend) -> None:
    driver = frontend.start()
    assert driver.request(FLUSH).status == 0
    frontend.stop()
    frontend.features = PACKED & ~int(BlockFeature.FLUSH)
    payload = U64.pack(frontend.features | PROTOCOL_FEATURES)
    assert frontend.ack(Request.SET_FEATURES, payload) == 0
    packed = frontend.driver()
    frontend.set_up(packed)
    frontend.run()
    assert packed.request(IN, 2, room=512).data == b"\2" * 512
    assert packed.request(FLUSH).status == 2  # UNSUPP


def test_half_a_packed_base_is_enough(frontend: ScriptedFrontend) -> None:
    frontend.negotiate(PACKED)
    frontend.share()
    driver = frontend.driver()
    frontend.set_up(driver, 0x8000)
    frontend.run()
    assert driver.request(IN, 2, room=512).data == b"\2" * 512


def test_reset_device(frontend: ScriptedFrontend) -> None:
    driver = frontend.start()
    assert driver.request(FLUSH).status == 0
    assert frontend.ack(Request.RESET_DEVICE) == 0
    driver.submit([readable(driver.header(FLUSH), 16), writable(driver.status_byte(), 1)])
    assert driver.reap() == []
    assert frontend.ack(Request.SET_VRING_ENABLE, VRING_STATE.pack(0, 1)) == 0
    assert frontend.ack(Request.SET_FEATURES, U64.pack(FEATURES | PROTOCOL_FEATURES)) == 0
    driver.restart()
    frontend.set_up(driver)
    frontend.run()
    assert driver.request(IN, 2, room=512).data == b"\2" * 512


def test_reset_owner_disables_the_rings(frontend: ScriptedFrontend) -> None:
    driver = frontend.start()
    assert frontend.ack(Request.RESET_OWNER) == 0
    driver.submit([readable(driver.header(FLUSH), 16), writable(driver.status_byte(), 1)])
    assert driver.reap() == []
    assert frontend.ack(Request.SET_VRING_ENABLE, VRING_STATE.pack(0, 1)) == 0
    assert driver.reap() == [(0, 1)]


def test_the_configuration_space(frontend: ScriptedFrontend) -> None:
    frontend.negotiate()
    space = frontend.ask(Request.GET_CONFIG, CONFIG.pack(0, 60, 0) + bytes(60))
    assert CONFIG.unpack_from(space) == (0, 60, 0)
    assert len(space) == CONFIG.size + 60
    assert struct.unpack_from("<Q", space, CONFIG.size) == (64,)
    part = frontend.ask(Request.GET_CONFIG, CONFIG.pack(WRITEBACK, 4, 0) + bytes(4))
    assert part[CONFIG.size :] == space[CONFIG.size + WRITEBACK :][:4]
    end = CONFIG.pack(MAX_CONFIG_BYTES - 1, 1, 0)
    assert frontend.ask(Request.GET_CONFIG, end + b"x") == end + b"\0"
    outside = CONFIG.pack(MAX_CONFIG_BYTES, 1, 0)
    assert frontend.ask(Request.GET_CONFIG, outside + b"x") == b""


def test_the_cache_mode_is_the_drivers_to_choose(
    rig: ExportRig, frontend: ScriptedFrontend
) -> None:
    frontend.negotiate(FEATURES | int(BlockFeature.CONFIG_WCE))

    def writeback() -> int:
        return frontend.ask(Request.GET_CONFIG, CONFIG.pack(WRITEBACK, 1, 0) + b"?")[-1]

    def change(offset: int, data: bytes) -> int:
        return frontend.ack(Request.SET_CONFIG, CONFIG.pack(offset, len(data), 0) + data)

    assert writeback() == 1
    assert change(WRITEBACK, b"\0") == 0
    assert writeback() == 0
    # Features said once more, as by a VMM that was paused, change nothing.
    features = U64.pack(frontend.features | PROTOCOL_FEATURES)
    assert frontend.ack(Request.SET_FEATURES, features) == 0
    assert writeback() == 0
    assert change(WRITEBACK, b"\2") == 1
    assert change(0, bytes(8)) == 1
    assert change(0, b"\1" * 60) == 1
    assert change(MAX_CONFIG_BYTES, b"\1") == 1
    assert writeback() == 0
    assert [report.partition("SET_CONFIG: ")[2] for report in rig.reports] == [
        "1 bytes at 32 cannot be written, or not as that",
        "8 bytes at 0 cannot be written, or not as that",
        "60 bytes at 0 cannot be written, or not as that",
        "1 bytes at 256, the end is at 256",
    ]


def test_a_front_end_hears_that_the_disk_has_grown(
    rig: ExportRig, frontend: ScriptedFrontend
) -> None:
    frontend.negotiate()
    rig.server.config_changed()  # nobody wants to know yet
    ours, theirs = socket.socketpair()
    assert frontend.ack(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()]) == 0
    theirs.close()
    rig.server.config_changed()
    assert ours.recv(100) == struct.pack("=III", BackendRequest.CONFIG_CHANGE_MSG, 1, 0)
    ours.close()
    rig.server.config_changed()
    rig.server.config_changed()
    assert len(rig.reports) == 1
    assert "the peer has hung up, before CONFIG_CHANGE_MSG" in rig.reports[0]
    assert driver_works(frontend)


def test_no_news_without_config(rig: ExportRig, frontend: ScriptedFrontend) -> None:
    frontend.negotiate(
        protocol=int(ProtocolFeature.BACKEND_REQ | ProtocolFeature.REPLY_ACK)
    )
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    assert frontend.ack(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()]) == 0
    rig.server.config_changed()
    with pytest.raises(BlockingIOError):
        ours.recv(1)
    ours.close()
    theirs.close()


def test_a_socket_that_would_keep_a_connection_up(
    rig: ExportRig, frontend: ScriptedFrontend, tmp_path: Path
) -> None:
    """The disk would belong to a front end that is gone: refused."""
    frontend.negotiate()
    with contextlib.ExitStack() as stack:

        def unix() -> socket.socket:
            return stack.enter_context(socket.socket(socket.AF_UNIX))

        listener, caller = unix(), unix()
        listener.bind(str(tmp_path / "other"))
        listener.listen()
        caller.connect(str(tmp_path / "other"))
        answerer = stack.enter_context(listener.accept()[0])
        for own in (frontend.socket, caller, answerer, listener):
            assert frontend.ack(Request.SET_BACKEND_REQ_FD, b"", [own.fileno()]) == 1
            assert "SET_BACKEND_REQ_FD: the file descriptor is no end" in rig.reports.pop()
        assert frontend.ack(Request.SET_BACKEND_REQ_FD, b"", [unix().fileno()]) == 1
        assert "not connected" in rig.reports.pop()
        ours, theirs = map(stack.enter_context, socket.socketpair())
        socket.send_fds(ours, [b"x"], [frontend.socket.fileno()])
        assert frontend.ack(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()]) == 1
        assert "something was said before" in rig.reports.pop()
    frontend.hang_up()
    assert driver_works(negotiated(rig))
    assert rig.reports == []


def test_a_socket_to_which_no_connection_can_be_sent_later(
    rig: ExportRig, frontend: ScriptedFrontend
) -> None:
    frontend.negotiate()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert frontend.ack(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()]) == 0
        with pytest.raises(BrokenPipeError):
            socket.send_fds(ours, [b"x"], [frontend.socket.fileno()])
    frontend.hang_up()
    assert driver_works(negotiated(rig))


def negotiated(rig: ExportRig) -> ScriptedFrontend:
    """A new one."""
    frontend = rig.connect()
    frontend.negotiate()
    return frontend


def driver_works(frontend: ScriptedFrontend) -> bool:
    """Whether, from after ``negotiate``, a request is served."""
    frontend.share()
    driver = frontend.driver()
    frontend.set_up(driver)
    frontend.run()
    return driver.request(IN, 1, room=512).data == b"\1" * 512
