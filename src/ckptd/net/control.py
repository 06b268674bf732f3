"""Making control connections: small requests and answers, many at a time on one connection."""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import Callable
from typing import TypeVar

from ckptd.core import limits
from ckptd.core.backoff import handshake_pause_s
from ckptd.core.quantities import Address
from ckptd.errors import CkptdError, PeerStalled, PeerUnreachable, ProtocolError
from ckptd.net.bulk import refusal
from ckptd.net.control_connection import Answer, ControlProtocol, Payload, Progress
from ckptd.net.tls import none_forgotten
from ckptd.wire import exchanges, messages
from ckptd.wire.connection import ConnectionRefused, HelloReceived, ResponseReceived
from ckptd.wire.messages import Message

_A = TypeVar("_A", bound=Message)


class _ClientProtocol(ControlProtocol):
    def __init__(
        self, cluster: str, expected_node_id: str | None, forgotten: Callable[[str], bool]
    ) -> None:
        super().__init__("client", cluster, expected_node_id, forgotten)
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
            future, progress = self.waiting.get(event.request_id, (None, None))
            if future is None:
                return  # whoever asked has given up
            if not event.final:
                if progress is not None:
                    progress(event.message)
            elif not future.done():
                future.set_result((event.message, event.payload))


class ControlClient:
    """One control connection to a node. Made by `connect_control`."""

    def __init__(
        self, protocol: _ClientProtocol, hello: messages.Hello, address: str, remote: Address
    ) -> None:
        assert protocol.identity is not None
        self._protocol = protocol
        self.hello = hello
        self.identity = protocol.identity
        self.node_id = protocol.identity.node_id
        self.address = address
        self.remote = remote
        """Where `address` led: IP address and port."""

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

        `timeout_s` bounds the time without any sign of life for this request: for those that take
        long (`exchanges.PROGRESSIVE`) each progress message starts it anew. Raises PeerRefused,
        PeerBusy, PeerStalled or PeerUnreachable.
        """
        protocol = self._protocol
        if protocol.connection is None or not self.connected:
            raise PeerUnreachable(self.node_id, "the connection is closed")
        loop = asyncio.get_running_loop()
        alive_s = loop.time()

        def note_progress(progress: Message) -> None:
            nonlocal alive_s
            if type(message) in exchanges.PROGRESSIVE:
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
    forgotten: Callable[[str], bool] = none_forgotten,
) -> ControlClient:
    """Connects to a node and exchanges hellos. A few times when the handshake is cut off: a node
    sheds connections that have not proved who they are when too many arrive at once.

    Raises PeerUnreachable, ProtocolError, or NotAuthorized when what answers there is not a node
    of this cluster, not the node that was meant, or bears a certificate that is `forgotten`.
    """
    loop = asyncio.get_running_loop()
    until_s = loop.time() + limits.CONNECT_TIMEOUT_S
    rng = random.Random()
    for failures in range(1, limits.HANDSHAKE_TRIES_MAX):
        try:
            return await _connect_once(
                host, port, context, cluster, hello, expected_node_id, forgotten
            )
        except PeerUnreachable as error:
            cut_off = isinstance(error.__cause__, ConnectionResetError)
            if not cut_off or loop.time() >= until_s:
                raise
        await asyncio.sleep(handshake_pause_s(failures, rng))
    return await _connect_once(host, port, context, cluster, hello, expected_node_id, forgotten)


async def _connect_once(
    host: str,
    port: int,
    context: ssl.SSLContext,
    cluster: str,
    hello: messages.Hello,
    expected_node_id: str | None,
    forgotten: Callable[[str], bool],
) -> ControlClient:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    meant = expected_node_id or address
    loop = asyncio.get_running_loop()
    protocol: _ClientProtocol | None = None
    try:
        async with asyncio.timeout(limits.CONNECT_TIMEOUT_S + limits.HANDSHAKE_TIMEOUT_S):
            transport, protocol = await loop.create_connection(
                lambda: _ClientProtocol(cluster, expected_node_id, forgotten),
                host,
                port,
                ssl=context,
                server_hostname="",
                ssl_handshake_timeout=limits.HANDSHAKE_TIMEOUT_S,
            )
            if protocol.connection is None or protocol.refusal is not None:
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
        reason = error.strerror or error
        raise PeerUnreachable(meant, f"cannot connect to {address}: {reason}") from error
    except BaseException:
        _drop(protocol)
        raise
    remote = transport.get_extra_info("peername") or (host, port)
    return ControlClient(protocol, answer, address, Address(*remote[:2]))


def _drop(protocol: _ClientProtocol | None) -> None:
    if protocol is not None:
        protocol.abort()
