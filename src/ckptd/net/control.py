"""Control connections: small requests and answers on asyncio (uvloop where it is installed).

`ControlServer` gives each request to one handler and sends its answer; `ControlClient` makes
requests, many at a time on one connection. Both are thin shells around the pure state machine of
`ckptd.wire.connection`.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, TypeVar, cast

import structlog

from ckptd.core import limits
from ckptd.core.identity import Identity
from ckptd.errors import (
    CkptdError,
    NotAuthorized,
    PeerBusy,
    PeerError,
    PeerStalled,
    PeerUnreachable,
    ProtocolError,
)
from ckptd.net.bulk import refusal
from ckptd.net.tls import check_peer
from ckptd.wire import messages
from ckptd.wire.connection import (
    Buffer,
    Connection,
    ConnectionRefused,
    HelloReceived,
    RequestReceived,
    ResponseReceived,
)
from ckptd.wire.messages import Message

_log = structlog.get_logger(__name__)

_A = TypeVar("_A", bound=Message)
Progress = Callable[[Message], None]
Payload = bytes | memoryview
Answer = tuple[Message, Payload]
Handler = Callable[[Identity, Message, Payload, Progress], Awaitable[Answer]]
"""(who asks, request, payload, tell progress) -> (answer, payload). A CkptdError becomes an Error
message; anything else is logged, and the peer hears only that it failed."""


def as_error_message(error: CkptdError, node: str) -> messages.Error:
    """The message that tells a peer of `error`, which happened on `node`."""
    return messages.Error(error.kind, error.message[:8000], node, error.next[:8000])


class _ControlProtocol(asyncio.Protocol):
    """What both sides share: bytes to events, and flow control of what is sent."""

    def __init__(
        self, side: Literal["client", "server"], cluster: str, expected_node_id: str | None = None
    ) -> None:
        self._side = side
        self._cluster = cluster
        self._expected_node_id = expected_node_id
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

    def data_received(self, data: bytes) -> None:
        if self.connection is None:
            return
        try:
            events = self.connection.receive_data(data)
        except ProtocolError as error:
            self.fail(error)
            return
        for event in events:
            self.on_event(event)

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
            refusal_ = messages.Error(error.kind, error.message[:8000])
            self._transport.writelines(self.connection.send_refusal(refusal_))
        self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    async def write(self, chunks: Sequence[Buffer]) -> None:
        """Sends one frame; returns once the transport takes more. Raises PeerStalled when the
        peer takes nothing for REQUEST_TIMEOUT_S."""
        async with self._sending:
            if self._transport is None or self._transport.is_closing():
                raise PeerUnreachable(self.peer, "closed the connection")
            self._transport.writelines(chunks)
            try:
                async with asyncio.timeout(limits.REQUEST_TIMEOUT_S):
                    await self._may_write.wait()
            except TimeoutError as error:
                self.abort()
                raise PeerStalled(self.peer, "took no bytes within the deadline") from error


class _ServerProtocol(_ControlProtocol):
    def __init__(self, server: ControlServer) -> None:
        super().__init__("server", server.cluster)
        self._server = server
        self._greeted = False
        self._tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self.connection is None:
            return
        if not self._server.admit(self):
            self.fail(NotAuthorized(f"{self.peer} has too many connections"))
            return
        asyncio.get_running_loop().call_later(limits.HANDSHAKE_TIMEOUT_S, self._check_hello)

    def _check_hello(self) -> None:
        if not self._greeted and not self.closed.done():
            self.fail(ProtocolError(self.peer, "sent no hello in time"))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._server.leave(self)
        for task in self._tasks:
            task.cancel()

    def on_event(self, event: object) -> None:
        if isinstance(event, HelloReceived):
            self._greeted = True
            if event.message.cluster != self._cluster:
                self.fail(ProtocolError(self.peer, f"is of cluster {event.message.cluster!r}"))
                return
            self._server.on_hello(cast(Identity, self.identity), event.message)
            assert self.connection is not None
            self._spawn(self.write(self.connection.send_hello(self._server.hello())), "hello")
        elif isinstance(event, RequestReceived):
            self._spawn(self._answer(event), type(event.message).__name__)

    def _spawn(self, work: Awaitable[None], what: str) -> None:
        async def guarded() -> None:
            try:
                await work
            except PeerError as error:
                _log.info("answer_not_sent", peer=self.peer, request=what, reason=error.reason)
                self.abort()

        task = asyncio.create_task(guarded(), name=f"{what} from {self.peer}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, event: RequestReceived) -> None:
        assert self.connection is not None and self.identity is not None
        connection = self.connection

        def progress(message: Message) -> None:
            if self._may_write.is_set():  # progress is a courtesy: never queue it up
                self._spawn(self.write(connection.send_response(event.request_id, message)), "")

        answer: Answer
        try:
            answer = await self._server.handler(
                self.identity, event.message, event.payload, progress
            )
        except PeerBusy as error:
            answer = (messages.Busy(error.reason[:1000]), b"")
        except CkptdError as error:
            answer = (as_error_message(error, self._server.node_id), b"")
        except Exception:  # the edge of this task: the peer must get an answer
            _log.exception("request_failed", peer=self.peer, request=type(event.message).__name__)
            failure = messages.Error("failed", "an internal error; see the node's log")
            answer = (failure, b"")
        await self.write(connection.send_response(event.request_id, *answer))


class ControlServer:
    """Serves control connections. `handler` answers requests, `hello` describes this node."""

    def __init__(
        self,
        *,
        cluster: str,
        node_id: str,
        context: ssl.SSLContext,
        hello: Callable[[], messages.Hello],
        handler: Handler,
        on_hello: Callable[[Identity, messages.Hello], None],
    ) -> None:
        self.cluster = cluster
        self.node_id = node_id
        self.hello = hello
        self.handler = handler
        self.on_hello = on_hello
        self._context = context
        self._protocols: set[_ServerProtocol] = set()

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

    async def close(self) -> None:
        """Drops all connections."""
        protocols = list(self._protocols)
        for protocol in protocols:
            protocol.abort()
        if protocols:
            await asyncio.wait(
                [protocol.closed for protocol in protocols], timeout=limits.SHUTDOWN_TIMEOUT_S
            )


class _ClientProtocol(_ControlProtocol):
    def __init__(self, cluster: str, expected_node_id: str | None) -> None:
        super().__init__("client", cluster, expected_node_id)
        self.hello: asyncio.Future[messages.Hello] = asyncio.get_running_loop().create_future()
        self.waiting: dict[int, tuple[asyncio.Future[Answer], Progress | None]] = {}
        self.refusal: CkptdError | None = None

    def fail(self, error: CkptdError) -> None:
        self.refusal = error
        self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        reason = f"the connection broke: {exc}" if exc else "closed the connection"
        error = self.refusal or PeerUnreachable(self.peer, reason)
        for future, _ in self.waiting.values():
            if not future.done():
                future.set_exception(error)
        if not self.hello.done():
            self.hello.set_exception(error)
            self.hello.exception()  # nobody may be waiting for it

    def on_event(self, event: object) -> None:
        if isinstance(event, HelloReceived) and not self.hello.done():
            self.hello.set_result(event.message)
        elif isinstance(event, ConnectionRefused):
            self.fail(refusal(self.peer, event.message))
        elif isinstance(event, ResponseReceived):
            future, progress = self.waiting[event.request_id]
            if not event.final:
                if progress is not None:
                    progress(event.message)
            elif not future.done():
                future.set_result((event.message, event.payload))


class ControlClient:
    """One control connection to a node. Made by `connect_control`."""

    def __init__(self, protocol: _ClientProtocol, hello: messages.Hello, address: str) -> None:
        assert protocol.identity is not None
        self._protocol = protocol
        self.hello = hello
        self.identity = protocol.identity
        self.node_id = protocol.identity.node_id
        self.address = address

    @property
    def connected(self) -> bool:
        return not self._protocol.closed.done()

    async def request(
        self,
        message: Message,
        answer: type[_A],
        *,
        payload: bytes = b"",
        timeout_s: float = limits.REQUEST_TIMEOUT_S,
        on_progress: Progress | None = None,
    ) -> tuple[_A, Payload]:
        """Sends `message` and waits for its answer of type `answer` with its payload.

        `timeout_s` bounds the time without any sign of life for this request: each progress
        message starts it anew. Raises PeerRefused, PeerBusy, PeerStalled or PeerUnreachable.
        """
        protocol = self._protocol
        if protocol.connection is None or not self.connected:
            raise PeerUnreachable(self.node_id, "the connection is closed")
        loop = asyncio.get_running_loop()
        alive_s = loop.time()

        def note_progress(progress: Message) -> None:
            nonlocal alive_s
            alive_s = loop.time()
            if on_progress is not None:
                on_progress(progress)

        request_id, chunks = protocol.connection.send_request(message, payload)
        future: asyncio.Future[Answer] = loop.create_future()
        protocol.waiting[request_id] = (future, note_progress)
        try:
            await protocol.write(chunks)
            while not future.done():
                left_s = alive_s + timeout_s - loop.time()
                if left_s <= 0:
                    self._protocol.abort()  # an answer that comes late would answer nothing
                    raise PeerStalled(
                        self.node_id,
                        f"gave no answer to {type(message).__name__} for {timeout_s:g} s",
                    )
                await asyncio.wait([future], timeout=left_s)
            reply, reply_payload = future.result()
        finally:
            protocol.waiting.pop(request_id, None)
            future.cancel()
        if isinstance(reply, answer):
            return reply, reply_payload
        raise refusal(self.node_id, reply)

    async def close(self) -> None:
        """Closes the connection; what is still asked fails with PeerUnreachable."""
        self._protocol.abort()
        await self._protocol.closed


async def connect_control(
    host: str,
    port: int,
    *,
    context: ssl.SSLContext,
    cluster: str,
    hello: messages.Hello,
    expected_node_id: str | None = None,
) -> ControlClient:
    """Connects to a node and exchanges hellos.

    Raises PeerUnreachable, ProtocolError, or NotAuthorized when what answers there is not a node
    of this cluster, or not the node that was meant.
    """
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    meant = expected_node_id or address
    loop = asyncio.get_running_loop()
    protocol: _ClientProtocol | None = None
    try:
        async with asyncio.timeout(limits.CONNECT_TIMEOUT_S + limits.HANDSHAKE_TIMEOUT_S):
            _, protocol = await loop.create_connection(
                lambda: _ClientProtocol(cluster, expected_node_id),
                host,
                port,
                ssl=context,
                server_hostname="",
                ssl_handshake_timeout=limits.HANDSHAKE_TIMEOUT_S,
            )
            if protocol.connection is None:
                raise protocol.refusal or PeerUnreachable(meant, "closed the connection")
            await protocol.write(protocol.connection.send_hello(hello))
            answer = await protocol.hello
        if answer.cluster != cluster:
            raise ProtocolError(meant, f"is of cluster {answer.cluster!r}")
    except TimeoutError as error:
        _drop(protocol)
        raise PeerUnreachable(meant, f"no answer at {address}") from error
    except OSError as error:  # ssl.SSLError is one
        _drop(protocol)
        raise PeerUnreachable(meant, f"cannot connect to {address}: {error.strerror or error}") from error
    except BaseException:
        _drop(protocol)
        raise
    return ControlClient(protocol, answer, address)


def _drop(protocol: _ClientProtocol | None) -> None:
    if protocol is not None:
        protocol.abort()
