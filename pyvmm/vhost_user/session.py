"""One connection of a front end: messages in, calls of ``ServedDevice``, replies out.

A malformed message (a size, the number of file descriptors, a reply that nobody asked for) raises
``VhostUserError``, and the connection is over.  A well-formed request that cannot be done is
refused.  If the front end asked for an acknowledgement (REPLY_ACK), that is not 0.  Otherwise the
connection ends too, because the front end would never know.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from pyvmm.errors import VhostUserError
from pyvmm.vhost_user.back_channel import back_channel
from pyvmm.vhost_user.backend import KickWatcher, ServedDevice
from pyvmm.vhost_user.channel import Channel, Message
from pyvmm.vhost_user.protocol import (
    CONFIG,
    MAX_FDS,
    MEM_REGION,
    MEM_TABLE,
    REPLY,
    SINGLE_MEM_REGION,
    U64,
    VRING_ADDR,
    VRING_INDEX_MASK,
    VRING_NO_FD,
    VRING_STATE,
    BackendRequest,
    MemoryRegion,
    ProtocolFeature,
    Request,
)
from pyvmm.vhost_user.regions import MAX_REGIONS, UnusableRegionError
from pyvmm.vhost_user.vring import RefusedError
from pyvmm.virtio.device import VirtioDevice

OFFERED = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
)
"""The protocol features that this back end has."""
HALF_MESSAGE_S = 5.0
"""Seconds that the rest of a message may take to come."""
MESSAGES_PER_TURN = 32
"""After so many messages of one front end it is the turn of the next."""
_NEVER_S = float("inf")


class Session:
    """The front end at the other end of ``channel``, and the ``device`` made for it.

    Both are the session's: ``close`` ends them.  ``report`` takes lines about mistakes that the
    front end survives; ``clock`` is monotonic, in seconds.
    """

    def __init__(
        self,
        channel: Channel,
        device: VirtioDevice,
        kicks: KickWatcher,
        *,
        report: Callable[[str], None],
        trust_memory: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._channel = channel
        self._report = report
        self._clock = clock
        self._served = ServedDevice(
            device, kicks, report=self._complain, stuck=self._end_stuck, trust_memory=trust_memory
        )
        self._protocol_features = 0
        self._to_frontend: Channel | None = None
        self.deadline_s = _NEVER_S
        """The time by which the rest of a message must be here; infinity if none has begun."""

    @property
    def name(self) -> str:
        """The peer's name."""
        return self._channel.peer

    @property
    def is_mid_message(self) -> bool:
        """True if a part of a message has arrived, and the rest has not."""
        return self._channel.is_mid_message

    def fileno(self) -> int:
        """The socket: readable when ``receive`` has something to do."""
        return self._channel.fileno()

    def receive(self) -> None:
        """Handle the messages that have arrived, MESSAGES_PER_TURN at most; never waits.

        VhostUserError when the connection is over; PeerClosedError because the peer hung up.
        """
        for _ in range(MESSAGES_PER_TURN):
            message = self._channel.poll()
            if message is None:
                break
            self.deadline_s = _NEVER_S
            try:
                self._handle(message)
            finally:
                message.close_fds()
        if self.is_mid_message and self.deadline_s == _NEVER_S:
            self.deadline_s = self._clock() + HALF_MESSAGE_S

    def check_deadline(self) -> None:
        """Raise VhostUserError if a message has begun and its rest is overdue."""
        if self._clock() >= self.deadline_s:
            raise self._channel.error(
                f"half a message, and no more of it within {HALF_MESSAGE_S:g} s"
            )

    def config_changed(self) -> None:
        """Tell the front end, if it wants to know, that the device's configuration space has
        changed (CONFIG_CHANGE_MSG)."""
        if self._to_frontend is None or not self._protocol_features & ProtocolFeature.CONFIG:
            return
        try:
            self._to_frontend.send(BackendRequest.CONFIG_CHANGE_MSG)
        except VhostUserError as error:
            self._report(str(error))
            self._close_to_frontend()

    def close(self) -> None:
        """Release everything that the front end shared, and hang up; idempotent."""
        self._served.close()
        self._close_to_frontend()
        self._channel.close()

    def _complain(self, problem: str) -> None:
        self._report(f"{self.name}: {problem}")

    def _end_stuck(self) -> None:
        self._channel.hang_up(
            "an eventfd that it has filled up, and whose O_NONBLOCK it has cleared, held a write up"
        )

    def _close_to_frontend(self) -> None:
        if self._to_frontend is not None:
            self._to_frontend.close()
            self._to_frontend = None

    # Any message

    def _handle(self, message: Message) -> None:
        if message.is_reply:
            raise self._channel.error(f"{message.name}: a reply that nobody asked for")
        rule = _RULES.get(message.request)
        reply: bytes | None
        try:
            if rule is None:
                raise RefusedError("this back end does not serve it")
            reply = self._apply(rule, message)
        except (RefusedError, UnusableRegionError, OSError) as error:
            problem = f"{message.name}: {error}"
            if not self._wants_reply(message) or (rule is not None and rule.replies):
                raise self._channel.error(problem) from error
            self._complain(problem)
            reply = U64.pack(1)
        else:
            # Checked afterwards, because this request may be the one that negotiates REPLY_ACK.
            if reply is None and self._wants_reply(message):
                reply = U64.pack(0)
        if reply is not None:
            self._channel.send(message.request, reply, flags=REPLY)

    def _wants_reply(self, message: Message) -> bool:
        return message.need_reply and bool(self._protocol_features & ProtocolFeature.REPLY_ACK)

    def _apply(self, rule: _Rule, message: Message) -> bytes | None:
        """Check the shape of ``message``, then do its request; return the reply's payload, if
        any."""
        least, most = rule.fds
        if not least <= len(message.fds) <= most:
            wanted = str(least) if least == most else f"{least} to {most}"
            raise self._malformed(message, f"{len(message.fds)} file descriptors, not {wanted}")
        fields = self._channel.unpack(message, rule.layout) if rule.layout else ()
        if rule.feature & ~self._protocol_features:
            raise RefusedError(f"the protocol feature {rule.feature.name} was not negotiated")
        reply = rule.handle(self, message, *fields)
        return reply if rule.replies else None

    def _malformed(self, message: Message, problem: str) -> VhostUserError:
        return self._channel.error(f"{message.name}: {problem}")

    # One message each.  Those with a reply of their own return its payload.

    def _get_features(self, message: Message) -> bytes:
        return U64.pack(self._served.features)

    def _set_features(self, message: Message, features: int) -> None:
        self._served.set_features(features)

    def _get_protocol_features(self, message: Message) -> bytes:
        return U64.pack(OFFERED)

    def _set_protocol_features(self, message: Message, features: int) -> None:
        if unoffered := features & ~int(OFFERED):
            raise RefusedError(f"bits {unoffered:#x} were not offered")
        self._protocol_features = features

    def _get_queue_num(self, message: Message) -> bytes:
        return U64.pack(self._served.queue_num)

    def _set_owner(self, message: Message) -> None:
        """Do nothing: the connection is the session."""

    def _reset_owner(self, message: Message) -> None:
        self._served.reset_owner()

    def _reset_device(self, message: Message) -> None:
        self._served.reset_device()

    def _set_backend_req_fd(self, message: Message) -> None:
        channel = back_channel(message.fds[0], self.name)
        self._close_to_frontend()
        self._to_frontend = channel

    def _set_mem_table(self, message: Message) -> None:
        payload = message.payload
        count = MEM_TABLE.unpack_from(payload)[0] if len(payload) >= MEM_TABLE.size else -1
        if len(payload) != MEM_TABLE.size + count * MEM_REGION.size or len(message.fds) != count:
            raise self._malformed(
                message,
                f"a payload of {len(payload)} bytes and {len(message.fds)} file descriptors for"
                f" {max(count, 0)} regions",
            )
        regions = MEM_REGION.iter_unpack(payload[MEM_TABLE.size :])
        table = zip((MemoryRegion(*fields) for fields in regions), message.fds, strict=True)
        self._served.set_mem_table(list(table))

    def _get_max_mem_slots(self, message: Message) -> bytes:
        return U64.pack(MAX_REGIONS)

    def _add_mem_reg(self, message: Message, *fields: int) -> None:
        self._served.add_mem_reg(MemoryRegion(*fields), message.fds[0])

    def _rem_mem_reg(self, message: Message, *fields: int) -> None:
        self._served.rem_mem_reg(MemoryRegion(*fields))

    def _get_config(self, message: Message) -> bytes:
        offset, size, flags, _ = self._config(message)
        try:
            return CONFIG.pack(offset, size, flags) + self._served.get_config(offset, size)
        except RefusedError:
            return b""  # "uses zero length of payload to indicate an error"

    def _set_config(self, message: Message) -> None:
        offset, _, _, data = self._config(message)
        self._served.set_config(offset, data)

    def _config(self, message: Message) -> tuple[int, int, int, bytes]:
        """Return offset, size, flags and the bytes of a message about the configuration space."""
        payload = message.payload
        if len(payload) >= CONFIG.size:
            offset, size, flags = CONFIG.unpack_from(payload)
            if len(payload) == CONFIG.size + size:
                return offset, size, flags, payload[CONFIG.size :]
        raise self._malformed(message, f"a payload of {len(payload)} bytes that does not fit")

    def _set_vring_num(self, message: Message, index: int, size: int) -> None:
        self._served.set_vring_num(index, size)

    def _set_vring_addr(
        self,
        message: Message,
        index: int,
        flags: int,
        descriptor: int,
        used: int,
        avail: int,
        log: int,
    ) -> None:
        self._served.set_vring_addr(index, descriptor=descriptor, driver=avail, device=used)

    def _set_vring_base(self, message: Message, index: int, base: int) -> None:
        self._served.set_vring_base(index, base)

    def _get_vring_base(self, message: Message, index: int, _: int) -> bytes:
        return VRING_STATE.pack(index, self._served.get_vring_base(index))

    def _set_vring_enable(self, message: Message, index: int, enable: int) -> None:
        self._served.set_vring_enable(index, enable)

    def _set_vring_kick(self, message: Message, word: int) -> None:
        self._served.set_vring_kick(word & VRING_INDEX_MASK, self._vring_fd(message, word))

    def _set_vring_call(self, message: Message, word: int) -> None:
        self._served.set_vring_call(word & VRING_INDEX_MASK, self._vring_fd(message, word))

    def _set_vring_err(self, message: Message, word: int) -> None:
        self._served.set_vring_err(word & VRING_INDEX_MASK, self._vring_fd(message, word))

    def _vring_fd(self, message: Message, word: int) -> int:
        """Return the file descriptor that ``word`` announces; -1 if it announces none."""
        wanted = 0 if word & VRING_NO_FD else 1
        if len(message.fds) != wanted:
            raise self._malformed(message, f"{len(message.fds)} file descriptors, not {wanted}")
        return message.fds[0] if wanted else -1


class _Rule(NamedTuple):
    """The shape that a request must have, and its handler.

    ``layout`` is its payload, None if the handler checks that; ``fds`` are the fewest and most file
    descriptors.  ``feature`` must have been negotiated.  With ``replies`` the request has a reply
    of its own, so there is no acknowledgement.
    """

    handle: Callable[..., Any]
    layout: struct.Struct | None = struct.Struct("")
    fds: tuple[int, int] = (0, 0)
    feature: ProtocolFeature = ProtocolFeature(0)
    replies: bool = False


_SLOTS = ProtocolFeature.CONFIGURE_MEM_SLOTS

_RULES: dict[int, _Rule] = {
    Request.GET_FEATURES: _Rule(Session._get_features, replies=True),
    Request.SET_FEATURES: _Rule(Session._set_features, U64),
    Request.SET_OWNER: _Rule(Session._set_owner),
    Request.RESET_OWNER: _Rule(Session._reset_owner),
    Request.SET_MEM_TABLE: _Rule(Session._set_mem_table, None, (0, MAX_FDS)),
    Request.SET_VRING_NUM: _Rule(Session._set_vring_num, VRING_STATE),
    Request.SET_VRING_ADDR: _Rule(Session._set_vring_addr, VRING_ADDR),
    Request.SET_VRING_BASE: _Rule(Session._set_vring_base, VRING_STATE),
    Request.GET_VRING_BASE: _Rule(Session._get_vring_base, VRING_STATE, replies=True),
    Request.SET_VRING_KICK: _Rule(Session._set_vring_kick, U64, (0, MAX_FDS)),
    Request.SET_VRING_CALL: _Rule(Session._set_vring_call, U64, (0, MAX_FDS)),
    Request.SET_VRING_ERR: _Rule(Session._set_vring_err, U64, (0, MAX_FDS)),
    Request.GET_PROTOCOL_FEATURES: _Rule(Session._get_protocol_features, replies=True),
    Request.SET_PROTOCOL_FEATURES: _Rule(Session._set_protocol_features, U64),
    # "sent only when [MQ] is set in queried protocol features": offered is enough.
    Request.GET_QUEUE_NUM: _Rule(Session._get_queue_num, replies=True),
    Request.SET_VRING_ENABLE: _Rule(Session._set_vring_enable, VRING_STATE),
    Request.SET_BACKEND_REQ_FD: _Rule(
        Session._set_backend_req_fd, fds=(1, 1), feature=ProtocolFeature.BACKEND_REQ
    ),
    Request.GET_CONFIG: _Rule(
        Session._get_config, None, feature=ProtocolFeature.CONFIG, replies=True
    ),
    Request.SET_CONFIG: _Rule(Session._set_config, None, feature=ProtocolFeature.CONFIG),
    Request.RESET_DEVICE: _Rule(Session._reset_device, feature=ProtocolFeature.RESET_DEVICE),
    Request.GET_MAX_MEM_SLOTS: _Rule(Session._get_max_mem_slots, feature=_SLOTS, replies=True),
    Request.ADD_MEM_REG: _Rule(Session._add_mem_reg, SINGLE_MEM_REGION, (1, 1), _SLOTS),
    # "the back-end MAY accept messages with one file descriptor"
    Request.REM_MEM_REG: _Rule(Session._rem_mem_reg, SINGLE_MEM_REGION, (0, 1), _SLOTS),
}
