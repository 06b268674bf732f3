"""One HTTP/1.1 connection: h11 parses, this reads, answers and keeps the deadlines."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from email.utils import formatdate

import h11
import msgspec
import structlog

from ckptd.core import limits
from ckptd.core.identity import Identity
from ckptd.observe.pages import Answer, Pages, plain

_log = structlog.get_logger(__name__)


class HttpLimits(msgspec.Struct, frozen=True):
    """The bounds of the endpoint: counts, bytes, and waits in seconds."""

    connections_max: int = limits.HTTP_CONNECTIONS_MAX
    requests_max: int = limits.HTTP_REQUESTS_PER_CONNECTION_MAX
    head_max_bytes: int = limits.HTTP_HEAD_MAX_BYTES
    handshake_timeout_s: float = limits.HANDSHAKE_TIMEOUT_S
    request_timeout_s: float = limits.HTTP_REQUEST_TIMEOUT_S
    idle_timeout_s: float = limits.HTTP_IDLE_TIMEOUT_S
    answer_timeout_s: float = limits.HTTP_ANSWER_TIMEOUT_S
    close_timeout_s: float = limits.HTTP_CLOSE_TIMEOUT_S


class HttpConnection:
    """One accepted connection, from the handshake to its end.

    `started`: the socket belongs to the connection now. `answering`: a request has been read and
    its answer is not yet taken by the peer. Setting `last_request` ends it after that answer.
    """

    def __init__(self, pages: Pages, bounds: HttpLimits) -> None:
        self.started = False
        self.answering = False
        self.last_request = False
        self._pages = pages
        self._limits = bounds
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=bounds.head_max_bytes)

    async def run(
        self,
        sock: socket.socket,
        context: ssl.SSLContext | None,
        identify: Callable[[ssl.SSLObject], Identity | None],
    ) -> None:
        """Answer the requests that come on `sock`, which is closed at the end in any case.

        `identify` is asked once, after the handshake. Raises OSError (of which TimeoutError is a
        kind) when the connection is lost or too slow.
        """
        self.started = True
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=limits.HTTP_READ_BYTES)
        protocol = asyncio.StreamReaderProtocol(reader)
        tls = context is not None
        transport, _ = await loop.connect_accepted_socket(
            lambda: protocol,
            sock,
            ssl=context,
            ssl_handshake_timeout=self._limits.handshake_timeout_s if tls else None,
            ssl_shutdown_timeout=self._limits.close_timeout_s if tls else None,
        )
        try:
            # So that `drain` returns only when the peer's kernel has everything.
            transport.set_write_buffer_limits(high=0)
            writer = asyncio.StreamWriter(transport, protocol, reader, loop)
            peer = transport.get_extra_info("ssl_object")
            identity = None if peer is None else identify(peer)
            await self._serve(reader, writer, identity)
            writer.close()
            async with asyncio.timeout(self._limits.close_timeout_s):
                await writer.wait_closed()
        finally:
            transport.abort()

    async def _serve(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        identity: Identity | None,
    ) -> None:
        for count in range(1, self._limits.requests_max + 1):
            try:
                request = await self._next_request(reader, first=count == 1)
                if request is None:
                    return
                self.answering = True
                answer = self._answer(request, identity)
            except h11.RemoteProtocolError as error:
                request, answer = None, plain(error.error_status_hint, "not a request")
            except TimeoutError:
                if not self._http.trailing_data[0]:
                    return  # not one byte of a request: nobody waits for an answer
                request, answer = None, plain(408, "the request took too long")
            if request is None or count == self._limits.requests_max:
                self.last_request = True
            await self._send(writer, request, answer)
            self.answering = False
            if self.last_request or self._http.our_state is not h11.DONE:
                return  # h11 says MUST_CLOSE for HTTP/1.0 and for clients that asked for it
            self._http.start_next_cycle()

    async def _next_request(
        self, reader: asyncio.StreamReader, *, first: bool
    ) -> h11.Request | None:
        """The next request's head, or None when the peer has closed. Raises TimeoutError."""
        loop = asyncio.get_running_loop()
        begun = first or bool(self._http.trailing_data[0])
        wait_s = self._limits.request_timeout_s if begun else self._limits.idle_timeout_s
        async with asyncio.timeout(wait_s) as deadline:
            while True:
                event = self._http.next_event()
                if isinstance(event, h11.Request):
                    return event
                if event is not h11.NEED_DATA:
                    return None
                data = await reader.read(limits.HTTP_READ_BYTES)
                if data and not begun:
                    begun = True
                    deadline.reschedule(loop.time() + self._limits.request_timeout_s)
                self._http.receive_data(data)

    def _answer(self, request: h11.Request, identity: Identity | None) -> Answer:
        method = request.method.decode("ascii")
        # The line is ASCII by the grammar; what h11 lets through beyond that finds no page.
        target = request.target.decode("ascii", "replace")
        has_body = not isinstance(self._http.next_event(), h11.EndOfMessage)
        if has_body:
            self.last_request = True  # the body is not read, so no request can follow it
        try:
            answer = self._pages.answer(method, target, identity)
        except Exception:
            _log.exception("http_page_failed", target=target, next="report this as a bug")
            return plain(500, "this page failed; the node's log says why")
        if has_body and answer.status == 200:
            return plain(400, "a request here has no body")
        return answer

    async def _send(
        self, writer: asyncio.StreamWriter, request: h11.Request | None, answer: Answer
    ) -> None:
        headers = [
            ("Date", formatdate(usegmt=True)),
            ("Content-Type", answer.content_type),
            ("Content-Length", str(len(answer.body))),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            *answer.headers,
        ]
        if self.last_request:
            headers.append(("Connection", "close"))
        http = self._http
        out = http.send(h11.Response(status_code=answer.status, headers=headers)) or b""
        if request is None or request.method != b"HEAD":
            out += http.send(h11.Data(data=answer.body)) or b""
        out += http.send(h11.EndOfMessage()) or b""
        async with asyncio.timeout(self._limits.answer_timeout_s):
            writer.write(out)
            await writer.drain()
