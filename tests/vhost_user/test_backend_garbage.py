"""Whatever a front end says, in whatever order: the export lives, leaks nothing, and serves."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.vhost_user.protocol import (
    MEM_REGION,
    MEM_TABLE,
    NEED_REPLY,
    PROTOCOL_FEATURES,
    REPLY,
    VRING_ADDR,
    VRING_STATE,
    Request,
)
from pyvmm.vhost_user.session import HALF_MESSAGE_S
from pyvmm.virtio.spec import Feature
from tests.support.vhost_pair import IN, Pair
from tests.support.vhost_rig import ALL_PROTOCOL, FEATURES, RAM_BYTES, USER_BASE, held
from tests.support.virtio_driver import RAM_BASE

_REQUESTS = st.sampled_from([*Request, 0, 44, 999])
_FIELDS = st.sampled_from(
    [0, 1, 2, 4, 16, 4096, RAM_BASE, RAM_BYTES, USER_BASE, USER_BASE + 4096, 1 << 30, 1 << 63,
     FEATURES, FEATURES | PROTOCOL_FEATURES, ALL_PROTOCOL, 0x100, (1 << 64) - 1]
)  # fmt: skip
_PAYLOADS = st.one_of(
    st.binary(max_size=60),
    st.lists(_FIELDS, max_size=6).map(lambda words: struct.pack(f"={len(words)}Q", *words)),
    st.tuples(st.integers(0, 3), _FIELDS).map(
        lambda pair: VRING_STATE.pack(pair[0], pair[1] & 0xFFFF_FFFF)
    ),
    st.tuples(st.integers(0, 1), st.lists(_FIELDS, min_size=4, max_size=4)).map(
        lambda pair: VRING_ADDR.pack(pair[0], 0, *pair[1])
    ),
    st.lists(st.tuples(_FIELDS, _FIELDS, _FIELDS, _FIELDS), max_size=3).map(
        lambda rows: MEM_TABLE.pack(len(rows), 0) + b"".join(MEM_REGION.pack(*r) for r in rows)
    ),
)
_MESSAGES = st.lists(
    st.tuples(
        _REQUESTS, _PAYLOADS, st.sampled_from([0, 0, NEED_REPLY, REPLY]),
        st.lists(st.sampled_from(["ram", "kick", "call", "null", "socket"]), max_size=3),
    ),
    max_size=12,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(begins=st.sampled_from(["", "negotiated", "started"]), messages=_MESSAGES)
def test_whatever_is_said_the_others_are_unharmed(
    tmp_path_factory: pytest.TempPathFactory,
    begins: str,
    messages: list[tuple[int, bytes, int, list[str]]],
) -> None:
    before = held()
    pair = Pair(tmp_path_factory.getbasetemp() / "fuzz")
    bad = pair.bad
    null = os.open("/dev/null", os.O_RDWR)
    if begins:
        bad.negotiate(int(Feature.VERSION_1))
    if begins == "started":
        bad.share()
        bad.set_up(bad.driver())
        bad.run()
    fds = {
        "ram": bad.ram_fd, "kick": bad.kick_fds[0], "call": bad.call_fds[0], "null": null,
        "socket": bad.socket.fileno(),
    }
    for request_, payload, flags, names in messages:
        bad.send(request_, payload, [fds[name] for name in names], flags=flags)
        bad.kick()
    assert pair.driver.request(IN, 5, room=512).data == b"\5" * 512
    assert all(line.startswith(pair.rig.path) for line in pair.rig.reports)
    os.close(null)
    pair.rig.close()
    assert held() == before


@settings(max_examples=30, deadline=None)
@given(chunks=st.lists(st.binary(min_size=1, max_size=40), max_size=6))
def test_garbage(tmp_path_factory: pytest.TempPathFactory, chunks: Sequence[bytes]) -> None:
    before = held()
    pair = Pair(tmp_path_factory.getbasetemp() / "garbage")
    for chunk in chunks:
        pair.bad.raw(chunk, [pair.bad.ram_fd])
    pair.rig.now_s += HALF_MESSAGE_S
    pair.rig.turn()
    assert pair.bad.is_closed() == bool(chunks)
    assert len(pair.rig.reports) == bool(chunks)
    assert pair.driver.request(IN, 5, room=512).data == b"\5" * 512
    pair.rig.close()
    assert held() == before
