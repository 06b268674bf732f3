"""One control connection on asyncio: what its two sides share.

A thin shell around the pure state machine of `ckptd.wire.connection`: bytes to events, and flow
control of what is sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, cast

import structlog

from ckptd.core import limits
from ckptd.core.identity import Identity
from ckptd.errors import CkptdError, NotAuthorized, PeerStalled, PeerUnreachable, ProtocolError
from ckptd.net.tls import check_peer, none_forgotten, refuse_forgotten
from ckptd.wire import messages
from ckptd.wire.connection import Buffer, Connection
from ckptd.wire.messages import Message

_log = structlog.get_logger(__name__)

Progress = Callable[[Message], None]
Payload = bytes | memoryview
Answer = tuple[Message, Payload]
Handler = Callable[[Identity, Message, Payload, Progress], Awaitable[Answer]]
"""(who asks, request, payload, tell progress) -> (answer, payload). A CkptdError becomes an Error
message; anything else is logged, and the peer hears only that it failed."""


def as_error_message(error: CkptdError, node: str) -> messages.Error:
    """The message that tells a peer of `error`, which happened on `node`."""
    return messages.Error(error.kind, error.message[:8000], node, error.next[:8000])


class ControlProtocol(asyncio.Protocol):
    """What both sides share: bytes to events, and flow control of what is sent."""

    def __init__(
        self,
        side: Literal["client", "server"],
        cluster: str,
        expected_node_id: str | None = None,
        forgotten: Callable[[str], bool] = none_forgotten,
    ) -> None:
        self._side = side
        self._cluster = cluster
        self._expected_node_id = expected_node_id
        self._forgotten = forgotten
        self._transport: asyncio.Transport | None = None
        self._may_write = asyncio.Event()
        self._may_write.set()
        self._sending = asyncio.Lock()
        self.identity: Identity | None = None
        self.connection: Connection | None = None
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def peer(self) -> str:
        return self.identity.node_id if self.identity else "unknown peer"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        ssl_object = transport.get_extra_info("ssl_object")
        try:
            self.identity = check_peer(
                ssl_object.getpeercert(binary_form=True) or b"",
                cluster=self._cluster,
                expected_node_id=self._expected_node_id,
            )
            if self._side == "client" and not self.identity.is_node:
                raise NotAuthorized(f"{self.identity} answered as a node, but is none")
        except NotAuthorized as error:
            self.fail(error)
            return
        self.connection = Connection(self._side, self.peer)
        try:
            refuse_forgotten(self.identity, self._forgotten)
        except NotAuthorized as error:
            self.fail(error)  # with words: it may be the owner's own machine, years later

    def data_received(self, data: bytes) -> None:
        if self.connection is None:
            return
        if self.connection.closed:
            return  # what comes after a refusal
        try:
            events = self.connection.receive_data(data)
        except ProtocolError as error:
            self.fail(error)
            return
        for event in events:
            self.on_event(event)
            if self._given_up():
                return  # because of this event: what came behind it does not count

    def _given_up(self) -> bool:
        return self.connection is None or self.connection.closed

    def on_event(self, event: object) -> None:
        raise NotImplementedError

    def pause_writing(self) -> None:
        self._may_write.clear()

    def resume_writing(self) -> None:
        self._may_write.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._may_write.set()
        if not self.closed.done():
            self.closed.set_result(None)

    def fail(self, error: CkptdError) -> None:
        """Drops the connection because of something that the peer did, and tells it why."""
        _log.warning("connection_dropped", peer=self.peer, reason=error.message)
        if self._transport is None:
            return
        if self.connection is not None:
            refusal_ = messages.Error(error.kind, error.message[:8000], next=error.next[:8000])
            self._transport.writelines(self.connection.send_refusal(refusal_))
        self._transport.close()
        # Closing TLS waits for the peer, which may have no wish to see the end.
        asyncio.get_running_loop().call_later(limits.LAST_WORDS_TIMEOUT_S, self._transport.abort)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    @property
    def may_write_now(self) -> bool:
        """Whether a small frame can be sent without waiting, and not inside of another one."""
        return (
            self._transport is not None
            and not self._transport.is_closing()
            and not self._sending.locked()
            and self._may_write.is_set()
        )

    def write_now(self, chunks: Sequence[Buffer]) -> None:
        """Sends one small frame when `may_write_now`."""
        assert self._transport is not None
        self._transport.writelines(chunks)

    async def write(self, chunks: Sequence[Buffer]) -> None:
        """Sends one frame; returns once the transport takes more. Raises PeerStalled when the
        peer takes nothing for REQUEST_TIMEOUT_S."""
        async with self._sending:
            if self._transport is None or self._transport.is_closing():
                raise PeerUnreachable(self.peer, "closed the connection")
            try:
                async with asyncio.timeout(limits.REQUEST_TIMEOUT_S):
                    for chunk in chunks:
                        await self._write_chunk(memoryview(chunk))
            except TimeoutError as error:
                self.abort()
                raise PeerStalled(self.peer, "took no bytes within the deadline") from error

    async def _write_chunk(self, view: memoryview) -> None:
        """In pieces, because TLS and the transport make copies of what they are given."""
        assert self._transport is not None
        for start in range(0, len(view), limits.CONTROL_WRITE_BYTES):
            if self._transport.is_closing():
                raise PeerUnreachable(self.peer, "closed the connection")
            self._transport.write(view[start : start + limits.CONTROL_WRITE_BYTES])
            await self._may_write.wait()
