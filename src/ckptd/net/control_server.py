"""The node's side of control connections: each request goes to one handler, its answer back.

What peers make this node hold in memory is bounded over all connections, whatever they send and
however slowly they read.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Final, cast

import structlog

from ckptd.core import limits
from ckptd.core.identity import Identity
from ckptd.core.permissions import Action, may
from ckptd.errors import (
    CkptdError,
    NotAuthorized,
    PeerBusy,
    PeerError,
    PeerStalled,
    ProtocolError,
)
from ckptd.net.control_connection import Answer, ControlProtocol, Handler, as_error_message
from ckptd.net.memory import Claim, MemoryPool
from ckptd.net.tls import none_forgotten, refuse_forgotten
from ckptd.wire import messages
from ckptd.wire.connection import Buffer, HelloReceived, RequestReceived
from ckptd.wire.messages import Message

_log = structlog.get_logger(__name__)

_LARGE_ANSWERS: Final = frozenset(
    {messages.GetDocuments, messages.ListDocuments, messages.Inventory, messages.Sync}
)
_DECODED_PER_BODY_BYTE: Final = 3  # what a body takes together with the message decoded from it


class _ServerProtocol(ControlProtocol):
    """One connection that somebody made to this node.

    What it makes the node hold in memory is counted from a frame's header on until its answer has
    been sent; when there is no room, reading stops until there is.
    """

    def __init__(self, server: ControlServer) -> None:
        super().__init__("server", server.cluster, forgotten=server.forgotten)
        self._server = server
        self._greeted = False
        self._lost = False
        self._handled_bytes = 0  # of requests that are being answered
        self._claim: Claim | None = None
        self._frame_timer: asyncio.TimerHandle | None = None
        self._timed_frame = -1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self.connection is None or self.identity is None or self.connection.closed:
            return
        if not may(self.identity.roles, Action.HELLO):
            self.fail(NotAuthorized(f"{self.identity} may not connect here"))
            return
        if not self._server.admit(self):
            self.fail(PeerBusy(self.peer, "has too many connections to this node"))
            return
        self._claim = Claim(self._server.requests_pool, self.peer, self._memory_granted)
        asyncio.get_running_loop().call_later(limits.HANDSHAKE_TIMEOUT_S, self._check_hello)

    def _check_hello(self) -> None:
        if not self._greeted and not self.closed.done():
            self.fail(ProtocolError(self.peer, "sent no hello in time"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Requests that are being answered go on, and hold their memory until they have ended."""
        super().connection_lost(exc)
        self._server.leave(self)
        self._lost = True
        self._watch_frame()
        self._count_memory()
        if self.connection is not None:
            with contextlib.suppress(PeerError):
                self.connection.receive_eof()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._count_memory():
            self._watch_frame()
        elif self._transport is not None:
            self._transport.pause_reading()
            self._stop_frame_timer()  # the peer may not send: that is not its fault

    def _memory_granted(self) -> None:
        if self._transport is not None and not self._lost:
            self._transport.resume_reading()
            self._watch_frame()

    def _count_memory(self) -> bool:
        """Claims what this connection makes the node hold; whether there is room for it."""
        if self._claim is None or self.connection is None:
            return True
        held = self._handled_bytes
        if not (self._lost or self.connection.closed):
            held += _held_bytes(*self.connection.announced_bytes)
        return self._claim.want(max(0, held - limits.CONTROL_FREE_BYTES))

    def _watch_frame(self) -> None:
        """A frame that has begun must be complete in time."""
        connection = self.connection
        if connection is None or self._lost or not connection.collecting:
            self._stop_frame_timer()
        elif self._frame_timer is None or self._timed_frame != connection.frames_received:
            self._stop_frame_timer()
            self._timed_frame = connection.frames_received
            self._frame_timer = asyncio.get_running_loop().call_later(
                limits.CONTROL_FRAME_TIMEOUT_S, self._frame_late
            )

    def _stop_frame_timer(self) -> None:
        if self._frame_timer is not None:
            self._frame_timer.cancel()
            self._frame_timer = None

    def _frame_late(self) -> None:
        self._frame_timer = None
        self.fail(PeerStalled(self.peer, "did not finish a frame within the deadline"))
        self._count_memory()

    def on_event(self, event: object) -> None:
        if isinstance(event, HelloReceived):
            self._greeted = True
            if event.message.cluster != self._cluster:
                self.fail(ProtocolError(self.peer, f"is of cluster {event.message.cluster!r}"))
                return
            self._server.on_hello(cast(Identity, self.identity), event.message)
            assert self.connection is not None
            hello = self.connection.send_hello(self._server.hello())
            self._spawn(partial(self.write, hello), "hello")
        elif isinstance(event, RequestReceived):
            assert self.connection is not None
            size = self.connection.request_bytes(event.request_id)
            held = _held_bytes(size - event.payload.nbytes, event.payload.nbytes)
            self._handled_bytes += held
            self._spawn(partial(self._answer, event), type(event.message).__name__, held)

    def _spawn(self, work: Callable[[], Awaitable[None]], what: str, held_bytes: int = 0) -> None:
        async def guarded() -> None:
            try:
                await work()
            except PeerError as error:
                _log.info("answer_not_sent", peer=self.peer, request=what, reason=error.reason)
                self.abort()
            finally:
                self._handled_bytes -= held_bytes
                self._count_memory()

        self._server.run(guarded(), f"{what} from {self.peer}")

    async def _answer(self, event: RequestReceived) -> None:
        large = limits.CONTROL_ANSWER_BYTES if type(event.message) in _LARGE_ANSWERS else 0
        async with self._server.answers_pool.claimed(self.peer, large) as claim:
            chunks = self._encoded(event, await self._handle(event))
            size = sum(memoryview(chunk).nbytes for chunk in chunks)
            claim.take(size if size > limits.CONTROL_FREE_BYTES else 0)
            await self.write(chunks)

    async def _handle(self, event: RequestReceived) -> Answer:
        assert self.connection is not None and self.identity is not None
        connection = self.connection

        def progress(message: Message) -> None:
            # At once or not at all: in a task of its own it could come behind the answer.
            if self.may_write_now:
                self.write_now(connection.send_response(event.request_id, message))

        try:
            refuse_forgotten(self.identity, self._forgotten)
            return await self._server.handler(self.identity, event.message, event.payload, progress)
        except PeerBusy as error:
            return messages.Busy(error.reason[:1000]), b""
        except CkptdError as error:
            return as_error_message(error, self._server.node_id), b""
        except Exception:  # the edge of this task: the peer must get an answer
            return self._failure(event)

    def _encoded(self, event: RequestReceived, answer: Answer) -> list[Buffer]:
        """The chunks of an answer; of an Error when the protocol does not allow the answer."""
        assert self.connection is not None
        try:
            return self.connection.send_response(event.request_id, *answer)
        except PeerError:
            raise  # there is nobody to answer any more
        except Exception:
            return self.connection.send_response(event.request_id, *self._failure(event))

    def _failure(self, event: RequestReceived) -> Answer:
        _log.exception("request_failed", peer=self.peer, request=type(event.message).__name__)
        failure = messages.Error(
            "failed", "an internal error; see the node's log", self._server.node_id
        )
        return failure, b""


def _held_bytes(body_bytes: int, payload_bytes: int) -> int:
    return _DECODED_PER_BODY_BYTE * body_bytes + payload_bytes


class ControlServer:
    """Serves control connections. `handler` answers requests, `hello` describes this node,
    `forgotten` says of a certificate's serial number whether it is refused."""

    def __init__(
        self,
        *,
        cluster: str,
        node_id: str,
        context: ssl.SSLContext,
        hello: Callable[[], messages.Hello],
        handler: Handler,
        on_hello: Callable[[Identity, messages.Hello], None],
        forgotten: Callable[[str], bool] = none_forgotten,
    ) -> None:
        self.cluster = cluster
        self.node_id = node_id
        self.hello = hello
        self.handler = handler
        self.on_hello = on_hello
        self.forgotten = forgotten
        self.requests_pool = MemoryPool(limits.CONTROL_REQUESTS_POOL_BYTES)
        self.answers_pool = MemoryPool(limits.CONTROL_ANSWERS_POOL_BYTES)
        self._context = context
        self._protocols: set[_ServerProtocol] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def handshake(self, sock: socket.socket) -> Callable[[], None]:
        """For the Acceptor: TLS on an accepted socket, which the protocol then owns."""
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(
                lambda: _ServerProtocol(self),
                sock,
                ssl=self._context,
                ssl_handshake_timeout=limits.HANDSHAKE_TIMEOUT_S,
            )
        except BaseException:
            sock.close()
            raise
        return lambda: None

    def admit(self, protocol: _ServerProtocol) -> bool:
        """Whether one more connection of this peer is taken."""
        same = sum(other.peer == protocol.peer for other in self._protocols)
        if (
            len(self._protocols) >= limits.CONTROL_CONNECTIONS_MAX
            or same >= limits.CONTROL_CONNECTIONS_PER_PEER_MAX
        ):
            return False
        self._protocols.add(protocol)
        return True

    def leave(self, protocol: _ServerProtocol) -> None:
        self._protocols.discard(protocol)

    def run(self, work: Coroutine[None, None, None], name: str) -> None:
        """Runs one answer to its end, also when the connection is gone by then."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Drops all connections, and what is being answered."""
        for task in self._tasks:
            task.cancel()
        protocols = list(self._protocols)
        for protocol in protocols:
            protocol.abort()
        if protocols:
            await asyncio.wait(
                [protocol.closed for protocol in protocols], timeout=limits.SHUTDOWN_TIMEOUT_S
            )
